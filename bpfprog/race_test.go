package bpfprog

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"grm/internal/testenv"
)

// Two packets of each flow come from two CPUs in lock-step, with flips in between: first of
// flows that are new, then of all of them anew, after their generations have died. No flow gets
// two entries, and both packets go to the same generation.
func TestInsertRace(t *testing.T) {
	needRoot(t)
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	const perRound = 48
	flows := testenv.Scale(60_000)
	spec := flowSpec("127.0.0.1:5001")
	spec.Dissector.Flows = 65536
	r := newRig(t, spec)
	var sinks []*sink
	for b := range 4 {
		sinks = append(sinks, newSink(fd(t, r.generation(b, uint64(b+1), 1)[0])))
	}
	var turn [2]atomic.Int64
	sender := func(cpu int, s *spoofer, from, to, bank int) error {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("pin to CPU %d: %w", cpu, err)
		}
		for i := from; i < to; i++ {
			turn[cpu].Add(1)
			for spins := 0; turn[1-cpu].Load() < turn[cpu].Load(); spins++ {
				if spins > 1<<12 {
					runtime.Gosched()
				}
			}
			if err := s.add(known+uint32(i), 9, uint64(i)<<1|uint64(cpu)); err != nil {
				return err
			}
			if err := s.flush(); err != nil {
				return err
			}
			if cpu == 0 && i%16 == 0 {
				r.ctl.Flip(bank + i/16%2)
			}
		}
		return nil
	}
	type job struct{ from, to, bank int }
	jobs := [2]chan job{make(chan job), make(chan job)}
	done := make(chan error)
	for cpu := range 2 {
		s := newSpoofer(t, spec.Address)
		defer close(jobs[cpu])
		go func() {
			runtime.LockOSThread() // for good: its affinity dies with it
			for j := range jobs[cpu] {
				done <- sender(cpu, s, j.from, j.to, j.bank)
			}
		}()
	}
	for _, bank := range []int{0, 2} {
		r.ctl.Flip(bank)
		for old := range bank {
			r.ctl.Withdraw(old)
		}
		before := must(r.Counters())(t)[InsertRace]
		at := make([][2]int8, flows) // 1 + the bank that each of a flow's packets went to
		for from := 0; from < flows; from += perRound {
			for cpu := range 2 {
				jobs[cpu] <- job{from, min(from+perRound, flows), bank}
			}
			check(t, <-done)
			check(t, <-done)
			for b, s := range sinks {
				must(s.drain(false, func(_ uint32, _ uint16, word uint64) { at[word>>1][word&1] = int8(1 + b) }))(t)
			}
		}
		lost, split := 0, 0
		for _, a := range at {
			if a[0] == 0 || a[1] == 0 {
				lost++
			} else if a[0] != a[1] {
				split++
			}
		}
		want(t, "flows with a packet that did not arrive", lost, 0)
		want(t, "flows with packets at two generations", split, 0)
		seen := map[netip.AddrPort]bool{}
		double := 0
		check(t, r.Flows(func(e FlowEntry) bool {
			if seen[e.Remote] {
				double++
			}
			seen[e.Remote] = true
			return true
		}))
		want(t, "flows with two entries", double, 0)
		met := must(r.Counters())(t)[InsertRace] - before
		t.Logf("from bank %d on: %d of %d insertions met another of their key; %d flows in the table", bank, met, flows, len(seen))
		if met == 0 && bank == 0 && flows == testenv.Scale(flows) { // an emulated machine's CPUs rarely meet
			t.Error("no two insertions ever met: this run has proven nothing")
		}
	}
}
