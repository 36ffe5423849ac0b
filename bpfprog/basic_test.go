package bpfprog

import (
	"testing"
)

func TestFlowStays(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 2), "one")
	r.ctl.Flip(0)
	old := dial(t, r.Spec.Address)
	for range 4 {
		want(t, "old flow", ask(t, old), "one")
	}
	serve(r.generation(1, 2, 2), "two")
	want(t, "old flow, new one prepared", ask(t, old), "one")
	want(t, "new flow, new one prepared", ask(t, dial(t, r.Spec.Address)), "one")
	r.ctl.Flip(1)
	want(t, "old flow after the flip", ask(t, old), "one")
	want(t, "new flow after the flip", ask(t, dial(t, r.Spec.Address)), "two")
	n := 0
	check(t, r.Flows(func(e FlowEntry) bool { t.Logf("%+v", e); n++; return true }))
	want(t, "flows", n, 3)
	r.ctl.Withdraw(0)
	want(t, "old flow after its bank died", ask(t, old), "two")
	c := must(r.Counters())(t)
	for i, v := range c {
		t.Log(Counter(i), v)
	}
	t.Logf("%+v", r.ctl.Stats(0))
	t.Logf("%+v", r.ctl.Stats(1))
}

func TestNoopFlips(t *testing.T) {
	r := newRig(t, noopSpec("[::1]:5002"))
	serve(r.generation(0, 1, 2), "one")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	want(t, "before", ask(t, c), "one")
	serve(r.generation(1, 2, 2), "two")
	r.ctl.Flip(1)
	want(t, "after", ask(t, c), "two")
}
