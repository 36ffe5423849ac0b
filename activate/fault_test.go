package activate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"grm/control"
	"grm/internal/systemd"
	"grm/internal/testenv"
)

var errInjected = errors.New("injected")

// killed is what a run that is killed panics with: nothing of it runs after
// that, but for the kernel's closing of its descriptors.
type killed struct{}

// startKilled is a start that is killed before a step.
func (f *fixture) startKilled(step string) {
	f.t.Helper()
	f.env.Fault = func(s string) error {
		if s == step {
			panic(killed{})
		}
		return nil
	}
	defer func() {
		f.env.Fault = nil
		if r := recover(); r != (killed{}) {
			f.t.Fatalf("step %q was not reached: %v", step, r)
		}
	}()
	err := f.start()
	f.t.Errorf("a start that was to be killed came to its end: %v", err)
}

func (f *fixture) startFailing(step string) {
	f.t.Helper()
	f.env.Fault = func(s string) error {
		if s == step {
			return errInjected
		}
		return nil
	}
	defer func() { f.env.Fault = nil }()
	if err := f.start(); !errors.Is(err, errInjected) {
		f.t.Errorf("step %q was to fail: %v", step, err)
	}
}

// stepsOf are the steps of a start.
func (f *fixture) stepsOf() []string {
	f.t.Helper()
	var steps []string
	f.env.Fault = func(step string) error {
		steps = append(steps, step)
		return nil
	}
	f.mustStart()
	f.env.Fault = nil
	return steps
}

var twoListeners = []string{"udp://127.0.0.1:5201?name=a&sockets=2", "tcp://127.0.0.1:5201?name=b"}

// The very first start fails, or is killed, at each of its steps: nothing is left, and the next one works.
func TestFaultsOfTheFirstStart(t *testing.T) {
	f := newFixture(t, "echo", twoListeners...)
	nothing := f.snapshot()
	check := func(what string) {
		t.Helper()
		if d := differences(nothing, f.snapshot()); d != "" {
			t.Errorf("%s:\n%s", what, d)
		}
	}
	steps := f.stepsOf()
	f.stopPost("stop", "success", "", "")
	check("after a stop")
	if len(steps) < 12 {
		t.Fatalf("steps: %q", steps)
	}
	for _, step := range steps {
		f.nextRun()
		f.startFailing(step)
		check("after a failure at " + step)
	}
	for _, step := range steps {
		f.nextRun()
		f.startKilled(step)
		f.stopPost("stop", "signal", "killed", "KILL")
		check("killed at " + step + ", and stopped")
	}
	f.nextRun()
	f.mustStart()
	f.serve(0)
	if where := f.arrives(f.req.Listeners[0]); where == "" {
		t.Error("a packet came nowhere")
	}
}

// A restart fails, or is killed, at each of its steps: the old instance serves
// on as if nothing had happened, and the next good start works.
func TestFaultsOfARestart(t *testing.T) {
	f := newFixture(t, "echo", twoListeners...)
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	before := f.snapshot()
	files := openFiles(t)
	check := func(what string) {
		t.Helper()
		if d := differences(before, f.snapshot()); d != "" {
			t.Errorf("%s:\n%s", what, d)
		}
		if where := f.arrives(f.req.Listeners[0]); !strings.HasPrefix(where, "grm.a.1.") {
			t.Errorf("%s: a packet came to %q", what, where)
		}
		if old.server.ended() || old.keeper.ended() {
			t.Fatalf("%s: the old instance has ended", what)
		}
	}
	steps := []string{"note what is to come", "control map", "group udp://127.0.0.1:5201", "group tcp://127.0.0.1:5201", "sockets of a", "sockets of b",
		"bank of a", "program of a", "bank of b", "program of b", "hooks", "maps to the fd store", "fd store", "record", "publish"}
	for _, step := range steps {
		f.nextRun()
		f.startFailing(step)
		check("after a failure at " + step)
		if s := f.state(); s.Failed == nil || !strings.Contains(s.Failed.Reason, "injected") {
			t.Errorf("after a failure at %s: failed %+v", step, s.Failed)
		}
		f.stopPost("start", "exit-code", "exited", "1")
		check("after a failure at " + step + ", and what follows it")
	}
	if n := openFiles(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	for _, step := range steps {
		f.nextRun()
		f.startKilled(step)
		f.stopPost("start", "signal", "killed", "KILL")
		check("killed at " + step)
		if s := f.state(); s.Failed == nil || s.Failed.Reason != "killed by SIGKILL" {
			t.Errorf("killed at %s: failed %+v", step, s.Failed)
		}
	}
	// Killed, and nobody cleans up: the next start does.
	for _, step := range steps {
		f.nextRun()
		f.startKilled(step)
		f.nextRun()
		f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
		f.mustStart()
		f.setUnit(func(u *systemd.Unit) { u.Restarts = 0 })
		if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.StandIn, Bank: old.bank}) {
			t.Errorf("killed at %s: plan %v", step, plan)
		}
		before := strings.Split(before, "\n")
		for line := range strings.SplitSeq(f.snapshot(), "\n") {
			if !slices.Contains(before, line) && !strings.HasPrefix(line, "state ") && !strings.HasPrefix(line, "control ") {
				t.Errorf("killed at %s, and started again: + %s", step, line)
			}
		}
	}
	f.nextRun()
	if got := f.stepsOf(); !slices.Equal(got, steps) {
		t.Errorf("steps %q", got)
	}
	f.serve(0)
	if where := f.arrives(f.req.Listeners[0]); where == "" || strings.HasPrefix(where, "grm.a.1.") {
		t.Errorf("a packet came to %q", where)
	}
}

// A start after a crash, and one that stands in, fail at each of their steps.
func TestFaultsOfTheSameAgain(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	for _, verb := range []control.Verb{control.StandIn, control.Again} {
		if verb == control.Again {
			i.crash()
		}
		f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
		f.nextRun()
		steps := f.stepsOf()
		if plan := i.ctl.Plan(); plan.Verb != verb {
			t.Fatalf("plan %v, not %v", plan, verb)
		}
		before := f.snapshot()
		for _, step := range steps {
			f.nextRun()
			f.startFailing(step)
			if d := differences(before, f.snapshot()); d != "" {
				t.Errorf("%v fails at %s:\n%s", verb, step, d)
			}
			f.startKilled(step)
			f.mustStart()
			if plan := i.ctl.Plan(); plan.Verb != verb || plan.Bank != i.bank {
				t.Errorf("%v killed at %s: plan %v", verb, step, plan)
			}
			before = f.snapshot()
		}
	}
}

// A start that is told to end while it waits, or works, changes nothing.
func TestInterrupted(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	nothing := f.snapshot()
	for _, at := range []string{"control map", "hooks", "publish"} {
		ctx, cancel := context.WithCancel(context.Background())
		f.env.Fault = func(step string) error {
			if step == at {
				cancel()
			}
			return nil
		}
		err := Start(ctx, f.req, f.env)
		if at != "publish" && !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted at %s: %v", at, err)
		}
		if at == "publish" && err != nil {
			t.Errorf("interrupted when all was done: %v", err)
		}
		if d := differences(nothing, f.snapshot()); at != "publish" && d != "" {
			t.Errorf("interrupted at %s:\n%s", at, d)
		}
	}
	f.env.Fault = nil
	// The wait before one more automatic start.
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 40 })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- Start(ctx, f.req, f.env) }()
	eventually(t, "it says that it waits", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return slices.ContainsFunc(f.says, func(s string) bool {
			return strings.Contains(s, "EXTEND_TIMEOUT_USEC=35000000") && strings.Contains(s, "STATUS=waiting 5s")
		})
	})
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted in its wait: %v", err)
	}
}

// 10,000 generations are activated and flipped while an older one lives, each gone before the next one: nothing leaks.
func TestManyGenerations(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?dissector=noop")
	f.mustStart()
	old := f.serve(0)
	l := f.req.Listeners[0]
	var files int
	var before string
	var objects struct{ maps, programs int }
	starts := testenv.Scale(10_000)
	for n := range starts {
		f.nextRun()
		f.mustStart()
		name := fmt.Sprintf("grm.echo.%d.0", n+2)
		if want := []string{"grm.ctl", "grm.echo.1.0", name}; !slices.Equal(f.names(), want) {
			t.Fatalf("stored %v, want %v", f.names(), want)
		}
		bank := old.ctl.Plan().Bank
		old.ctl.SetState(bank, control.Serving)
		old.ctl.SetReady(bank, control.Now(), 0)
		old.ctl.Flip(bank)
		if n%1000 == 0 {
			if where := f.arrives(l); where != name {
				t.Fatalf("generation %d was flipped, and a packet came to %q", n+2, where)
			}
		}
		f.drop(func(stored string) bool { return stored == name })
		if n == 1 {
			files, before, objects = openFiles(t), f.snapshot(), kernelObjects(t)
		}
	}
	if n := openFiles(t); n != files {
		t.Errorf("%d descriptors, %d before", n, files)
	}
	if a, b := strings.Count(before, "file "), strings.Count(f.snapshot(), "file "); a != b {
		t.Errorf("%d files, %d before", b, a)
	}
	if where := f.arrives(l); where != "grm.echo.1.0" {
		t.Errorf("the others are gone, and a packet came to %q", where)
	}
	if objects.maps == 0 || objects.programs == 0 {
		t.Errorf("no BPF objects found by their names: %+v", objects)
	}
	// The kernel frees them some time after their last use, and other services on this machine may start meanwhile.
	eventually(t, "less than one BPF map or program more for every second start", func() bool {
		now := kernelObjects(t)
		return now.maps-objects.maps < starts/2 && now.programs-objects.programs < starts/2
	})
}
