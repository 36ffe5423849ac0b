package stories

import (
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/test/load"
)

// servesOn asserts what there is to see after a restart into a bad version: the unit is active again with the old instance and says so, that one
// gets the new flows and does not drain, nothing else is there than before, and systemd does not try again.
func (v *service) servesOn(g *driver, version, old string, before remains, says ...string) {
	v.s.Helper()
	v.settled("active")
	v.statusHas(append(says, "gen 1 serving", "failed")...)
	starts, err := v.s.Property(v.Unit, "NRestarts")
	v.s.must(err)
	g.newFlowsAt(old, g.Snapshot().Instances[old].Flows+50)
	if now := v.instance(); now != old {
		v.s.Errorf("%s: %s works, not %s", version, now, old)
	}
	if status := v.s.grm("status", v.Name); !strings.Contains(status, " working ") || strings.Contains(status, "draining") {
		v.s.Errorf("%s: the old one is to work as before:\n%s", version, status)
	}
	before.newest = v.remains().newest // what has worked stays in the record until the next start
	v.unchanged(version, before)
	if now, err := v.s.Property(v.Unit, "NRestarts"); err != nil || now != starts {
		v.s.Errorf("%s: after %s automatic starts there were %s, %v", version, starts, now, err)
	}
}

// TestNewVersionExits restarts into versions that end before they are ready: the old one serves on as if nothing had happened.
func TestNewVersionExits(t *testing.T) {
	s := newStory(t)
	good := quickly("1s")
	echo := s.install("echo", good...)
	echo.start()
	g := echo.load()
	old := echo.instance()
	before := echo.remains()
	for version, says := range map[string]string{
		`"/bin/false"`:                           "exit",
		`"/bin/sh", "-c", "kill -SEGV $$"`:       "SEGV",
		`"/bin/sh", "-c", "kill -KILL $$"`:       "SIGKILL",
		`"/usr/lib/grm/examples/none"`:           "none",
		`"/etc/passwd"`:                          "passwd",
		`"/bin/sh", "-c", "exec sleep infinity"`: "not ready",
	} {
		g.Mark(version)
		change := append(append([]string{}, good...), `"/usr/lib/grm/examples/echo"`, version)
		if strings.Contains(version, "sleep") {
			change = append(change, "[[listen]]", "[ready]\ntimeout = \"2s\"\n\n[[listen]]")
		}
		s.install("echo", change...)
		if _, err := echo.Restart(); err == nil {
			t.Errorf("%s: the restart did not fail", version)
		}
		echo.servesOn(g, version, old, before, says)
	}
	if r := g.Snapshot(); len(r.Instances) != 1 {
		t.Errorf("somebody else than %s answered: %v", old, r)
	}
	s.install("echo", good...)
	g.Mark("good")
	echo.restart()
	g.newFlowsAt(echo.instance(), 100)
	r := g.end()
	if len(r.Instances) != 2 {
		t.Error(r)
	}
	echo.drained()
	echo.stores(4)
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestDiesWithinWatch has a version that says that it is ready and dies: new flows go back to the old one.
func TestDiesWithinWatch(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("30s")...)
	echo.start()
	g := echo.load(forever)
	old := echo.instance()
	echo.restart()
	dying := echo.server()
	now := echo.instance()
	if now == old {
		t.Fatal("no new server")
	}
	h := echo.load(func(o *load.Options) { o.Seed = 2 })
	h.newFlowsAt(now, 250) // from here on flows begin all the time
	h.Gone(now)
	s.must(dying.Kill(unix.SIGKILL))
	echo.statusHas("gen 1 serving", "gen 2 failed")
	echo.active("active")
	h.newFlowsAt(old, 100)
	r := h.stop()
	echo.balanced(r, 1)
	if len(r.Instances) != 2 || r.TakenOver == 0 {
		t.Errorf("the flows of %s go on at %s: %v", now, old, r)
	}
	if r := g.end(); r.Instances[old].Answers != r.Answered {
		t.Errorf("%s has kept its flows: %v", old, r)
	}
	echo.restart()
	if now := echo.instance(); now == old {
		t.Error("the next restart did not bring a new instance")
	}
}

// TestCrash kills the server, and in the end everything, so that the cgroup goes too: packets wait in the stored sockets for the next one,
// whose flows they are.
func TestCrash(t *testing.T) {
	for name, victims := range map[string]func(*service) error{
		"server": func(v *service) error { return v.server().Kill(unix.SIGKILL) },
		"all": func(v *service) error {
			procs := v.processes()
			// The decoy first: it must not see the others go.
			if err := procs.Decoy.Kill(unix.SIGKILL); err != nil {
				return err
			}
			if err := procs.Keepers[0].Kill(unix.SIGKILL); err != nil {
				return err
			}
			return procs.Servers[0].Kill(unix.SIGKILL)
		},
		// systemd waits before it starts the unit again, and an operator does not: to systemd that is a start like any other.
		"server, restarted by hand": func(v *service) error {
			if err := v.s.InstallUnits(map[string]string{v.Unit + ".d/wait.conf": "[Service]\nRestartSec=1h\n"}); err != nil {
				return err
			}
			if err := v.server().Kill(unix.SIGKILL); err != nil {
				return err
			}
			if err := v.s.WaitProperty(v.Unit, "SubState", "auto-restart"); err != nil {
				return err
			}
			_, err := v.Restart()
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(t)
			echo := s.install("echo", quickly("1s")...)
			echo.start()
			g := echo.load(forever)
			const crashes = 3
			for range crashes {
				killed := echo.instance()
				g.Gone(killed)
				s.must(victims(echo))
				s.must(s.Wait("another server runs", func() (bool, error) {
					procs, err := echo.Processes()
					return len(procs.Servers) == 1 && procs.Decoy != nil && strconv.Itoa(procs.Servers[0].BoxPid) != killed, err
				}))
				next := echo.instance()
				g.until("the next one answers all flows", func(r load.Result) bool { return r.Instances[next].Answers > 0 })
				g.more(4000)
			}
			// They are the next one's for good: another restart moves none of them.
			echo.restart()
			g.more(4000)
			r := g.stop()
			// A killed server may have read one datagram from its one socket without having answered.
			if r.Lost > crashes || r.Moved+r.Duplicated+r.Strange != 0 {
				t.Error(r)
			}
			if len(r.Instances) != crashes+1 || r.TakenOver != crashes*200 {
				t.Errorf("%d crashes: each of the 200 flows is taken over each time: %v", crashes, r)
			}
		})
	}
}

// TestCrashTwice kills the server again as soon as it is back, while an older instance drains: that one may take over, but what then is thrown
// away of the queue has to be told.
func TestCrashTwice(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	old := echo.load(forever)
	echo.restart()
	echo.statusHas("draining")
	g := echo.load(forever)
	for range 2 {
		victim := echo.server()
		g.Gone(echo.instance())
		before := g.Snapshot()
		s.must(victim.Kill(unix.SIGKILL))
		g.until("another instance has taken over", func(r load.Result) bool { return r.TakenOver >= before.TakenOver+200 })
	}
	old.end() // these flows are the draining one's
	r := g.stop()
	if discarded := echo.discarded(); r.Lost < discarded || r.Lost > discarded+2 || r.Moved+r.Duplicated+r.Strange != 0 {
		t.Errorf("2 servers were killed, %d datagrams discarded: %v", discarded, r)
	}
}

func TestStop(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo")
	echo.start()
	g := echo.load()
	echo.restart() // there is a draining instance too
	g.newFlowsAt(echo.instance(), 10)
	if n := len(echo.processes().Servers); n != 2 {
		t.Errorf("%d servers before the stop", n)
	}
	g.Mark("stop")
	s.must(echo.Stop())
	s.nothingLeft(echo)
	r := g.stop()
	for _, w := range r.Windows {
		if w.Name != "stop" && w.Lost+w.Moved+w.Duplicated != 0 {
			t.Errorf("before the stop: %v", r)
		}
	}
	echo.start()
	g = echo.load()
	g.more(2000)
	g.end()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}
