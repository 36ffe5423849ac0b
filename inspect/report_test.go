package inspect

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"grm/control"
)

// aService is a service with working generation 9 in bank 2, and others.
func aService() facts {
	w := &words{epoch: 0xfeed, order: []int{2, 0}, alive: 1<<0 | 1<<1 | 1<<2}
	now := 1000 * time.Second
	w.banks[0] = control.Bank{Generation: 8, State: control.Serving, Server: 80, ReadyAt: 500 * time.Second}
	w.banks[1] = control.Bank{Generation: 7, State: control.Draining, Server: 70, DrainUntil: now + 30*time.Second}
	w.banks[2] = control.Bank{Generation: 9, State: control.Serving, Server: 90, Keeper: 91, ReadyAt: now - 4*time.Second, WatchUntil: now + 6*time.Second}
	w.banks[3] = control.Bank{Generation: 10, State: control.Prepared}
	w.banks[4] = control.Bank{Generation: 6, State: control.Ended}
	w.banks[5] = control.Bank{Generation: 5, State: control.Serving}     // its alive bit is gone
	w.banks[6] = control.Bank{Generation: 4, State: control.State(1234)} // forged
	f := facts{
		name: "echo", control: w, now: now, wall: time.Unix(1e9, 0),
		listeners: []Listener{{Name: "a"}, {Name: "b"}},
		slots:     map[string][control.Banks][]uint64{},
		process:   func(pid int) *Process { return &Process{PID: pid} },
	}
	var a [control.Banks][]uint64
	a[2] = []uint64{11, 0, 12}
	f.slots["a"] = a
	f.flows[2] = 3
	return f
}

func TestService(t *testing.T) {
	s := aService().service()
	if s.Working != 9 || s.Epoch != "000000000000feed" {
		t.Errorf("working generation %d, epoch %s", s.Working, s.Epoch)
	}
	want := []struct {
		number uint64
		state  State
	}{{10, Prepared}, {9, Watched}, {8, Standby}, {7, Draining}, {6, Dead}, {5, Dead}, {4, Unknown}}
	if len(s.Generations) != len(want) {
		t.Fatalf("generations %+v", s.Generations)
	}
	for i, w := range want {
		if g := s.Generations[i]; g.Number != w.number || g.State != w.state {
			t.Errorf("generation %d is %s, want %d %s", g.Number, g.State, w.number, w.state)
		}
	}
	g := s.Generations[1]
	if time.Duration(g.WatchLeft) != 6*time.Second || g.ReadySince == nil || !g.ReadySince.Equal(time.Unix(1e9-4, 0)) {
		t.Errorf("watch left %v, ready since %v", time.Duration(g.WatchLeft), g.ReadySince)
	}
	if len(g.Sockets) != 1 || g.Sockets[0] != (Sockets{Listener: "a", Count: 3, Live: 2}) || g.Flows != 3 {
		t.Errorf("sockets %+v, %d flows", g.Sockets, g.Flows)
	}
	if d := s.Generations[3].DrainLeft; time.Duration(d) != 30*time.Second {
		t.Errorf("drain left %v", time.Duration(d))
	}
}

func TestOddities(t *testing.T) {
	f := aService()
	f.process = func(pid int) *Process { return &Process{PID: pid, Running: true} }
	var inodes [control.Banks][]uint64
	inodes[2] = []uint64{1, 2, 3}
	f.inodes = map[string][control.Banks][]uint64{"a": inodes}
	for _, c := range []struct {
		open map[uint64]bool
		want string
	}{
		{nil, "[]"},
		{map[uint64]bool{1: true, 3: true}, "[]"}, // the second one was closed
		{map[uint64]bool{1: true, 2: true, 3: true}, "[socket 1 of a: open, but no longer in the group: the server has taken it out]"},
		{map[uint64]bool{3: true}, "[socket 0 of a: in the group, but no longer open: nobody reads what comes]"},
		{map[uint64]bool{}, "[sockets 0, 2 of a: in the group, but no longer open: nobody reads what comes]"},
	} {
		f.open = c.open
		if got := fmt.Sprint(f.service().Generations[1].Problems); got != c.want {
			t.Errorf("%v: %s, not %s", c.open, got, c.want)
		}
	}
}

func TestStatesAtTheHead(t *testing.T) {
	f := aService()
	f.control.banks[2].WatchUntil = f.now
	if got := f.control.state(2, f.now); got != Working {
		t.Errorf("after the watch: %s", got)
	}
	f.control.banks[2].WatchUntil = f.now + 1
	f.control.order = []int{2}
	if got := f.control.state(2, f.now); got != Working {
		t.Errorf("with no older one that could take over: %s", got)
	}
	f.control.order = nil
	if got := f.control.state(2, f.now); got != Standby {
		t.Errorf("out of an empty order: %s", got)
	}
	if s := f.service(); s.Working != 0 {
		t.Errorf("working generation %d in an empty order", s.Working)
	}
}

func TestServiceWithoutControl(t *testing.T) {
	f := aService()
	f.control = nil
	f.recorded = []recorded{{number: 8, bank: 0}, {number: 9, bank: 2, sockets: []Sockets{{Listener: "a", Count: 3}}}}
	s := f.service()
	if len(s.Generations) != 2 || s.Generations[0].Number != 9 || s.Generations[0].State != Unknown || s.Generations[0].Sockets[0].Count != 3 {
		t.Errorf("generations %+v", s.Generations)
	}
}

func TestSeconds(t *testing.T) {
	for s, want := range map[Seconds]string{-5: "-1", 0: "0.0", Seconds(1500 * time.Millisecond): "1.5"} {
		if got, err := json.Marshal(s); err != nil || string(got) != want {
			t.Errorf("%d is %s, %v; want %s", s, got, err, want)
		}
	}
}
