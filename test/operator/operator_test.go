// Package operator tells what the command grm shows and does, on services that run under a real systemd and under load.
package operator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/inspect"
	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
	"grm/test/rig"
)

// bin has grm's commands and the examples' servers, built once.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // all will skip
	}
	var err error
	if bin, err = os.MkdirTemp("", "grm-operator-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(bin)
	if err := install.All(context.Background(), bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

const patience = time.Minute

// desk is where an operator sits: a box with one service under load.
type desk struct {
	*testing.T
	*rig.Rig
	echo *rig.Service
}

// newDesk starts the echo service with a watch of that length.
func newDesk(t *testing.T, watch string) *desk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	t.Parallel()
	r, err := rig.New(context.Background(), bin, box.Options{Journal: true, Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{T: t, Rig: r}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	text, err := rig.Example("echo", "[watch]\ntime = \"2s\"\n",
		"sockets = 2\n[watch]\ntime = \""+watch+"\"\n[drain]\nidle = \"2s\"\ngrace = \"1s\"\n[systemd.Unit]\nConditionPathExists = \"/etc/grm/echo.toml\"\n")
	d.must(err)
	d.echo, err = r.Install(text)
	d.must(err)
	t.Cleanup(func() {
		if t.Failed() {
			journal, err := r.Journal(d.echo.Unit)
			t.Logf("journal (%v):\n%s", err, strings.Join(journal[max(0, len(journal)-40):], "\n"))
		}
	})
	d.must(d.echo.Start())
	return d
}

func (d *desk) must(err error) {
	d.Helper()
	if err != nil {
		d.Fatal(err)
	}
}

func (d *desk) restart() {
	d.Helper()
	_, err := d.echo.Restart()
	d.must(err)
}

// grm runs grm, and returns what it wrote and its exit status.
func (d *desk) grm(args ...string) (stdout, stderr string, status int) {
	d.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := d.Command(ctx, box.BinDir+"/grm", args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out.String(), errs.String(), exit.ExitCode()
	}
	d.must(err)
	return out.String(), errs.String(), 0
}

// does runs grm, which is to succeed and to say all of the parts.
func (d *desk) does(args []string, parts ...string) string {
	d.Helper()
	out, errs, status := d.grm(args...)
	if status != 0 || errs != "" {
		d.Fatalf("grm %q: exit status %d, %s", args, status, errs)
	}
	for _, part := range parts {
		if !strings.Contains(out, part) {
			d.Errorf("grm %q does not say %q:\n%s", args, part, out)
		}
	}
	return out
}

// refuses runs grm, which is to end with that status, saying part.
func (d *desk) refuses(status int, part string, args ...string) {
	d.Helper()
	if _, errs, got := d.grm(args...); got != status || !strings.Contains(errs, part) {
		d.Errorf("grm %q: exit status %d (want %d), %q (want %q in it)", args, got, status, errs, part)
	}
}

func (d *desk) status() inspect.Service {
	d.Helper()
	var r struct {
		Complete bool
		Services []json.RawMessage
		Problems []string
	}
	d.must(json.Unmarshal([]byte(d.does([]string{"status", "--json", "echo"})), &r))
	if !r.Complete || len(r.Problems) > 0 || len(r.Services) != 1 {
		d.Fatalf("status: %+v", r)
	}
	// Durations are written as seconds, with a fraction.
	type generation struct {
		Generation     uint64
		State          inspect.State
		Server, Keeper *inspect.Process
		Sockets        []inspect.Sockets
		Flows          int
	}
	var s struct {
		Working     uint64
		Failed      *inspect.Failed
		Generations []generation
	}
	d.must(json.Unmarshal(r.Services[0], &s))
	service := inspect.Service{Working: s.Working, Failed: s.Failed}
	for _, g := range s.Generations {
		service.Generations = append(service.Generations, inspect.Generation{Number: g.Generation, State: g.State, Server: g.Server, Keeper: g.Keeper, Sockets: g.Sockets, Flows: g.Flows})
	}
	return service
}

// states waits until the generations are in these states, newest first.
func (d *desk) states(want string) inspect.Service {
	d.Helper()
	var got string
	var s inspect.Service
	err := d.Wait("generations are "+want, func() (bool, error) {
		s = d.status()
		var all []string
		for _, g := range s.Generations {
			all = append(all, fmt.Sprintf("%d %s", g.Number, g.State))
		}
		got = strings.Join(all, ", ")
		return got == want, nil
	})
	if err != nil {
		d.Fatalf("%v: they are %q", err, got)
	}
	return s
}

func (d *desk) load(change func(*load.Options)) *load.Generator {
	d.Helper()
	o := load.Options{Flows: 200, Pace: 50 * time.Millisecond, Length: 100, Seed: 1}
	change(&o)
	g, err := d.echo.Load(context.Background(), o)
	d.must(err)
	d.Cleanup(func() { _, _ = g.Stop() }) // the story has judged it already
	return g
}

func usual(*load.Options)     {}
func forever(o *load.Options) { o.Length = 10_000_000 }

// end stops the load; nothing may be lost or moved.
func (d *desk) end(g *load.Generator) {
	d.Helper()
	r, err := g.Stop()
	d.must(err)
	if err := r.Err(); err != nil {
		d.Error(err)
	}
}

// newFlowsAt waits until a process has got so many new flows more.
func (d *desk) newFlowsAt(g *load.Generator, pid int, more uint64) {
	d.Helper()
	instance := strconv.Itoa(pid)
	goal := g.Snapshot().Instances[instance].Flows + more
	d.must(g.Until(fmt.Sprintf("%d flows began at %s", goal, instance), patience, func(r load.Result) bool { return r.Instances[instance].Flows >= goal }))
}

func TestShows(t *testing.T) {
	d := newDesk(t, "1m")
	g := d.load(usual)
	d.restart()
	s := d.states("2 watched, 1 standby")
	if s.Working != 2 {
		t.Errorf("working generation %d", s.Working)
	}
	d.must(g.Until("flows of the new instance are assured", patience, func(load.Result) bool { s = d.status(); return s.Generations[0].Flows > 0 }))
	procs, err := d.echo.Processes()
	d.must(err)
	for _, gen := range s.Generations {
		isServer := func(p box.Process) bool { return gen.Server != nil && p.BoxPid == gen.Server.PID && gen.Server.Running }
		isKeeper := func(p box.Process) bool { return gen.Keeper != nil && p.BoxPid == gen.Keeper.PID && gen.Keeper.Running }
		if !slices.ContainsFunc(procs.Servers, isServer) || !slices.ContainsFunc(procs.Keepers, isKeeper) {
			t.Errorf("generation %d: server %+v, keeper %+v of %+v", gen.Number, gen.Server, gen.Keeper, procs)
		}
		if len(gen.Sockets) != 1 || gen.Sockets[0] != (inspect.Sockets{Listener: "echo", Count: 2, Live: 2}) {
			t.Errorf("generation %d: sockets %+v", gen.Number, gen.Sockets)
		}
	}
	d.does([]string{"list"}, "echo.service", "watched", "udp://0.0.0.0:5201")
	d.does([]string{"status"}, "generation 2 takes new flows since", "dissector flow", "standby")
	d.does([]string{"flows", "--assured", "--max", "0", "echo"}, "127.", "assured")
	d.does([]string{"metrics"}, `grm_working_generation{service="echo"} 2`, `grm_packets_total{service="echo",generation="1"}`, "# EOF\n")
	d.does([]string{"explain", "--group", "udp://0.0.0.0:5201", "--packet", "00", "--from", "192.0.2.1:9"}, "generation 2")
	d.does([]string{"doctor"}, "kernel", "cgroup v2", "systemd 252")
	d.refuses(3, "known: echo", "status", "nosuch")

	// Others see what root has recorded.
	out, err := d.Exec("/usr/sbin/runuser", "-u", "nobody", "--", box.BinDir+"/grm", "status", "echo")
	if err != nil || !strings.Contains(out, "newest generation 2") || !strings.Contains(out, "unknown") {
		t.Errorf("as nobody: %v\n%s", err, out)
	}
	d.end(g)
}

func TestRollback(t *testing.T) {
	d := newDesk(t, "10m")
	d.refuses(4, "no older generation lives", "rollback", "echo")
	g := d.load(usual)
	d.restart()
	s := d.states("2 watched, 1 standby")
	older, newer := s.Generations[1].Server.PID, s.Generations[0].Server.PID
	d.newFlowsAt(g, newer, 20)
	d.does([]string{"rollback", "echo"}, "echo: generation 1 takes new flows; generation 2 drains")
	d.newFlowsAt(g, older, 50)
	// The newer one keeps its flows until they end; so it drains, and goes.
	d.must(d.Wait("the unit says so", func() (bool, error) {
		text, err := d.echo.Status()
		return strings.Contains(text, "gen 1 serving; gen 2 failed: rolled back"), err
	}))
	d.must(d.Wait("the newer one has drained", func() (bool, error) {
		procs, err := d.echo.Processes()
		return len(procs.Servers) == 1 && procs.Servers[0].BoxPid == older, err
	}))
	if s := d.status(); s.Working != 1 || s.Failed == nil || s.Failed.Generation != 2 {
		t.Errorf("afterwards: %+v", s)
	}
	// A restart is a new attempt.
	d.restart()
	if s := d.status(); s.Working != 3 {
		t.Errorf("after a restart generation %d works", s.Working)
	}
	d.end(g)
}

// After the watch the older generation's sockets are not stored any more. If it is made to work again they are, so that
// nothing is lost if its server crashes.
func TestRollbackAfterTheWatch(t *testing.T) {
	d := newDesk(t, "1s")
	g := d.load(forever)
	d.restart()
	s := d.states("2 working, 1 draining")
	older := s.Generations[1].Server.PID
	stored := func(what string, want int) {
		d.Helper()
		d.must(d.Wait(what, func() (bool, error) {
			n, err := d.FDStore(d.echo.Unit)
			return n == want, err
		}))
	}
	const others = 2 + 2 // control map and flow table, a link to each keeper
	stored("only the new sockets are stored", 2+others)
	d.does([]string{"rollback", "echo"}, "echo: generation 1 takes new flows; generation 2 drains")
	d.states("2 dead, 1 working") // the newer one had no flows
	stored("only the old sockets are stored", 2+others-1)
	procs, err := d.echo.Processes()
	d.must(err)
	g.Gone(strconv.Itoa(older))
	g.Mark("crash")
	d.must(procs.Servers[0].Kill(unix.SIGKILL))
	d.must(d.Wait("another process has its sockets", func() (bool, error) {
		procs, err := d.echo.Processes()
		return err == nil && len(procs.Servers) == 1 && procs.Servers[0].BoxPid != older, nil
	}))
	if s := d.status(); s.Working != 1 {
		t.Errorf("generation %d works", s.Working)
	}
	d.must(g.Until("the next process has all flows", patience, func(r load.Result) bool { return r.TakenOver == 200 }))
	// What waited is answered: all is lost that the dead process had read, one datagram for each socket.
	if r, err := g.Stop(); err != nil || r.Lost > 2 || r.Moved+r.Duplicated+r.Strange != 0 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestDrain(t *testing.T) {
	d := newDesk(t, "10m")
	g := d.load(forever)
	d.restart()
	d.states("2 watched, 1 standby")
	// The flows never end: a drain without --now goes on.
	d.does([]string{"drain", "echo"}, "echo: generation 1 drains")
	d.states("2 working, 1 draining")
	procs, err := d.echo.Processes()
	d.must(err)
	g.Mark("ended by hand")
	g.Gone(strconv.Itoa(procs.Servers[0].BoxPid))
	d.does([]string{"drain", "--now", "echo"}, "echo: generation 1 ends now")
	d.must(d.Wait("one instance is left", func() (bool, error) {
		procs, err := d.echo.Processes()
		return len(procs.Servers) == 1 && len(procs.Keepers) == 1, err
	}))
	d.must(g.Until("its flows are the newer one's", patience, func(r load.Result) bool { return r.TakenOver == 200 }))
	d.end(g) // nothing was lost
	d.does([]string{"drain", "echo"}, "no older generation lives")
}

// The unit became inactive without any of its commands: its condition does not hold any more.
func TestDelete(t *testing.T) {
	d := newDesk(t, "1s")
	d.refuses(4, "echo.service is active (systemctl stop echo.service)", "delete", "echo")
	d.refuses(4, "services use it: echo", "delete", "udp://0.0.0.0:5201")
	_, err := d.Exec("rm", "/etc/grm/echo.toml")
	d.must(err)
	if _, err := d.echo.Restart(); err != nil {
		t.Logf("restart with a failed condition: %v", err)
	}
	d.must(d.WaitActive(d.echo.Unit, "inactive"))
	if s := d.status(); len(s.Generations) != 1 || s.Generations[0].Server == nil || !s.Generations[0].Server.Running {
		t.Fatalf("an instance whose unit is inactive: %+v", s)
	}
	d.refuses(4, "--force ends them", "delete", "echo")
	d.does([]string{"delete", "--force", "echo"}, "removed group udp://0.0.0.0:5201, service echo")
	if procs, err := d.Processes(d.echo.Unit); err != nil || len(procs) != 0 {
		t.Errorf("processes are left: %+v, %v", procs, err)
	}
	if pins, err := d.BPFFS(); err != nil || len(pins) != 0 {
		t.Errorf("pins are left: %q, %v", pins, err)
	}
	if files, err := d.Tree("/run/grm"); err != nil || len(files) != 0 {
		t.Errorf("files are left: %q, %v", files, err)
	}
	d.refuses(3, "there is nothing of that name", "delete", "echo")
}

// A service that is active is stopped first.
func TestForcedDeleteOfAnActiveService(t *testing.T) {
	d := newDesk(t, "1s")
	d.grm("delete", "--force", "echo") // what is left to remove depends on who was first
	d.must(d.WaitActive(d.echo.Unit, "inactive"))
	if pins, err := d.BPFFS(); err != nil || len(pins) != 0 {
		t.Errorf("pins are left: %q, %v", pins, err)
	}
	d.does([]string{"list"}, "SERVICE")
}
