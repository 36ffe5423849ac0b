package main

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

const (
	hotFlows  = 512
	peerFlows = 8192 // what udpgrm's table holds, of all groups
	roundSize = 1024
)

func (b *bench) rounds() int {
	if b.short {
		return 3
	}
	return 41
}

// group makes a target with one generation of n sockets. It is closed by
// release, which the caller runs at the end.
func (b *bench) group(s subject, o options, n int) (*target, error) {
	t, err := s.target(o)
	if err != nil {
		return nil, err
	}
	return t, t.advance(n)
}

// garage keeps targets until a section is over.
type garage struct{ targets []*target }

func (g *garage) put(t *target, err error) (*target, error) {
	if t != nil {
		g.targets = append(g.targets, t)
	}
	return t, err
}

// empty closes them slowly: the kernel frees programs in the background, and
// one that is given many at once can lock up (bpf_prog_pack_free).
func (g *garage) empty(err *error) {
	for _, t := range g.targets {
		if e := t.close(); *err == nil {
			*err = e
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// talk is a probe in which clients exchange datagrams with the target.
func (b *bench) talk(name string, t *target, clients func() []client, cookies []uint16, answer bool) probe {
	return probe{name, t.rx, t.tx, func() error {
		return b.exchange(t.port, clients(), cookies, t.sockets, answer)
	}}
}

// What a row of the table of programs is about.
func steering(s sample) float64 { return s.rx }
func hook(s sample) float64     { return s.tx }
func both(s sample) float64     { return s.rx + s.tx }

// programs compares what the programs cost for each packet.
func (b *bench) programs() (err error) {
	var g garage
	defer g.empty(&err)
	// First packets fill the tables, and so come when all else is measured.
	var known, first set
	strangers := b.newClients(hotFlows)
	any := func(from []client) func() []client {
		return func() []client { return b.some(from, roundSize) }
	}
	fresh := func() []client { return b.newClients(roundSize) }

	empty, err := g.put(b.group(plain{&b.room, loadEmptyReuseport}, options{hooks: true}, 4))
	if err != nil {
		return err
	}
	known.add("", b.talk("empty", empty, any(strangers), nil, true))
	first.add("", b.talk("empty", empty, any(strangers), nil, true))
	// What no steering program can do without, and what no flow table can.
	for _, c := range []contender{
		{"select", plain{&b.room, loadSelect}},
		{"look up", plain{&b.room, func(int) (int, error) { return loadLookUp(strangers) }}},
	} {
		t, err := g.put(b.group(c, options{}, 4))
		if err != nil {
			return err
		}
		known.add(c.name, b.talk(c.name, t, any(strangers), nil, false))
	}
	for _, s := range b.systems() {
		for _, k := range []kind{noop, cbpf2, cbpf20} {
			t, err := g.put(b.group(s, options{k, flows, true}, 4))
			if err != nil {
				return fmt.Errorf("%s, %s: %w", s.name, k, err)
			}
			label := s.name + " " + k.String()
			if k == noop {
				known.add(label, b.talk(label, t, any(strangers), nil, true))
				continue
			}
			cookies, err := t.cookies()
			if err != nil {
				return fmt.Errorf("%s: %w", label, err)
			}
			known.add(label, b.talk(label, t, any(strangers), cookies, false))
			known.add(label+" unknown", b.talk(label+", no cookie", t, any(strangers), nil, false))
		}
		for _, size := range []struct{ known, table int }{{64, peerFlows}, {hotFlows, peerFlows}, {hotFlows, flows}} {
			t, err := g.put(b.group(s, options{flow, size.table, true}, 4))
			if err != nil {
				return fmt.Errorf("%s, flow: %w", s.name, err)
			}
			clients := b.newClients(size.known)
			if err := b.establish(t, clients); err != nil {
				return fmt.Errorf("%s, flow: %w", s.name, err)
			}
			label := fmt.Sprintf("%s flow %d/%d", s.name, size.known, size.table)
			known.add(label, b.talk(label, t, any(clients), nil, true))
			if size.table == flows {
				first.add(s.name, b.talk(s.name+", first packets", t, fresh, nil, true))
			}
		}
	}
	if err := errors.Join(known.measure(b.rounds()), first.measure(b.rounds())); err != nil {
		return err
	}

	idle := gross(known.of(""))
	b.title("Programs: ns per run beyond an empty program of the same type (steering %.0f ns, sendmsg %.0f ns); lower quartile of %d rounds of %d packets",
		idle.rx, idle.tx, b.rounds(), roundSize)
	b.row("", "grm", "udpgrm", "grm/udpgrm", "target")
	row := func(what string, r *set, label string, of func(sample) float64, target float64) {
		ours := of(net(r.of("grm"+label), r.of("")))
		other, ratio, goal := "-", "-", "-"
		if b.udpgrm != nil {
			theirs := of(net(r.of("udpgrm"+label), r.of("")))
			other, ratio = fmt.Sprintf("%.0f", theirs), fmt.Sprintf("%.2f", ours/theirs)
		}
		if target != 0 {
			goal = fmt.Sprintf("≤ %.2f", target)
		}
		b.row(what, ours, other, ratio, goal)
	}
	b.row("for comparison: selecting a socket, nothing else", net(known.of("select"), known.of("")).rx, "-", "-", "-")
	b.row("for comparison: an LRU map's look-up of one of 512 flows, nothing else", net(known.of("look up"), known.of("")).rx, "-", "-", "-")
	row("noop", &known, " noop", steering, 0.35)
	row("cbpf, 2 instructions, known", &known, " cbpf 2", steering, 0.30)
	row("cbpf, 2 instructions, no cookie", &known, " cbpf 2 unknown", steering, 0)
	row("cbpf, 20 instructions, known", &known, " cbpf 20", steering, 0.20)
	row("cbpf, 20 instructions, no cookie", &known, " cbpf 20 unknown", steering, 0)
	for _, l := range []struct{ what, label string }{
		{"64 flows, table of 8,192", fmt.Sprintf(" flow 64/%d", peerFlows)},
		{"512 flows, table of 8,192", fmt.Sprintf(" flow %d/%d", hotFlows, peerFlows)},
		{"512 flows, table of 65,536 (udpgrm: 8,192)", fmt.Sprintf(" flow %d/%d", hotFlows, flows)},
	} {
		row("flow, known, "+l.what, &known, l.label, steering, 0.40)
		row("    its sendmsg hook", &known, l.label, hook, 0.35)
		row("    packet and answer", &known, l.label, both, 0)
	}
	row("flow, first packet", &first, "", steering, 0)
	row("    its sendmsg hook", &first, "", hook, 0)
	row("    packet and answer", &first, "", both, 1)
	return nil
}

// set is probes by name. All is net of the one without a name.
type set struct {
	names   []string
	probes  []probe
	samples [][]sample
}

func (r *set) add(name string, p probe) {
	r.names, r.probes = append(r.names, name), append(r.probes, p)
}

func (r *set) measure(rounds int) (err error) {
	r.samples, err = measure(rounds, r.probes)
	return err
}

func (r *set) of(name string) []sample { return r.samples[slices.Index(r.names, name)] }

// endToEnd compares what is left of the difference in a whole exchange.
func (b *bench) endToEnd() (err error) {
	var g garage
	defer g.empty(&err)
	type entrant struct {
		name      string
		t         *target
		rate, cpu []float64
	}
	var all []*entrant
	enter := func(name string, s subject, o options) error {
		t, err := g.put(b.group(s, o, 2))
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, &entrant{name: name, t: t})
		return nil
	}
	if err := enter("kernel's own choice", plain{room: &b.room}, options{}); err != nil {
		return err
	}
	if err := enter("empty programs", plain{&b.room, loadEmptyReuseport}, options{hooks: true}); err != nil {
		return err
	}
	for _, k := range []kind{noop, flow, cbpf2, cbpf20} {
		if err := enter("grm "+k.String(), grm{&b.room}, options{k, flows, true}); err != nil {
			return err
		}
		if b.udpgrm != nil {
			if err := enter("udpgrm "+k.String(), b.udpgrm, options{k, flows, true}); err != nil {
				return err
			}
		}
	}
	rounds, n := 15, 1<<14
	if b.short {
		rounds, n = 2, 1<<10
	}
	for range rounds {
		for _, e := range all {
			rate, cpu, err := echo(e.t, n)
			if err != nil {
				return fmt.Errorf("%s: %w", e.name, err)
			}
			e.rate, e.cpu = append(e.rate, rate), append(e.cpu, float64(cpu.Nanoseconds()))
		}
	}
	b.title("End to end: %d clients and an echo server of two threads; median of %d rounds of %d datagrams", echoClients, rounds, n)
	b.row("", "echoes/s", "of the kernel's", "server's CPU ns", "of the kernel's")
	ratio := func(of, base []float64) string {
		each := make([]float64, len(of))
		for i := range of {
			each[i] = of[i] / base[i]
		}
		return fmt.Sprintf("%.2f", median(each))
	}
	for _, e := range all {
		b.row(e.name, median(e.rate), ratio(e.rate, all[0].rate), median(e.cpu), ratio(e.cpu, all[0].cpu))
	}
	return nil
}

// memory is what the kernel accounts to the maps and programs of a group with
// its service.
func (b *bench) memory() (err error) {
	var g garage
	defer g.empty(&err)
	b.title("One group and its service: kernel memory, and instructions that the verifier looks at for the steering program")
	b.row("", "KiB", "verified")
	for _, o := range []options{{noop, 0, true}, {cbpf2, flows, true}, {flow, 4096, true}, {flow, flows, true}, {flow, 1 << 20, true}} {
		t, err := g.put(grm{&b.room}.target(o))
		if err != nil {
			return err
		}
		name := "grm " + o.kind.String()
		if o.kind != noop {
			name += fmt.Sprintf(", %d flows", o.flows)
		}
		if err := b.memoryRow(name, t.system); err != nil {
			return err
		}
	}
	if b.udpgrm != nil {
		return b.memoryRow("udpgrm, the whole host", b.udpgrm.system)
	}
	return nil
}

func (b *bench) memoryRow(name string, s system) error {
	fields, err := s.rx[0].fields()
	b.row(name, float64(s.memory)/1024, float64(fields["verified_insns"]))
	return err
}

// curve is a plot in the making.
type curve struct {
	file, title, x string
	base           probe // what every point is net of
	points         []curvePoint
}

type curvePoint struct {
	series string
	x      int
	probe
}

// run measures all points in turn, prints the curves and draws them. For each
// series it says how much dearer the dearest point is than the cheapest.
func (b *bench) run(c curve) error {
	probes := []probe{c.base}
	var names []string
	var xs []int
	for _, p := range c.points {
		probes = append(probes, p.probe)
		if !slices.Contains(names, p.series) {
			names = append(names, p.series)
		}
		if !slices.Contains(xs, p.x) {
			xs = append(xs, p.x)
		}
	}
	samples, err := measure(b.rounds(), probes)
	if err != nil {
		return err
	}
	type key struct {
		series string
		x      int
		tx     bool
	}
	values := map[key]float64{}
	for i, p := range c.points {
		n := net(samples[i+1], samples[0])
		values[key{p.series, p.x, false}] = n.rx
		if gross(samples[i+1]).tx != 0 {
			values[key{p.series, p.x, true}] = n.tx
		}
	}
	base := gross(samples[0])
	b.title("%s: ns beyond an empty program (%.0f ns, sendmsg %.0f ns); lower quartile of %d rounds of %d packets", c.title, base.rx, base.tx, b.rounds(), roundSize)
	head := []any{""}
	for _, x := range xs {
		head = append(head, compact(float64(x)))
	}
	b.row(append(head, "max/min")...)
	p := plot{title: c.title, x: c.x, y: "ns per packet beyond an empty program"}
	for _, name := range names {
		for _, tx := range []bool{false, true} {
			label, cells := name, []any{}
			if tx {
				label += ", sendmsg"
			}
			s := series{name: label}
			for _, x := range xs {
				v, found := values[key{name, x, tx}]
				if !found {
					cells = append(cells, "-")
					continue
				}
				cells = append(cells, v)
				s.points = append(s.points, point{float64(x), max(v, 0)})
			}
			if len(s.points) == 0 {
				continue
			}
			ys := make([]float64, len(s.points))
			for i, at := range s.points {
				ys[i] = at.y
			}
			b.row(append(append([]any{label}, cells...), fmt.Sprintf("%.2f", slices.Max(ys)/slices.Min(ys)))...)
			p.series = append(p.series, s)
		}
	}
	return b.draw(c.file, p)
}

// emptyProbe is what curves are net of.
func (b *bench) emptyProbe(g *garage) (probe, error) {
	t, err := g.put(b.group(plain{&b.room, loadEmptyReuseport}, options{hooks: true}, 4))
	if err != nil {
		return probe{}, err
	}
	clients := b.newClients(hotFlows)
	return b.talk("empty", t, func() []client { return b.some(clients, roundSize) }, nil, true), nil
}

// contender is a system under test.
type contender struct {
	name string
	subject
}

// systems are grm and, if it is there, udpgrm.
func (b *bench) systems() []contender {
	all := []contender{{"grm", grm{&b.room}}}
	if b.udpgrm != nil {
		all = append(all, contender{"udpgrm", b.udpgrm})
	}
	return all
}

// to are the powers of two from 1 to n, or just both ends.
func (b *bench) to(n int) []int {
	if b.short {
		return []int{1, min(n, 8)}
	}
	var all []int
	for x := 1; x < n; x *= 2 {
		all = append(all, x)
	}
	return append(all, n)
}

func (b *bench) socketCurve() (err error) {
	var g garage
	defer g.empty(&err)
	c := curve{file: "sockets.svg", title: "Sockets of a generation", x: "sockets"}
	if c.base, err = b.emptyProbe(&g); err != nil {
		return err
	}
	for _, s := range b.systems() {
		for _, k := range []kind{noop, flow} {
			for _, n := range b.to(256) {
				label := s.name + " " + k.String()
				t, err := g.put(b.group(s, options{k, flows, k == flow}, n))
				if err != nil {
					return fmt.Errorf("%s with %d sockets: %w", label, n, err)
				}
				clients := b.newClients(hotFlows)
				if k == flow {
					if err := b.establish(t, clients); err != nil {
						return fmt.Errorf("%s with %d sockets: %w", label, n, err)
					}
				}
				p := b.talk(label, t, func() []client { return b.some(clients, roundSize) }, nil, false)
				c.points = append(c.points, curvePoint{label, n, p})
			}
		}
	}
	return b.run(c)
}

func (b *bench) generationCurve() (err error) {
	var g garage
	defer g.empty(&err)
	c := curve{file: "generations.svg", title: "Generations alive, each with its share of 512 flows", x: "generations"}
	if c.base, err = b.emptyProbe(&g); err != nil {
		return err
	}
	for _, s := range b.systems() {
		for _, n := range b.to(32) {
			t, err := g.put(s.target(options{flow, flows, true}))
			if err != nil {
				return err
			}
			clients := b.newClients(hotFlows)
			for i := range n {
				if err := t.advance(4); err != nil {
					return fmt.Errorf("%s: generation %d of %d: %w", s.name, i+1, n, err)
				}
				share := clients[i*len(clients)/n : (i+1)*len(clients)/n]
				if err := b.establish(t, share); err != nil {
					return fmt.Errorf("%s: generation %d of %d: %w", s.name, i+1, n, err)
				}
			}
			known := func() []client { return b.some(clients, roundSize) }
			fresh := func() []client { return b.newClients(roundSize) }
			c.points = append(c.points,
				curvePoint{s.name + " known", n, b.talk(s.name, t, known, nil, false)},
				curvePoint{s.name + " new", n, b.talk(s.name, t, fresh, nil, false)})
		}
	}
	return b.run(c)
}

func (b *bench) flowCurve() (err error) {
	var g garage
	defer g.empty(&err)
	c := curve{file: "flows.svg", title: "Flows in the table", x: "flows"}
	if c.base, err = b.emptyProbe(&g); err != nil {
		return err
	}
	sizes := []int{1_000, 10_000, 100_000, 1_000_000, 4_000_000}
	if b.short {
		sizes = sizes[:2]
	}
	for _, n := range sizes {
		clients := b.newClients(n)
		known := func() []client { return b.some(clients, roundSize) }

		// grm's table, with the clients as flows known for certain.
		t, err := g.put(b.group(grm{&b.room}, options{flow, max(flows, n), true}, 4))
		if err != nil {
			return err
		}
		if err := b.establish(t, clients); err != nil {
			return fmt.Errorf("%d flows: %w", n, err)
		}
		c.points = append(c.points,
			curvePoint{"grm known", n, b.talk("grm", t, known, nil, true)},
			curvePoint{"grm new", n, b.talk("grm", t, func() []client { return b.newClients(roundSize) }, nil, false)})

		// A plain map of the kernel with the same clients, for comparison.
		load := func(int) (int, error) { return loadLookUp(clients) }
		t, err = g.put(b.group(plain{&b.room, load}, options{}, 4))
		if err != nil {
			return err
		}
		c.points = append(c.points, curvePoint{"LRU look-up alone", n, b.talk("LRU", t, known, nil, false)})

		if b.udpgrm != nil && n <= 4_096 { // its table holds 8,192 flows of the whole host
			t, err := g.put(b.group(b.udpgrm, options{flow, flows, true}, 4))
			if err != nil {
				return err
			}
			if err := b.establish(t, clients); err != nil {
				return fmt.Errorf("udpgrm, %d flows: %w", n, err)
			}
			c.points = append(c.points, curvePoint{"udpgrm known", n, b.talk("udpgrm", t, known, nil, true)})
		}
	}
	return b.run(c)
}

// groupCurve goes to 100 groups and no further: freeing about 1,000 programs
// at once locks up some kernels (bpf_prog_pack_free).
func (b *bench) groupCurve() (err error) {
	var g garage
	defer g.empty(&err)
	c := curve{file: "groups.svg", title: "Groups, with traffic to all of them", x: "groups"}
	if c.base, err = b.emptyProbe(&g); err != nil {
		return err
	}
	for _, s := range b.systems() {
		var groups []*target
		clients := b.newClients(batch)
		for _, n := range b.to(100) {
			for len(groups) < n {
				t, err := g.put(b.group(s, options{flow, 1024, false}, 1))
				if err != nil {
					return fmt.Errorf("%s: group %d: %w", s.name, len(groups)+1, err)
				}
				groups = append(groups, t)
			}
			used := slices.Clone(groups)
			p := probe{name: s.name, run: func() error {
				for i := range roundSize {
					t := used[i%len(used)]
					if err := b.exchange(t.port, b.some(clients, 1), nil, t.sockets, false); err != nil {
						return err
					}
				}
				return nil
			}}
			for _, t := range used {
				for _, o := range t.rx {
					if !slices.Contains(p.rx, o) {
						p.rx = append(p.rx, o)
					}
				}
			}
			c.points = append(c.points, curvePoint{s.name, n, p})
		}
	}
	return b.run(c)
}
