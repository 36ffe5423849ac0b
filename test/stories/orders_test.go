package stories

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/test/box"
	"grm/test/load"
)

// systemctl asks systemd for something that has to work.
func (s *story) systemctl(args ...string) {
	s.Helper()
	_, err := s.Systemctl(args...)
	s.must(err)
}

// grm runs the operator's command.
func (s *story) grm(args ...string) string {
	s.Helper()
	out, err := s.Exec(box.BinDir+"/grm", args...)
	s.must(err)
	return out
}

// TestByHand rolls back and ends drains by hand, under load. A probe that fails within the watch does the same as a rollback.
func TestByHand(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", "[watch]\ntime = \"2s\"\n",
		"[watch]\ntime = \"1h\"\nprobe = [\"/usr/bin/test\", \"-e\", \""+well+"\"]\n[drain]\nidle = \"3s\"\ngrace = \"1s\"\n")
	echo.start()
	g := echo.load(func(o *load.Options) { o.Length = 10 })
	old := echo.instance()
	for _, c := range []struct {
		says string
		back func()
	}{
		{"rolled back by hand", func() { s.grm("rollback", "echo") }},
		{"watch probe: exit 1", func() { s.must(os.Remove(s.Path(well))) }},
	} {
		g.Mark(c.says)
		s.must(s.WriteFile(well, "", 0o644))
		echo.restart()
		now := echo.instance()
		g.newFlowsAt(now, 50)
		// Some six seconds: the old one has no flows any more, and would have drained. It stays whole.
		g.more(24_000)
		echo.statusHas("gen 1 standing by")
		echo.stores(6) // the control map, the flow table, and a socket and a link for each instance
		before := g.Snapshot().Instances
		c.back()
		g.newFlowsAt(old, before[old].Flows+100)
		before = g.Snapshot().Instances
		g.newFlowsAt(old, before[old].Flows+100)
		// Answers that were under way.
		if n := g.Snapshot().Instances[now].Flows - before[now].Flows; n > 2 {
			t.Errorf("%s: %d flows began at %s afterwards", c.says, n, now)
		}
		echo.statusHas("gen 1 serving", "failed: "+c.says)
		echo.active("active")
		echo.drained()
		if echo.instance() != old {
			t.Errorf("%s: %s works, not %s", c.says, echo.instance(), old)
		}
	}
	g.end() // the newer ones kept the flows that they had

	s.must(s.WriteFile(well, "", 0o644))
	g = echo.load(forever)
	echo.restart()
	g.more(2000)
	g.Mark("drain --now")
	g.Gone(old) // an operator says that it is not to serve them any more
	s.grm("drain", "--now", "echo")
	echo.drained()
	g.more(2000)
	if r := g.end(); r.TakenOver != 200 {
		t.Errorf("the 200 flows of %s are taken over: %v", old, r)
	}
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestSystemctlKill sends signals by way of systemd.
func TestSystemctlKill(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load(forever)
	server, decoy := echo.server(), echo.processes().Decoy

	g.Mark("the decoy")
	s.systemctl("kill", "--kill-who=main", "--signal=TERM", echo.Unit)
	s.must(s.Wait("another decoy runs", func() (bool, error) {
		procs, err := echo.Processes()
		return procs.Decoy != nil && procs.Decoy.BoxPid != decoy.BoxPid, err
	}))
	echo.settled("active")
	if now := echo.server(); now.BoxPid != server.BoxPid {
		t.Errorf("the server was restarted: %d, then %d", server.BoxPid, now.BoxPid)
	}
	g.more(2000)

	killed := uint64(0)
	for _, signal := range []string{"TERM", "KILL"} {
		echo.forgive()
		server = echo.server()
		g.Mark("all: " + signal)
		g.Gone(strconv.Itoa(server.BoxPid))
		s.systemctl("kill", "--signal="+signal, echo.Unit)
		killed++
		echo.replaced(g, server)
	}
	r := g.stop()
	echo.balanced(r, killed)
	if r.Flows != 200 || r.TakenOver != 200*killed {
		t.Errorf("all flows go on: %v", r)
	}
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestKillInEachPhase kills all of a service by way of systemd while it starts, watches and drains. What worked goes on with its sockets; flows of
// an older instance begin anew there.
func TestKillInEachPhase(t *testing.T) {
	for _, c := range []struct{ phase, signal string }{{"start", "KILL"}, {"watch", "TERM"}, {"watch", "KILL"}, {"drain", "KILL"}} {
		t.Run(c.phase+" "+c.signal, func(t *testing.T) {
			s := newStory(t)
			s.standAlone()
			echo := s.install("echo", quickly("1s")...)
			echo.start()
			g := echo.load(forever)
			g.Mark("kill")
			phases[c.phase](echo)
			victims := echo.processes().Servers
			for _, victim := range victims {
				g.Gone(strconv.Itoa(victim.BoxPid))
			}
			s.systemctl("kill", "--signal="+c.signal, echo.Unit)
			if c.phase == "start" {
				s.install("echo", quickly("1s")...)
				echo.restart()
			}
			echo.replaced(g, victims[len(victims)-1])
			g.Mark("replaced")
			g.more(2000)
			r := g.stop()
			// Of an instance that drains nobody has the sockets who was not killed.
			perished := echo.perished()
			if c.phase != "drain" && perished != 0 {
				t.Errorf("%d datagrams perished", perished)
			}
			echo.balancedBut(r, uint64(len(victims)), perished)
			for _, w := range r.Windows {
				if w.Name != "kill" && w.Lost != 0 {
					t.Errorf("lost in window %q: %v", w.Name, r)
				}
			}
			if r.Flows != 200 || r.TakenOver < 200 || r.Moved+r.Duplicated+r.Strange != 0 {
				t.Errorf("all flows go on: %v", r)
			}
			echo.stores(4)
			s.must(echo.Stop())
			s.nothingLeft(echo)
		})
	}
}

// TestOtherUnits restarts, stops and isolates by way of other units.
func TestOtherUnits(t *testing.T) {
	s := newStory(t)
	const rest = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
	s.must(s.InstallUnits(map[string]string{
		"whole.service": rest,
		"base.service":  rest,
		"rescue.target": "[Unit]\nAllowIsolate=yes\n",
		// An isolate would stop it as well, and the story reads it.
		"systemd-journald.service.d/keep.conf": "[Unit]\nIgnoreOnIsolate=yes\n",
	}))
	echo := s.installText(example(t, "echo", quickly("1s")...) + "\n[systemd.Unit]\nPartOf = \"whole.service\"\nBindsTo = \"base.service\"\nAfter = \"base.service whole.service\"\n")
	s.systemctl("start", "whole.service", echo.Unit)
	g := echo.load()
	for _, unit := range []string{"whole.service", "base.service"} {
		old := echo.instance()
		g.Mark("restart of " + unit)
		s.systemctl("restart", unit)
		echo.settled("active")
		if now := echo.instance(); now == old {
			t.Errorf("a restart of %s did not restart %s", unit, echo.Unit)
		}
		g.newFlowsAt(echo.instance(), 100)
	}
	g.end()
	for name, args := range map[string][]string{"PartOf=": {"stop", "whole.service"}, "BindsTo=": {"stop", "base.service"}, "isolate": {"isolate", "rescue.target"}} {
		s.systemctl("start", "whole.service", echo.Unit)
		g := echo.load()
		echo.restart() // there is a draining instance too
		g.Mark("stop")
		s.systemctl(args...)
		echo.settled("inactive")
		s.nothingLeft(echo)
		if r := g.stop(); r.Windows[0].Lost+r.Moved+r.Duplicated != 0 {
			t.Errorf("%s: before the stop: %v", name, r)
		}
	}
}

// TestReexecWhileStarting has systemd read its units again and execute itself again while a version starts, and while restarts go on.
func TestReexecWhileStarting(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load()
	old := echo.instance()
	hanging := echo.starting()
	s.systemctl("daemon-reload")
	s.systemctl("daemon-reexec")
	g.more(1000)
	if procs := echo.processes(); len(procs.Servers) != 2 || unix.Kill(hanging.Pid, 0) != nil {
		t.Errorf("the version that starts is gone: %+v", procs)
	}
	s.install("echo", quickly("1s")...)
	echo.restart()
	if now := echo.instance(); now == old {
		t.Error("no new instance")
	}
	for _, verb := range []string{"daemon-reexec", "daemon-reload", "daemon-reexec"} {
		echo.later("restart")
		s.systemctl(verb)
		echo.settled("active")
	}
	g.newFlowsAt(echo.instance(), 50)
	g.end()
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestStartLimit has a unit with a start limit, as one that somebody wrote by hand. When it is reached systemd gives the unit up and throws its
// stored sockets away. The instance lives on, and the next start takes over from it.
func TestStartLimit(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/limit.conf": "[Unit]\nStartLimitIntervalSec=1h\nStartLimitBurst=4\n"}))
	echo.start()
	g := echo.load()
	old := echo.instance()
	s.install("echo", append(quickly("1s"), `"/usr/lib/grm/examples/echo"`, `"/bin/false"`)...)
	var state string
	for range 5 { // each of them has systemd start the unit once more by itself
		if _, err := echo.Restart(); err == nil {
			t.Error("a restart into /bin/false did not fail")
		}
		s.must(s.Wait("the unit is active again, or has failed", func() (bool, error) {
			props, err := s.Show(echo.Unit, "ActiveState", "Job")
			state = props["ActiveState"]
			return state == "active" || state == "failed", err
		}))
		if state == "failed" {
			break
		}
	}
	if result, err := s.Property(echo.Unit, "Result"); err != nil || state != "failed" || result != "start-limit-hit" {
		t.Errorf("the unit is %s, Result=%s, %v", state, result, err)
	}
	before := g.Snapshot().Instances[old].Flows
	g.newFlowsAt(old, before+100)
	if out := s.grm("status", "echo"); !strings.Contains(out, old) {
		t.Errorf("grm status does not show the instance %s that lives on:\n%s", old, out)
	}
	s.install("echo", quickly("1s")...)
	s.systemctl("reset-failed", echo.Unit)
	echo.start()
	if now := echo.instance(); now == old {
		t.Error("no new instance")
	}
	g.newFlowsAt(echo.instance(), 100)
	g.end()
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestStopInBackOff stops a service whose only version fails, while it waits before the next attempt.
func TestStopInBackOff(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", append(quickly("1s"), `"/usr/lib/grm/examples/echo"`, `"/bin/false"`)...)
	if echo.Start() == nil {
		t.Error("a start of /bin/false did not fail")
	}
	for _, verb := range []string{"daemon-reload", "daemon-reexec"} {
		echo.statusHas("waiting")
		s.systemctl(verb)
		s.must(echo.Stop())
		shell("systemctl reset-failed " + echo.Unit + " || :")(echo) // it is no wonder if the unit has failed
		s.nothingLeft(echo)
		echo.later("start")
	}
	// A good version need not wait.
	echo.statusHas("waiting")
	s.install("echo", quickly("1s")...)
	echo.restart()
	g := echo.load()
	echo.restart()
	g.newFlowsAt(echo.instance(), 50)
	g.end()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestNoNewFlowsWhileStopping stops a server that takes its time: what it has it serves to the end, but no new flow.
func TestNoNewFlowsWhileStopping(t *testing.T) {
	s := newOdd(t)
	echo := s.install("echo", append(quickly("1s"), has("deaf")...)...)
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/timeout.conf": "[Service]\nTimeoutStopSec=3\n"}))
	echo.start()
	g := echo.load()
	server := echo.instance()
	g.newFlowsAt(server, 250) // from here on flows begin all the time
	echo.later("stop")
	s.must(s.WaitProperty(echo.Unit, "SubState", "stop-sigterm"))
	g.more(400) // whose answers were under way
	before := g.Snapshot()
	g.until("flows would have begun", func(r load.Result) bool { return r.Flows >= before.Flows+50 })
	after := g.Snapshot()
	if state, err := s.Property(echo.Unit, "SubState"); err != nil || state != "stop-sigterm" {
		t.Logf("the server has ended already: %s, %v", state, err)
	}
	if n := after.Instances[server].Flows - before.Instances[server].Flows; n != 0 {
		t.Errorf("%d of %d flows began at a server that is being stopped: %v", n, after.Flows-before.Flows, after)
	}
	if after.Instances[server].Answers == before.Instances[server].Answers {
		t.Errorf("it does not serve the flows that it has any more: %v", after)
	}
	s.systemctl("daemon-reload")
	s.systemctl("daemon-reexec")
	echo.settled("failed") // it had to be killed
	if r := g.stop(); r.Instances[server].Flows != before.Instances[server].Flows {
		t.Errorf("flows began at a server that is being stopped while systemd executed itself again: %v, then %v", before, r)
	}
	s.systemctl("reset-failed", echo.Unit)
	s.nothingLeft(echo)
}
