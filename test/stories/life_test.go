package stories

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/test/box"
	"grm/test/load"
	"grm/test/rig"
)

// later asks systemd for something without waiting for it.
func (v *service) later(verb string) {
	v.s.Helper()
	_, err := v.s.Systemctl("--no-block", verb, v.Unit)
	v.s.must(err)
}

// settled waits until systemd has nothing to do for the unit, and the unit is in the given state.
func (v *service) settled(state string) {
	v.s.Helper()
	var props map[string]string
	err := v.s.Wait(v.Unit+" is "+state+" without a job", func() (bool, error) {
		var err error
		props, err = v.s.Show(v.Unit, "ActiveState", "SubState", "Job")
		return props["ActiveState"] == state && (props["Job"] == "0" || props["Job"] == ""), err
	})
	if err != nil {
		v.s.Fatalf("%v: %v", err, props)
	}
}

// never is a version of the server that does not get ready.
func never(timeout string) []string {
	return []string{`"/usr/lib/grm/examples/echo"`, `"/bin/sleep", "infinity"`, "[[listen]]", "[ready]\ntimeout = \"" + timeout + "\"\n\n[[listen]]"}
}

// starting installs a version that never gets ready, and restarts into it without waiting for that.
func (v *service) starting() box.Process {
	v.s.Helper()
	v.s.install("echo", append(quickly("1s"), never("40s")...)...)
	return v.startingAfter(box.Process{})
}

// startingAfter restarts, and waits for a version that never gets ready and is not the last one.
func (v *service) startingAfter(last box.Process) box.Process {
	v.s.Helper()
	v.later("restart")
	var hanging box.Process
	v.s.must(v.s.Wait("the new version runs", func() (bool, error) {
		procs, err := v.Processes()
		i := slices.IndexFunc(procs.Servers, func(p box.Process) bool { return p.Comm == "sleep" && p.BoxPid != last.BoxPid })
		if i >= 0 {
			hanging = procs.Servers[i]
		}
		return i >= 0, err
	}))
	return hanging
}

func TestRestartStorm(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("0s")...)
	echo.start()
	g := echo.load()
	for range 30 {
		echo.later("restart")
	}
	echo.settled("active")
	g.newFlowsAt(echo.instance(), 100)

	// systemd makes one of those that it has not begun with. These are 30 attempts, none of which gets ready before the next.
	g.Mark("never ready")
	echo.drained()
	old, before := echo.instance(), echo.remains()
	last := echo.starting()
	for range 29 {
		last = echo.startingAfter(last)
	}
	g.newFlowsAt(old, g.Snapshot().Instances[old].Flows+50)
	s.install("echo", quickly("0s")...)
	echo.restart()
	g.newFlowsAt(echo.instance(), 100)
	g.end()
	echo.drained()
	before.newest = echo.remains().newest
	echo.unchanged("the storm", before)
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestRestartBeforeReady restarts away from a version that does not get ready, into a good one.
func TestRestartBeforeReady(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load()
	old := echo.instance()
	for range 3 {
		hanging := echo.starting()
		s.install("echo", quickly("1s")...)
		echo.restart()
		if unix.Kill(hanging.Pid, 0) == nil {
			t.Errorf("the version that did not get ready lives on as %d", hanging.BoxPid)
		}
		now := echo.instance()
		if now == old {
			t.Error("no new instance")
		}
		old = now
		g.newFlowsAt(now, 50)
	}
	g.end()
	echo.drained()
}

// phases are what an echo service can be in the midst of, and how it gets there.
var phases = map[string]func(*service){
	"start": func(v *service) { v.starting() },
	"watch": func(v *service) {
		v.s.install("echo", quickly("1h")...)
		v.restart()
	},
	"drain": func(v *service) {
		v.s.install("echo", quickly("0s")...)
		v.restart()
		v.statusHas("draining")
	},
}

// TestStopInEachPhase stops a service while it starts, watches and drains.
func TestStopInEachPhase(t *testing.T) {
	phases := maps.Clone(phases)
	phases["restart"] = func(v *service) { v.later("restart") }
	for phase, enter := range phases {
		t.Run(phase, func(t *testing.T) {
			s := newStory(t)
			echo := s.install("echo", quickly("1s")...)
			echo.start()
			g := echo.load(forever)
			enter(echo)
			g.Mark("stop")
			s.must(echo.Stop())
			if phase == "restart" {
				// grm-activate may end by systemd's SIGTERM so early that it cannot say that this is no failure. If it did not, this fails.
				_, _ = s.Systemctl("reset-failed", echo.Unit)
			}
			s.nothingLeft(echo)
			r := g.stop()
			if w := r.Windows[0]; w.Lost+w.Moved+w.Duplicated != 0 {
				t.Error(r)
			}
			s.install("echo", quickly("1s")...)
			echo.start()
			g = echo.load()
			echo.restart()
			g.newFlowsAt(echo.instance(), 50)
			g.end()
		})
	}
}

// killKeeper kills the keeper of the newest server.
func killKeeper(p rig.Processes) error {
	return p.Keeper(p.Servers[len(p.Servers)-1]).Kill(unix.SIGKILL)
}

// TestKilledHelpers kills the decoy and the keeper, alone and together: no datagram is lost and no flow moves, since servers live.
func TestKilledHelpers(t *testing.T) {
	for name, kill := range map[string]func(rig.Processes) error{
		"decoy":  func(p rig.Processes) error { return p.Decoy.Kill(unix.SIGKILL) },
		"keeper": killKeeper,
		"both": func(p rig.Processes) error {
			if err := p.Decoy.Kill(unix.SIGKILL); err != nil {
				return err
			}
			return killKeeper(p)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(t)
			echo := s.install("echo", quickly("1s")...)
			echo.start()
			g := echo.load()
			server := echo.server()
			for range 2 {
				before := echo.processes()
				s.must(kill(before))
				s.must(s.Wait("another decoy runs", func() (bool, error) {
					procs, err := echo.Processes()
					return procs.Decoy != nil && procs.Decoy.BoxPid != before.Decoy.BoxPid, err
				}))
				echo.settled("active")
				g.more(4000)
			}
			if name == "decoy" {
				if now := echo.server(); now.BoxPid != server.BoxPid {
					t.Errorf("the server was restarted: %d, then %d", server.BoxPid, now.BoxPid)
				}
			}
			echo.restart()
			g.newFlowsAt(echo.instance(), 100)
			g.end()
			echo.drained()
			s.must(echo.Stop())
			s.nothingLeft(echo)
		})
	}
}

// TestReloadAndReexec has systemd read its units again, and execute itself again, in each phase of a restart. What it has stored it then hands
// out in another order, of which servers see nothing.
func TestReloadAndReexec(t *testing.T) {
	s := newOdd(t)
	const address = "address = \"udp://0.0.0.0:5201\"\n"
	const sockets = 4
	listeners := "name = \"one\"\nsockets = 3\n" + address + "[[listen]]\nname = \"two\"\naddress = \"udp://0.0.0.0:5202\"\n"
	// This server keeps its descriptors where it got them.
	echo := s.install("echo", append(append(quickly("1s"), address, listeners), has("execs")...)...)
	echo.start()
	g := echo.load()
	for _, verb := range []string{"daemon-reload", "daemon-reexec", "daemon-reload", "daemon-reexec"} {
		s.systemctl(verb)
		echo.restart() // the watch begins
		s.systemctl(verb)
		g.newFlowsAt(echo.instance(), 50)
		echo.statusHas("draining")
		s.systemctl(verb)
		g.more(2000)
	}
	echo.drained()
	inherited := func(server box.Process) []string {
		var all []string
		for fd := 3; fd < 3+sockets; fd++ {
			socket, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", server.Pid, fd))
			s.must(err)
			all = append(all, socket)
		}
		return all
	}
	victim := echo.server()
	before := inherited(victim)
	s.systemctl("daemon-reexec")
	g.Gone(echo.instance())
	s.must(victim.Kill(unix.SIGKILL))
	echo.replaced(g, victim)
	if after := inherited(echo.server()); !slices.Equal(before, after) {
		t.Errorf("sockets %q before the crash, %q after it", before, after)
	}
	echo.balanced(g.stop(), sockets) // one datagram from each may have been taken
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestConditionFails restarts a service whose condition does not hold any more: systemd leaves it inactive without running anything of it.
// Its instance lives, and the next start takes it over.
func TestConditionFails(t *testing.T) {
	s := newStory(t)
	s.must(s.WriteFile("/run/wanted", "", 0o644))
	echo := s.installText(example(t, "echo", quickly("1s")...) + "\n[systemd.Unit]\nConditionPathExists = \"/run/wanted\"\n")
	echo.start()
	g := echo.load()
	server := echo.server()
	_, err := s.Exec("rm", "/run/wanted")
	s.must(err)
	if _, err := echo.Restart(); err != nil {
		t.Logf("restart with a failed condition: %v", err)
	}
	echo.settled("inactive")
	g.more(2000)
	s.must(s.WriteFile("/run/wanted", "", 0o644))
	echo.start()
	g.newFlowsAt(echo.instance(), 50)
	g.end()
	if r := g.Snapshot(); r.Instances[strconv.Itoa(server.BoxPid)].Answers == 0 {
		t.Error(r)
	}
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestShutdown powers a box off, with and without a bus: all processes end within the unit's timeout, and systemd is not held up.
func TestShutdown(t *testing.T) {
	for _, bus := range []bool{false, true} {
		t.Run(fmt.Sprintf("bus %v", bus), func(t *testing.T) {
			s := newStoryWith(t, bin, box.Options{Journal: true, DBus: bus, Timeout: patience})
			echo := s.install("echo")
			echo.start()
			g := echo.load()
			echo.restart()
			all := echo.processes()
			g.Mark("shutdown")
			_, err := s.Systemctl("poweroff", "--no-block")
			s.must(err)
			s.must(s.Wait("the box is off", func() (bool, error) { return unix.Kill(s.Pid(), 0) != nil, nil }))
			for _, p := range append(all.Servers, all.Keepers...) {
				if unix.Kill(p.Pid, 0) == nil {
					t.Errorf("%s lives", p.Comm)
				}
			}
			r := g.stop()
			if w := r.Windows[0]; w.Lost+w.Moved+w.Duplicated != 0 {
				t.Error(r)
			}
		})
	}
}

// TestTooManyInstances restarts while old instances live on, until there is no place for one more.
func TestTooManyInstances(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", "[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"0s\"\n[drain]\nidle = \"1h\"\ntimeout = \"2h\"\n")
	echo.start()
	// Each instance has flows of its own, which do not end.
	few := func(o *load.Options) { o.Flows, o.Pace, o.Seed = 10, 200*time.Millisecond, o.Seed+1 }
	drivers := []*driver{echo.load(forever, few)}
	for i := 2; i <= 32; i++ {
		if _, err := echo.Restart(); err != nil {
			t.Fatalf("instance %d: %v", i, err)
		}
		drivers = append(drivers, echo.load(forever, few))
	}
	newest := echo.instance()
	if _, err := echo.Restart(); err == nil {
		t.Error("instance 33 was not refused")
	}
	echo.statusHas("gen 32 serving", "gen 33 failed", "32 instances live", "grm drain echo --now")
	echo.active("active")
	h := echo.load(few)
	h.more(100)
	if r := h.end(); r.Instances[newest].Answers != r.Answered {
		t.Errorf("new flows should be at %s: %v", newest, r)
	}
	for _, d := range drivers {
		if r := d.Snapshot(); len(r.Instances) != 1 {
			t.Error(r)
		}
	}

	// With a limit the oldest ones end for one more. Their flows begin anew, and nobody else's move.
	procs := echo.processes()
	for i, d := range drivers[:30] {
		d.Gone(strconv.Itoa(procs.Servers[i].BoxPid))
	}
	echo = s.install("echo", "[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"0s\"\n[drain]\nidle = \"1h\"\ntimeout = \"2h\"\nmax_instances = 3\n")
	echo.restart()
	s.must(s.Wait("only three are left", func() (bool, error) {
		procs, err := echo.Processes()
		return len(procs.Servers) == 3, err
	}))
	for i, d := range drivers {
		moves := uint64(10)
		if i >= 30 {
			moves = 0
		}
		d.until("the flows of those that end are taken over", func(r load.Result) bool { return r.TakenOver >= moves })
		if r := d.end(); r.TakenOver != moves {
			t.Errorf("instance %d of 32: %v", i+1, r)
		}
	}
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestHardened measures the unit as it is generated.
func TestHardened(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo")
	echo.start()
	out, err := s.Exec("systemd-analyze", "security", "--no-pager", echo.Unit)
	s.must(err)
	_, rest, ok := strings.Cut(out, "Overall exposure level for "+echo.Unit+": ")
	score, err := strconv.ParseFloat(strings.Fields(rest + " none")[0], 64)
	if !ok || err != nil || score > 1.8 {
		t.Errorf("the exposure level is above 1.8:\n%s", out)
	}
}

// TestLean bounds the memory that every service pays for.
func TestLean(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo")
	echo.start()
	g := echo.load()
	echo.restart()
	g.more(2000)
	procs := echo.processes()
	rss := func(p box.Process) int {
		status, err := s.ReadFile(fmt.Sprintf("/proc/%d/status", p.BoxPid))
		s.must(err)
		_, rest, _ := strings.Cut(status, "VmRSS:")
		kib, err := strconv.Atoi(strings.Fields(rest)[0])
		s.must(err)
		return kib
	}
	if kib := rss(*procs.Decoy); kib > 4<<10 {
		t.Errorf("the decoy has %d KiB", kib)
	}
	for _, p := range procs.Keepers {
		if kib := rss(p); kib > 6<<10 {
			t.Errorf("a keeper has %d KiB", kib)
		}
	}
	g.end()
}
