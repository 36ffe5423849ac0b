package bpfprog

import (
	"math/rand/v2"
	"net"
	"testing"

	"grm/control"
)

// TestOneOfManyLives: whatever part of a bank's 256 sockets is closed, no packet
// leaves the bank while one of them lives, neither of a new flow nor of one
// whose own socket is gone; and all do when none does.
func TestOneOfManyLives(t *testing.T) {
	for _, spec := range []GroupSpec{noopSpec("127.0.0.1:5001"), flowSpec("[::1]:5001")} {
		t.Run(spec.Dissector.Kind.String(), func(t *testing.T) {
			r := newRig(t, spec)
			serve(r.generation(0, 1, 3), "old")
			working := r.generation(1, 2, control.Slots)
			serve(working, "working")
			r.ctl.Flip(0)
			r.ctl.Flip(1)
			var flows []*net.UDPConn
			for range 30 {
				flows = append(flows, dial(t, r.reach()))
			}
			order := rand.Perm(control.Slots)
			sent := uint64(0)
			for _, left := range []int{256, 128, 9, 5, 1} {
				for _, i := range order[left:] {
					_ = working[i].Close() // some were closed before
				}
				for _, c := range flows {
					want(t, "known flow", ask(t, c), "working")
				}
				for range 30 {
					want(t, "new flow", ask(t, dial(t, r.reach())), "working")
				}
				sent += 60
				want(t, "packets of the working generation", r.ctl.Stats(1).Packets, sent)
				want(t, "packets of the old one", r.ctl.Stats(0).Packets, 0)
			}
			check(t, working[order[0]].Close())
			for _, c := range flows {
				want(t, "flow of nobody", ask(t, c), "old")
			}
			want(t, "packets of the working generation", r.ctl.Stats(1).Packets, sent)
			want(t, "packets of the old one", r.ctl.Stats(0).Packets, 30)
			want(t, "of them, for lack of a newer one", r.ctl.Stats(0).FellBack, 30)
		})
	}
}
