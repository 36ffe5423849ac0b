package activate

import (
	"slices"
	"strings"
	"testing"
	"time"

	"grm/bpfprog"
	"grm/control"
	"grm/internal/systemd"
)

func TestFirstStart(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?sockets=3")
	f.mustStart()
	want := []string{"grm.ctl", "grm.echo.1.0", "grm.echo.1.1", "grm.echo.1.2", "grm.flows.echo"}
	if names := f.names(); !slices.Equal(names, want) {
		t.Fatalf("stored: %v, want %v", names, want)
	}
	ctl := f.service().Control()
	plan := ctl.Plan()
	b := ctl.Bank(plan.Bank)
	if plan.Verb != control.Start || b.Generation != 1 || b.State != control.Prepared || ctl.Working() != -1 {
		t.Fatalf("plan %v, bank %+v, working %d", plan, b, ctl.Working())
	}
	if where := f.arrives(f.req.Listeners[0]); where != "" {
		t.Errorf("a packet before the flip came to %s", where)
	}
	i := f.serve(0)
	for range 8 {
		if where := f.arrives(f.req.Listeners[0]); where == "" {
			t.Errorf("a packet after the flip came nowhere")
		}
	}
	s := f.state()
	if s.Generation != 1 || s.Unit != "echo.service" || s.User != "nobody" || s.UID != 65534 || s.Pending != nil || s.Plan.Verb != "start" || s.Plan.Bank != i.bank || s.Plan.Invocation != "run1" {
		t.Errorf("state %+v, plan %+v", s, s.Plan)
	}
}

func TestRestartAndStop(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.1.0" {
		t.Errorf("before the flip a packet came to %q", where)
	}
	now := f.serve(0)
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.2.0" {
		t.Errorf("after the flip a packet came to %q", where)
	}
	if old.bank == now.bank {
		t.Errorf("both in bank %d", old.bank)
	}
	// The old one drains, ends, and its sockets are forgotten by the decoy.
	old.ctl.Withdraw(old.bank)
	old.ctl.SetState(old.bank, control.Ended)
	old.crash()
	f.drop(func(name string) bool { return name == "grm.echo.1.0" })
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	if s := f.state(); len(s.Banks) != 2 || s.Generation != 3 {
		t.Errorf("state %+v", s)
	}
	f.setUnit(func(u *systemd.Unit) { u.Job = "stop" })
	if err := Stop(f.req, f.env); err != nil {
		t.Fatal(err)
	}
	if now.ctl.Request() != control.Stop || !now.ctl.Closing() {
		t.Errorf("request %v, closing %v", now.ctl.Request(), now.ctl.Closing())
	}
	f.stopPost("stop", "success", "exited", "0")
	if !now.server.ended() || !now.keeper.ended() {
		t.Error("processes outlive a stop")
	}
	if left := f.snapshot(); left != "" {
		t.Errorf("left after a stop:\n%s", left)
	}
	if names := f.names(); len(names) > 0 {
		t.Errorf("left in the fd store: %v", names)
	}
}

func TestCrash(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?sockets=2")
	f.mustStart()
	i := f.serve(0)
	i.crash()
	f.stopPost("", "signal", "killed", "KILL")
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	before := f.fds("grm.echo.1.")
	// The number and the address have changed meanwhile: the old layout serves once more.
	f.listen("echo", "udp://127.0.0.1:5202?sockets=1")
	f.mustStart()
	if plan := i.ctl.Plan(); plan != (control.Plan{Verb: control.Again, Bank: i.bank}) {
		t.Fatalf("plan %v", plan)
	}
	if after := f.fds("grm.echo.1."); !slices.Equal(before, after) {
		t.Errorf("sockets %v, before %v", after, before)
	}
	f.listen("echo", "udp://127.0.0.1:5201?sockets=2")
	if where := f.arrives(f.req.Listeners[0]); where == "" {
		t.Error("a packet came nowhere")
	}
	f.serve(0)
	if s := f.state(); s.Generation != 1 || s.Plan.Verb != "again" || len(s.Banks) != 1 {
		t.Errorf("state %+v", s)
	}
}

func TestStandIn(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	failed := f.spawn("server", f.fds("grm.echo.2.")...)
	f.stopPost("start", "exit-code", "exited", "1")
	if !failed.ended() {
		t.Error("a process of the failed start lives on")
	}
	if names := f.names(); !slices.Equal(names, []string{"grm.ctl", "grm.echo.1.0", "grm.flows.echo"}) {
		t.Errorf("stored: %v", names)
	}
	if s := f.state(); s.Failed == nil || s.Failed.Generation != 2 || s.Failed.Reason != "exit status 1" || len(s.Banks) != 1 {
		t.Errorf("state %+v, failed %+v", s, s.Failed)
	}
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.mustStart()
	if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.StandIn, Bank: old.bank}) {
		t.Fatalf("plan %v", plan)
	}
	if told := old.ctl.Failed(); told.Generation != 2 || told.Reason != "exit status 1" {
		t.Errorf("the decoy is told of %+v", told)
	}
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.1.0" {
		t.Errorf("a packet came to %q", where)
	}
	if old.server.ended() || old.keeper.ended() {
		t.Error("the old instance has ended")
	}
	// An operator's start tries again.
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 0 })
	f.mustStart()
	if plan := old.ctl.Plan(); plan.Verb != control.Start || old.ctl.Bank(plan.Bank).Generation != 3 {
		t.Fatalf("plan %v", plan)
	}
}

// A decoy that runs as another user could neither see the old instance nor
// speak for it.
func TestStandInAsAnotherUser(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.req.User = "daemon"
	err := f.start()
	if Status(err) != StatusConflict || !strings.Contains(err.Error(), "belong to uid 65534 (nobody)") || !strings.Contains(err.Error(), "set the user back") {
		t.Fatalf("error %v", err)
	}
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.1.0" {
		t.Errorf("a packet came to %q", where)
	}
	if old.server.ended() || old.keeper.ended() {
		t.Error("the old instance has ended")
	}
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 2 })
	f.req.User = ""
	f.mustStart()
	if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.StandIn, Bank: old.bank}) {
		t.Fatalf("plan %v", plan)
	}
}

// The new one dies in its watch, and its keeper with it.
func TestDeathInTheWatch(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	f.serve(time.Hour).crash()
	f.stopPost("", "signal", "killed", "SEGV")
	if old.ctl.Working() != old.bank {
		t.Errorf("bank %d works, not %d", old.ctl.Working(), old.bank)
	}
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.1.0" {
		t.Errorf("a packet came to %q", where)
	}
	if n := len(f.fds("grm.echo.2.")); n != 1 {
		t.Errorf("%d sockets for the next decoy to empty", n)
	}
	if s := f.state(); s.Failed == nil || s.Failed.Reason != "killed by SIGSEGV" {
		t.Errorf("failed %+v", s.Failed)
	}
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.mustStart()
	if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.StandIn, Bank: old.bank}) {
		t.Fatalf("plan %v", plan)
	}
}

// All that there is dies in the watch: the newer one's sockets serve again, and
// the older one's are for the next decoy to empty, in no slot any more.
func TestAllDeadInTheWatch(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	old := f.serve(0)
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	working := f.serve(time.Hour)
	old.crash()
	working.crash()
	f.stopPost("", "signal", "killed", "KILL")
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.mustStart()
	if plan := working.ctl.Plan(); plan != (control.Plan{Verb: control.Again, Bank: working.bank}) {
		t.Fatalf("plan %v", plan)
	}
	if _, known := f.state().Banks[old.bank]; known || working.ctl.FindGeneration(1) >= 0 {
		t.Error("gen 1 is still there")
	}
	if n := len(f.fds("grm.echo.1.")); n != 1 {
		t.Errorf("%d sockets for the next decoy to empty", n)
	}
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.2.0" {
		t.Errorf("a packet came to %q", where)
	}
}

// A bank whose generation was forgotten half, in root's record but not in the
// group, is no obstacle: the next start would come upon it again and again.
func TestForgottenBank(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	f.serve(0)
	l := f.req.Listeners[0]
	g, err := bpfprog.OpenGroup(string(l.Address.Proto), l.Address.AddrPort)
	if err != nil {
		t.Fatal(err)
	}
	known := f.state().Banks
	for bank := range control.Banks {
		if _, ok := known[bank]; ok {
			continue
		}
		if err := g.SetBank(l.App, bank, uint64(1000+bank), 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	f.serve(0)
	if where := f.arrives(l); where != "grm.echo.2.0" {
		t.Errorf("after the flip a packet came to %q", where)
	}
}
