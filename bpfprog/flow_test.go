package bpfprog

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"grm/internal/flowtable"
)

func TestFlowStaysOverFlips(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5001", "0.0.0.0:5001", "[::1]:5001", "[::]:5001"} {
		t.Run(address, func(t *testing.T) {
			r := newHookedRig(t, flowSpec(address))
			serve(r.generation(0, 1, 2), "one")
			r.ctl.Flip(0)
			old := dial(t, r.reach())
			for range 4 {
				want(t, "old flow", ask(t, old), "one")
			}
			serve(r.generation(1, 2, 2), "two")
			want(t, "old flow, new one prepared", ask(t, old), "one")
			want(t, "new flow, new one prepared", ask(t, dial(t, r.reach())), "one")
			r.ctl.Flip(1)
			want(t, "old flow after the flip", ask(t, old), "one")
			want(t, "new flow after the flip", ask(t, dial(t, r.reach())), "two")

			fd, ok := r.FlowsFD()
			want(t, "has flows", ok, true)
			want(t, "assured flows", must(flowtable.Count(fd))(t)[0], 1)
			stats := r.ctl.Stats(0)
			want(t, "packets", stats.Packets, 7)
			want(t, "new flows", stats.NewFlows, 2)
			want(t, "assured", stats.Assured, 1)

			r.ctl.Withdraw(0)
			want(t, "old flow after its bank died", ask(t, old), "two")
			want(t, "stale flows", must(r.Counters())(t)[StaleFlow], 1)
		})
	}
}

// reach is where a client reaches the group.
func (r *rig) reach() netip.AddrPort {
	a := r.Spec.Address
	if a.Addr().IsUnspecified() {
		if a.Addr().Is4() {
			return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port())
		}
		return netip.AddrPortFrom(netip.IPv6Loopback(), a.Port())
	}
	return a
}

func TestDualStackSharesOneTable(t *testing.T) {
	spec := flowSpec("[::]:5001")
	spec.DualStack = true
	r := newHookedRig(t, spec)
	serve(r.generation(0, 1, 1), "one")
	r.ctl.Flip(0)
	four, six := dial(t, addr("127.0.0.1:5001")), dial(t, addr("[::1]:5001"))
	for range 3 {
		ask(t, four)
		ask(t, six)
	}
	serve(r.generation(1, 2, 1), "two")
	r.ctl.Flip(1)
	want(t, "IPv4 flow", ask(t, four), "one")
	want(t, "IPv6 flow", ask(t, six), "one")
	remotes := map[netip.AddrPort]bool{}
	check(t, r.Flows(func(e FlowEntry) bool { remotes[e.Remote] = e.Assured; return true }))
	for _, c := range []*net.UDPConn{four, six} {
		local := c.LocalAddr().(*net.UDPAddr).AddrPort()
		want(t, "assured "+local.String(), remotes[local], true)
	}
}

func TestFirstPacketsStayTogether(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	r.generation(0, 1, 1) // never answers
	serve(r.generation(1, 2, 1), "two")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	send(t, c, "first")
	r.ctl.Flip(1)
	send(t, c, "second")
	want(t, "packets at the first generation", r.ctl.Stats(0).Packets, 2)
	want(t, "new flow", ask(t, dial(t, r.Spec.Address)), "two")
}

func send(t *testing.T, c *net.UDPConn, text string) {
	t.Helper()
	must(c.Write([]byte(text)))(t)
}

func TestAssurePolicies(t *testing.T) {
	for _, c := range []struct {
		assure  Assure
		answer  bool
		packets int
		assured bool
	}{
		{Reply, true, 1, false},
		{Reply, true, 2, true},
		{Reply, false, 3, false},
		{Packet, false, 1, false},
		{Packet, false, 2, true},
		{Explicit, true, 4, false},
	} {
		t.Run(fmt.Sprintf("%s, answered %v, %d packets", c.assure, c.answer, c.packets), func(t *testing.T) {
			spec := flowSpec("127.0.0.1:5001")
			spec.Dissector.Assure = c.assure
			r := newHookedRig(t, spec)
			conns := r.generation(0, 1, 1)
			r.ctl.Flip(0)
			client := dial(t, r.Spec.Address)
			if c.answer {
				serve(conns, "one")
			}
			for range c.packets {
				if c.answer {
					ask(t, client)
				} else {
					send(t, client, "hello")
				}
			}
			n := 0
			check(t, r.Flows(func(e FlowEntry) bool {
				n++
				want(t, "assured", e.Assured, c.assured)
				want(t, "packets", e.Packets, min(c.packets, 3))
				return true
			}))
			want(t, "flows", n, 1)
		})
	}
}

func TestFlowsExpire(t *testing.T) {
	spec := flowSpec("127.0.0.1:5001")
	spec.Dissector.Timeout = time.Second
	r := newHookedRig(t, spec)
	serve(r.generation(0, 1, 1), "one")
	serve(r.generation(1, 2, 1), "two")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	for range 3 {
		ask(t, c)
	}
	r.ctl.Flip(1)
	fd, _ := r.FlowsFD()
	eventually(t, "the flow expires", func() bool { return must(flowtable.Count(fd))(t)[0] == 0 })
	want(t, "expired flow", ask(t, c), "two")
	n := 0
	check(t, r.Flows(func(FlowEntry) bool { n++; return true }))
	want(t, "the same entry is used again", n, 1)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

func TestDeadSlots(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	conns := r.generation(0, 1, 4)
	serve(conns, "one")
	r.ctl.Flip(0)
	var flows []*net.UDPConn
	for range 32 {
		c := dial(t, r.Spec.Address)
		for range 2 {
			ask(t, c)
		}
		flows = append(flows, c)
	}
	serve(r.generation(1, 2, 1), "two")
	r.ctl.Flip(1)
	for i, c := range conns[:3] {
		check(t, c.Close())
		for _, f := range flows {
			want(t, fmt.Sprintf("flow after %d of 4 sockets closed", i+1), ask(t, f), "one")
		}
	}
	if r.ctl.Stats(0).OtherSlot == 0 {
		t.Error("no packet was counted as given to another slot")
	}
	slots := must(r.Slots(0, 0))(t)
	for i, cookie := range slots {
		want(t, fmt.Sprintf("slot %d is full", i), cookie != 0, i == 3)
	}
	check(t, conns[3].Close())
	for _, f := range flows {
		want(t, "flow of a bank without sockets", ask(t, f), "two")
	}
}

func TestManyDeadSlotsOfALargeBank(t *testing.T) {
	r := newRig(t, noopSpec("127.0.0.1:5001"))
	conns := r.generation(0, 1, 64)
	serve(conns, "one")
	r.ctl.Flip(0)
	for i, c := range conns {
		if i%2 == 0 {
			check(t, c.Close())
		}
	}
	for range 64 {
		want(t, "packet", ask(t, dial(t, r.Spec.Address)), "one")
	}
}

func TestFallback(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	banks := [][]*net.UDPConn{}
	for b := range 4 {
		conns := r.generation(b, uint64(b+1), 2)
		serve(conns, fmt.Sprint(b))
		banks = append(banks, conns)
		r.ctl.Flip(b)
	}
	for b := 3; b >= 0; b-- {
		want(t, "new flow goes to the newest bank that lives", ask(t, dial(t, r.Spec.Address)), fmt.Sprint(b))
		for _, c := range banks[b] {
			check(t, c.Close())
		}
	}
	// No socket is left in a slot, but one in the group: it must not get what nobody selects.
	other := r.bind()
	defer other.Close()
	check(t, r.Attach(fd(t, other)))
	before := must(r.Counters())(t)[DroppedNoSocket]
	send(t, dial(t, r.Spec.Address), "lost")
	eventually(t, "the packet is counted", func() bool { return must(r.Counters())(t)[DroppedNoSocket] == before+1 })
	check(t, other.SetReadDeadline(time.Now()))
	if n, _, err := other.ReadFromUDPAddrPort(make([]byte, 10)); err == nil {
		t.Fatalf("a socket outside of all banks got %d bytes", n)
	}
	want(t, "fell back", r.ctl.Stats(2).FellBack, 1)
}

func TestClosing(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 1), "one")
	r.ctl.Flip(0)
	old := dial(t, r.Spec.Address)
	ask(t, old)
	r.ctl.SetClosing(true)
	want(t, "known flow while closing", ask(t, old), "one")
	send(t, dial(t, r.Spec.Address), "refused")
	eventually(t, "the new flow is counted", func() bool { return must(r.Counters())(t)[DroppedClosing] == 1 })
	r.ctl.SetClosing(false)
	want(t, "new flow after closing", ask(t, dial(t, r.Spec.Address)), "one")
}

// A bank that is given away again must not get what belongs to the one before.
func TestBankIsReused(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	first := r.generation(0, 1, 1)
	serve(first, "one")
	serve(r.generation(1, 2, 1), "two")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	for range 3 {
		ask(t, c)
	}
	r.ctl.Flip(1)
	r.ctl.Withdraw(0)
	if err := r.SetBank(0, 0, 3, 1); err == nil {
		t.Error("a bank that holds a generation was given away")
	}
	check(t, r.Clear(0, 0))
	check(t, first[0].Close())
	serve(r.generation(0, 3, 1), "three")
	want(t, "order", fmt.Sprint(r.ctl.Order().Banks()), "[1]")
	r.ctl.Flip(0)
	r.ctl.Flip(1)
	fd, _ := r.FlowsFD()
	want(t, "flows of the bank's new generation", must(flowtable.Count(fd))(t)[0], 0)
	want(t, "flow of the bank's old generation", ask(t, c), "two")
}

func TestNoopFlips(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5002", "[::1]:5002"} {
		r := newRig(t, noopSpec(address))
		serve(r.generation(0, 1, 2), "one")
		r.ctl.Flip(0)
		c := dial(t, r.Spec.Address)
		want(t, "before", ask(t, c), "one")
		serve(r.generation(1, 2, 2), "two")
		want(t, "prepared", ask(t, c), "one")
		r.ctl.Flip(1)
		want(t, "after", ask(t, c), "two")
		r.ctl.Withdraw(1)
		want(t, "flipped back", ask(t, c), "one")
	}
}
