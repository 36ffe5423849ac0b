package bpfprog

import (
	"testing"
	"time"

	"grm/internal/testenv"
)

const (
	known   = 0xac100000 // 172.16.0.0: sources of the assured flows
	strange = 0x0a000000 // 10.0.0.0: sources of the flood
	honest  = 0xc0a80000 // 192.168.0.0: new clients meanwhile
)

// flood is a group with assured flows at bank 0, and bank 1 working.
type flood struct {
	*rig
	*spoofer
	old, young *sink
	assured    int
}

func newFlood(t *testing.T, flows uint32, assured int) *flood {
	spec := flowSpec("127.0.0.1:5001")
	spec.Dissector.Flows = flows
	r := newHookedRig(t, spec)
	f := &flood{rig: r, spoofer: newSpoofer(t, spec.Address), assured: assured}
	f.old = newSink(fd(t, r.generation(0, 1, 1)[0]))
	f.young = newSink(fd(t, r.generation(1, 2, 1)[0]))
	r.ctl.Flip(0)
	for range 3 {
		got := 0
		f.send(assured, func(i int) (uint32, uint16) { return known + uint32(i), 7 }, func(sent int) {
			old, _ := f.take(sent, true)
			got += old
		})
		want(t, "packets of the flows to be assured", got, assured)
	}
	r.ctl.Flip(1)
	return f
}

// send sends n packets, and calls drain after each batch with how many it had.
func (f *flood) send(n int, source func(i int) (uint32, uint16), drain func(sent int)) {
	sent := 0
	for i := range n {
		address, port := source(i)
		check(f.t, f.add(address, port, uint64(i)))
		if sent++; f.n == 0 {
			drain(sent)
			sent = 0
		}
	}
	check(f.t, f.flush())
	drain(sent)
}

// take receives n packets at either generation. They are there already, unless
// a busy kernel has left some to its own thread; those that do not come in time
// are missing in the sum.
func (f *flood) take(n int, answer bool) (old, young int) {
	f.t.Helper()
	for end := time.Now().Add(patience); ; {
		old += must(f.old.drain(answer, nil))(f.t)
		young += must(f.young.drain(answer, nil))(f.t)
		if old+young >= n || time.Now().After(end) {
			return old, young
		}
	}
}

// verify sends one packet of each assured flow: all must arrive at the old generation.
func (f *flood) verify(what string) {
	f.t.Helper()
	old, young := 0, 0
	must(f.old.drain(false, nil))(f.t)
	f.send(f.assured, func(i int) (uint32, uint16) { return known + uint32(i), 7 }, func(sent int) {
		atOld, atYoung := f.take(sent, true)
		old += atOld
		young += atYoung
	})
	if old != f.assured || young != 0 {
		f.t.Errorf("%s: of %d assured flows %d are at their generation, and %d moved", what, f.assured, old, young)
	}
	n := 0
	check(f.t, f.Flows(func(e FlowEntry) bool {
		if e.Assured && e.Bank == 0 && e.Remote.Port() == 7 {
			n++
		}
		return true
	}))
	want(f.t, what+": assured flows in the table", n, f.assured)
}

// Nothing that strangers send moves or evicts an assured flow: 50,000 of them in a table
// for 65,536, two million sources with one packet each, and one million that come back.
func TestFloodMovesNothing(t *testing.T) {
	needRoot(t)
	assured := testenv.Scale(50_000)
	f := newFlood(t, 65536, assured)
	clients := newSpoofer(t, f.Spec.Address)
	f.verify("before")
	for round, c := range []struct {
		name             string
		sources, packets int
		answer           bool
	}{
		{"one packet, not answered", 1_000_000, 1, false},
		{"one packet, answered", 1_000_000, 1, true},
		{"two packets, answered", 1_000_000, 2, true},
	} {
		c.sources = testenv.Scale(c.sources)
		before := must(f.Counters())(t)
		got, batches, fromClients := 0, 0, 0
		// A source's packets are a batch apart, so that it is answered before it comes back.
		f.send(c.sources*c.packets, func(i int) (uint32, uint16) {
			source := i/(batch*c.packets)*batch + i%batch
			return strange + uint32(source), uint16(1024 + round)
		}, func(sent int) {
			old, young := f.take(sent, c.answer)
			got += old + young
			// An honest client a batch, that sends three packets, five batches apart.
			sent = 0
			for client := batches; client >= 0 && client > batches-15; client -= 5 {
				check(t, clients.add(honest+uint32(client), uint16(1024+round), 0))
				sent++
			}
			check(t, clients.flush())
			old, young = f.take(sent, true)
			got += old + young
			fromClients += sent
			// Control works meanwhile: flips there and back, and a look at the flows.
			if batches++; batches%1000 == 0 {
				f.ctl.Flip(batches / 1000 % 2)
				seen := 0
				check(t, f.Flows(func(FlowEntry) bool { seen++; return seen < 100 }))
				want(t, "flows that can be listed meanwhile", seen, 100)
			}
		})
		want(t, c.name+": packets that arrived", got, c.sources*c.packets+fromClients)
		f.ctl.Flip(1)
		kept := 0
		check(t, f.Flows(func(e FlowEntry) bool {
			if e.Remote.Addr().As4()[0] == honest>>24 && e.Remote.Port() == uint16(1024+round) && e.Assured {
				kept++
			}
			return true
		}))
		f.verify(c.name)
		t.Logf("%s: of %d new clients meanwhile %d became assured", c.name, batches, kept)
		n := must(f.Counters())(t)
		for i := range n {
			if n[i] -= before[i]; n[i] != 0 {
				t.Logf("%s: %s %d", c.name, Counter(i), n[i])
			}
		}
	}
}
