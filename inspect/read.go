package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"grm/bpfprog"
	"grm/config"
	"grm/control"
	"grm/internal/proc"
	"grm/internal/state"
)

// Read reports what there is in this network namespace.
func Read() (Report, error) {
	r := reader{report: Report{Time: time.Now(), Services: []Service{}, Groups: []Group{}}}
	pinned, err := bpfprog.Services()
	switch {
	case err == nil, errors.Is(err, fs.ErrNotExist):
		r.report.Complete = true
	case !errors.Is(err, fs.ErrPermission):
		return Report{}, fmt.Errorf("list services: %w", err)
	}
	recorded, err := stateNames(state.Root)
	if err != nil {
		r.problem("what root has recorded cannot be read: %v", err)
	}
	names := append(pinned, recorded...)
	slices.Sort(names)
	all := []*facts{}
	for _, name := range slices.Compact(names) {
		all = append(all, r.service(name, slices.Contains(pinned, name)))
	}
	if r.report.Complete {
		if err := r.groups(all); err != nil {
			return Report{}, err
		}
	}
	for _, f := range all {
		r.report.Services = append(r.report.Services, f.service())
	}
	return r.report, nil
}

type reader struct{ report Report }

func (r *reader) problem(format string, args ...any) {
	r.report.Problems = append(r.report.Problems, fmt.Sprintf(format, args...))
}

// stateNames lists the services that root has recorded.
func stateNames(root string) ([]string, error) {
	entries, err := os.ReadDir(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && config.CheckName(e.Name()) == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// service reads root's record of a service, and its control map if it is pinned here.
func (r *reader) service(name string, pinned bool) *facts {
	f := &facts{name: name, slots: map[string][control.Banks][]uint64{}, inodes: map[string][control.Banks][]uint64{}, wall: r.report.Time, now: control.Now()}
	f.process = func(pid int) *Process { return findProcess(pid, f.unit) }
	if s, err := state.Read(state.Root, name); err == nil {
		f.record(s)
	} else if !pinned || !errors.Is(err, fs.ErrNotExist) {
		r.problem("service %s: %v", name, err)
	}
	if !pinned {
		if r.report.Complete {
			r.problem("service %s has nothing pinned in this network namespace: it runs in another one, or this is a remnant (grm delete %s)", name, name)
			f.control = &words{}
		}
		return f
	}
	s, err := bpfprog.OpenService(name)
	if err != nil {
		r.problem("service %s: %v", name, err)
		return f
	}
	f.control = readWords(s.Control())
	f.open = f.openSockets()
	if err := s.Close(); err != nil {
		r.problem("service %s: %v", name, err)
	}
	return f
}

// record takes over what root has recorded.
func (f *facts) record(s *state.State) {
	f.unit, f.user = s.Unit, s.User
	if s.Failed != nil {
		f.failed = &Failed{Generation: s.Failed.Generation, Reason: s.Failed.Reason, At: s.Failed.At}
	}
	banks := []state.Bank{}
	for _, b := range s.Banks {
		banks = append(banks, b)
	}
	slices.SortFunc(banks, func(a, b state.Bank) int { return cmp.Compare(b.Generation, a.Generation) })
	for _, b := range banks {
		rec := recorded{number: b.Generation, bank: b.Bank, sockets: []Sockets{}}
		for _, l := range b.Listeners {
			rec.sockets = append(rec.sockets, Sockets{Listener: l.Name, Count: len(l.Inodes)})
			if b.Bank >= 0 && b.Bank < control.Banks {
				inodes := f.inodes[l.Name]
				inodes[b.Bank] = l.Inodes
				f.inodes[l.Name] = inodes
			}
			if slices.ContainsFunc(f.listeners, func(have Listener) bool { return have.Name == l.Name }) {
				continue // a newer generation's
			}
			f.listeners = append(f.listeners, listener(l))
		}
		f.recorded = append(f.recorded, rec)
	}
}

// listener reads the text form in which root has recorded a listener.
func listener(l state.Listener) Listener {
	parsed, err := config.ParseListener(l.Address, config.DefaultListener())
	if err != nil {
		return Listener{Name: l.Name, Address: l.Address}
	}
	address := parsed.Address.String()
	return Listener{Name: l.Name, Address: address, Group: address, App: parsed.App}
}

// Runs says whether pid is a process of the unit; of any, if there is no unit.
func Runs(pid int, unit string) bool {
	if pid <= 0 {
		return false
	}
	cgroup, err := proc.Of(pid)
	return err == nil && (unit == "" || cgroup.Unit() == unit)
}

func findProcess(pid int, unit string) *Process {
	if pid <= 0 {
		return nil
	}
	p := &Process{PID: pid, Running: Runs(pid, unit)}
	if p.Running {
		p.Command = proc.Comm(pid)
	}
	return p
}

// openSockets are those that processes of the unit have open, but for the
// keepers and decoys, which have all; nil if that cannot be said.
func (f *facts) openSockets() map[uint64]bool {
	i := slices.IndexFunc(f.control.banks[:], func(b control.Bank) bool { return Runs(b.Server, f.unit) })
	if i < 0 {
		return nil
	}
	// All servers of a unit are in its one cgroup.
	cgroup, err := proc.Of(f.control.banks[i].Server)
	if err != nil {
		return nil
	}
	pids, err := cgroup.Pids()
	if err != nil {
		return nil
	}
	open := map[uint64]bool{}
	for _, pid := range pids {
		if comm := proc.Comm(pid); comm == "grm-keeper" || comm == "grm-decoy" {
			continue
		}
		inodes, err := proc.SocketInodes(pid)
		if err != nil {
			return nil
		}
		for _, inode := range inodes {
			open[inode] = true
		}
	}
	return open
}

// groups reads all groups, and tells the services what is theirs in them.
func (r *reader) groups(all []*facts) error {
	keys, err := bpfprog.Groups()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list groups: %w", err)
	}
	for _, key := range keys {
		g, err := bpfprog.OpenGroup(key.Network, key.Address)
		if err != nil {
			r.problem("group %s: %v", key.String(), err)
			continue
		}
		if err := errors.Join(r.group(g, all), g.Close()); err != nil {
			r.problem("group %s: %v", key.String(), err)
		}
	}
	return nil
}

func (r *reader) group(g *bpfprog.Group, all []*facts) error {
	spec := g.Spec
	out := Group{
		Name:      g.Key().String(),
		DualStack: spec.DualStack,
		Dissector: spec.Dissector.Kind.String(),
		MaxApps:   spec.MaxApps,
		TableSize: int(spec.Dissector.Flows),
		Services:  []string{},
		Counters:  map[string]uint64{},
	}
	apps := map[int]*facts{}
	for _, f := range all {
		for _, l := range f.listeners {
			if l.Group != out.Name || f.control == nil {
				continue
			}
			apps[l.App] = f
			out.Services = append(out.Services, f.name)
			if err := f.readSlots(g, l); err != nil {
				return err
			}
		}
	}
	counters, err := g.Counters()
	if err != nil {
		return err
	}
	for c, value := range counters {
		out.Counters[bpfprog.Counter(c).String()] = value
	}
	err = g.Flows(func(flow bpfprog.FlowEntry) bool {
		out.Flows++
		if !flow.Assured {
			return true
		}
		out.Assured++
		if f := apps[flow.App]; f != nil && flow.Bank < control.Banks {
			f.flows[flow.Bank]++
		}
		return true
	})
	r.report.Groups = append(r.report.Groups, out)
	return err
}

// readSlots reads which of the listener's sockets are in their slots.
func (f *facts) readSlots(g *bpfprog.Group, l Listener) error {
	var banks [control.Banks][]uint64
	for b := range control.Banks {
		if f.control.banks[b].State == control.Free {
			continue
		}
		cookies, err := g.Slots(l.App, b)
		if err != nil {
			return err
		}
		banks[b] = cookies
	}
	f.slots[l.Name] = banks
	return nil
}

// Flow is one flow that a group knows.
type Flow struct {
	Remote     string  `json:"remote"`
	Group      string  `json:"group"`
	Service    string  `json:"service,omitempty"`
	Generation uint64  `json:"generation,omitempty"`
	Socket     int     `json:"socket"`
	Assured    bool    `json:"assured"`
	Idle       Seconds `json:"idle_seconds"`
}

// Flows gives every flow of every group to yield, until that says no.
func Flows(yield func(Flow) bool) error {
	report, err := Read()
	if err != nil {
		return err
	}
	if !report.Complete {
		return fmt.Errorf("read the flow tables: %w", fs.ErrPermission)
	}
	keys, err := bpfprog.Groups()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list groups: %w", err)
	}
	goOn := true
	for _, key := range keys {
		name := key.String()
		g, err := bpfprog.OpenGroup(key.Network, key.Address)
		if err != nil {
			return fmt.Errorf("group %s: %w", name, err)
		}
		owners := report.owners(name)
		err = g.Flows(func(e bpfprog.FlowEntry) bool {
			o := owners[place{e.App, e.Bank}]
			goOn = yield(Flow{
				Remote: e.Remote.String(), Group: name, Service: o.service, Generation: o.generation,
				Socket: e.Slot, Assured: e.Assured, Idle: Seconds(e.Idle),
			})
			return goOn
		})
		if err := errors.Join(err, g.Close()); err != nil {
			return fmt.Errorf("group %s: %w", name, err)
		}
		if !goOn {
			break
		}
	}
	return nil
}

type place struct{ app, bank int }

type owner struct {
	service    string
	generation uint64
}

// owners says whose the places of a group are.
func (r Report) owners(group string) map[place]owner {
	owners := map[place]owner{}
	for _, s := range r.Services {
		for _, l := range s.Listeners {
			if l.Group != group {
				continue
			}
			for _, g := range s.Generations {
				owners[place{l.App, g.Bank}] = owner{s.Name, g.Number}
			}
		}
	}
	return owners
}
