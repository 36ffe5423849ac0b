package stories

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/test/box"
	"grm/test/load"
	"grm/test/rig"
)

// forgive lets systemd forget how often it had to start the unit by itself, so that the next such start comes without a wait.
func (v *service) forgive() {
	v.s.Helper()
	_, err := v.s.Systemctl("reset-failed", v.Unit)
	v.s.must(err)
}

// replaced waits until the unit is up with another server than a killed one, which has answered.
func (v *service) replaced(g *driver, victim box.Process) {
	v.s.Helper()
	v.s.must(v.s.Wait("another server runs", func() (bool, error) {
		procs, err := v.Processes()
		return len(procs.Servers) == 1 && len(procs.Keepers) == 1 && procs.Decoy != nil && procs.Servers[0].BoxPid != victim.BoxPid, err
	}))
	v.settled("active")
	next := v.instance()
	g.until("the next one answers", func(r load.Result) bool { return r.Instances[next].Answers > 200 })
}

// kill kills processes, one after the other. Some follow another one on their own, and may be quicker.
func (s *story) kill(victims ...box.Process) {
	s.Helper()
	for _, victim := range victims {
		if err := victim.Kill(unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
			s.must(err)
		}
	}
}

// TestKilledPairs kills the server together with one of those that look after it. (TestCrash has it alone, and all three; TestKilledHelpers the
// others without it.) The next server gets the sockets, and what waits in them.
func TestKilledPairs(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load(forever)
	pairs := map[string]func(rig.Processes) []box.Process{
		"server, keeper": func(p rig.Processes) []box.Process { return []box.Process{p.Servers[0], p.Keepers[0]} },
		"keeper, server": func(p rig.Processes) []box.Process { return []box.Process{p.Keepers[0], p.Servers[0]} },
		"server, decoy":  func(p rig.Processes) []box.Process { return []box.Process{p.Servers[0], *p.Decoy} },
		"decoy, server":  func(p rig.Processes) []box.Process { return []box.Process{*p.Decoy, p.Servers[0]} },
	}
	for name, pair := range pairs {
		echo.forgive()
		g.Mark(name)
		procs := echo.processes()
		g.Gone(strconv.Itoa(procs.Servers[0].BoxPid))
		s.kill(pair(procs)...)
		echo.replaced(g, procs.Servers[0])
	}
	// They are the last one's for good.
	g.Mark("restart")
	echo.restart()
	g.more(4000)
	r := g.stop()
	echo.balanced(r, uint64(len(pairs)))
	if r.TakenOver != uint64(200*len(pairs)) || r.Flows != 200 {
		t.Errorf("each of the 200 flows is taken over %d times: %v", len(pairs), r)
	}
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestKilledOlder kills an older instance, while the newer one is watched and while it drains: its flows begin anew at the one that works, and the
// unit does not mind.
func TestKilledOlder(t *testing.T) {
	for _, phase := range []string{"watch", "drain"} {
		t.Run(phase, func(t *testing.T) {
			s := newStory(t)
			s.standAlone()
			echo := s.install("echo", quickly("1h")...)
			echo.start()
			g := echo.load(forever)
			killed := uint64(0)
			for _, whole := range []bool{false, true} {
				old := echo.processes()
				if whole {
					g.Mark("with its keeper")
				} else {
					g.Mark("server")
				}
				phases[phase](echo)
				decoy := echo.processes().Decoy
				g.Gone(strconv.Itoa(old.Servers[0].BoxPid))
				if whole {
					s.must(old.Keepers[0].Kill(unix.SIGKILL))
				}
				s.must(old.Servers[0].Kill(unix.SIGKILL))
				killed++
				now := echo.instance()
				g.until("the working one has all flows", func(r load.Result) bool { return r.TakenOver == 200*killed })
				g.Mark("afterwards")
				g.more(2000)
				echo.drained()
				echo.stores(4)
				if procs := echo.processes(); echo.instance() != now || procs.Decoy.BoxPid != decoy.BoxPid {
					t.Errorf("the unit was restarted: %+v", procs)
				}
			}
			r, perished := g.stop(), echo.perished()
			for _, w := range r.Windows {
				if w.Name != "server" && w.Name != "with its keeper" && w.Lost != 0 {
					t.Errorf("lost in window %q: %v", w.Name, r)
				}
			}
			// Once the watch is over nobody has an older one's sockets but itself and its keeper.
			if phase == "watch" && perished != 0 {
				t.Errorf("%d datagrams perished", perished)
			}
			echo.balancedBut(r, killed, perished)
			s.must(echo.Stop())
			s.nothingLeft(echo)
		})
	}
}

// TestOutOfMemory lets the kernel kill servers for their memory: the one that serves, and one that drains.
func TestOutOfMemory(t *testing.T) {
	s := newOdd(t)
	echo := s.install("echo", append(quickly("0s"), has("hungry")...)...)
	echo.start()
	g := echo.load(forever)
	victim := echo.server()
	g.Gone(strconv.Itoa(victim.BoxPid))
	s.starve(echo, victim)
	echo.replaced(g, victim)

	g.Mark("draining")
	victim = echo.server()
	echo.restart()
	echo.statusHas("draining")
	decoy := echo.processes().Decoy
	g.Gone(strconv.Itoa(victim.BoxPid))
	s.starve(echo, victim)
	g.until("the working one has all flows", func(r load.Result) bool { return r.TakenOver == 400 })
	echo.drained()
	if now := echo.processes().Decoy; now.BoxPid != decoy.BoxPid {
		t.Errorf("the unit was restarted: %d, then %d", decoy.BoxPid, now.BoxPid)
	}
	echo.active("active")
	if policy, err := s.Property(echo.Unit, "OOMPolicy"); err != nil || policy != "continue" {
		t.Errorf("OOMPolicy=%s, %v", policy, err)
	}
	echo.balanced(g.stop(), 2)
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// starve has the kernel's OOM killer kill a server. Where systemd can limit a unit's memory it is told to; else the process is put into a
// cgroup of the older memory controller, of which systemd knows nothing.
func (s *story) starve(v *service, victim box.Process) {
	s.Helper()
	const limit = 128 << 20
	cgroup, err := s.Property(v.Unit, "ControlGroup")
	s.must(err)
	_, err = os.Stat(s.Path("/sys/fs/cgroup" + cgroup + "/memory.max"))
	switch {
	case err == nil:
		_, err := s.Systemctl("set-property", "--runtime", v.Unit, "MemoryMax="+strconv.Itoa(limit))
		s.must(err)
	case errors.Is(err, os.ErrNotExist):
		s.must(starveV1(s, victim, limit))
	default:
		s.Fatal(err)
	}
	s.must(victim.Kill(unix.SIGUSR1))
	s.must(s.Wait("the server was killed", func() (bool, error) {
		return unix.Kill(victim.Pid, 0) == unix.ESRCH, nil
	}))
}

func starveV1(s *story, victim box.Process, limit int) error {
	const root = "/sys/fs/cgroup/memory"
	if _, err := os.Stat(root + "/memory.limit_in_bytes"); err != nil {
		return fmt.Errorf("no memory controller for the unit, nor the older one: %w", err)
	}
	dir, err := os.MkdirTemp(root, "grm-story-")
	if err != nil {
		return err
	}
	s.Cleanup(func() {
		// Killed processes leave it a moment later.
		if err := s.Wait("the memory cgroup is empty", func() (bool, error) { return unix.Rmdir(dir) == nil, nil }); err != nil {
			s.Error(err)
		}
	})
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "memory.limit_in_bytes"), []byte(strconv.Itoa(limit)), 0),
		os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(victim.Pid)), 0))
}

// TestActivateKilled kills grm-activate wherever it happens to be, again and again; TestFaults does so at each of its system calls.
func TestActivateKilled(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load()
	old := echo.instance()
	for range 5 {
		killed := echo.restartKilled()
		echo.settled("active")
		if now := echo.instance(); killed && now == old {
			echo.statusHas("failed", "killed")
		} else {
			old = now
		}
	}
	echo.restart()
	g.newFlowsAt(echo.instance(), 50)
	g.end()
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// restartKilled restarts, kills grm-activate wherever it happens to be, and says whether it was quick enough.
func (v *service) restartKilled() (killed bool) {
	v.s.Helper()
	old := v.instance()
	v.later("restart")
	v.s.must(v.s.Wait("grm-activate was killed, or was faster", func() (bool, error) {
		procs, err := v.s.Processes(v.Unit)
		for _, p := range procs {
			if p.Comm == "grm-activate" && !strings.Contains(strings.Join(p.Args, " "), "--stop") {
				killed = p.Kill(unix.SIGKILL) == nil || killed
			}
		}
		return killed || err != nil || v.instance() != old, err
	}))
	return killed
}

// TestStopKilled kills the commands of grm-activate that a unit runs when it stops, at a restart and at a stop. Neither loses anything at a
// restart; either of them is enough for a stop; and without both the instance lives on, and the next start takes over from it.
func TestStopKilled(t *testing.T) {
	for _, commands := range [][]string{{"ExecStop"}, {"ExecStopPost"}, {"ExecStop", "ExecStopPost"}} {
		t.Run(strings.Join(commands, " "), func(t *testing.T) {
			s := newStory(t)
			echo := s.install("echo", quickly("1s")...)
			lines := "[Service]\n"
			for _, command := range commands {
				lines += command + "=\n" + command + "=+/bin/sh -c 'kill -KILL $$$$'\n"
			}
			s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/killed.conf": lines}))
			echo.start()
			g := echo.load()
			old := echo.instance()
			echo.restart()
			if echo.instance() == old {
				t.Error("a restart brought no new instance")
			}
			g.newFlowsAt(echo.instance(), 50)
			both := len(commands) == 2
			if !both {
				g.end()
			}
			s.must(echo.Stop())
			echo.settled("failed") // as systemd sees it
			if procs := echo.processes(); (len(procs.Keepers)+len(procs.Servers) > 0) != both || procs.Decoy != nil || len(procs.Others) != 0 {
				t.Errorf("processes after the stop: %+v", procs)
			}
			shell("rm /etc/systemd/system/" + echo.Unit + ".d/killed.conf; systemctl daemon-reload")(echo)
			echo.start()
			if !both {
				g = echo.load()
			}
			g.newFlowsAt(echo.instance(), 50)
			g.end()
			echo.drained()
			echo.stores(4)
			s.must(echo.Stop())
			s.nothingLeft(echo)
		})
	}
}
