package stories

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/test/box"
	"grm/test/load"
)

// has changes the echo example's server into test/server with bad habits.
func has(habits ...string) []string {
	words := []string{`"/usr/lib/grm/examples/echo"`, `"/usr/lib/grm/test/server"`}
	for _, habit := range habits {
		words[1] += ", " + strconv.Quote(habit)
	}
	return words
}

// newOdd boots a box in which test/server can be run.
func newOdd(t *testing.T) *story {
	s := newStory(t)
	s.must(buildTools())
	return s
}

// main is the newest server, or the process that goes on for it: what forges messages is none.
func (v *service) main() box.Process {
	v.s.Helper()
	procs := slices.DeleteFunc(v.processes().Servers, func(p box.Process) bool { return slices.Contains(p.Args, "forge") })
	if len(procs) == 0 {
		v.s.Fatalf("%s has no server", v.Unit)
	}
	return procs[len(procs)-1]
}

// TestOddServers restarts from one kind of server into the next, under one load.
func TestOddServers(t *testing.T) {
	s := newOdd(t)
	const address = "address = \"udp://0.0.0.0:5201\"\n"
	// The first is the one that a server keeps which closes what it does not know.
	settings := append(quickly("1s"), address, "name = \"echo\"\n"+address+"[[listen]]\nname = \"other\"\naddress = \"udp://0.0.0.0:5202\"\n")
	install := func(habits ...string) *service {
		return s.install("echo", append(slices.Clone(settings), has(habits...)...)...)
	}
	echo := install("forks")
	// Longer waits would only make the story longer.
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/timeout.conf": "[Service]\nTimeoutStopSec=3\n"}))
	echo.start()
	g := echo.load(func(o *load.Options) { o.Targets = echo.Targets()[:1] })
	for _, habit := range []string{"closes", "daemon", "execs", "deaf", "loud", "forger", "forks"} {
		g.Mark(habit)
		install(habit)
		echo.restart()
		if habit == "daemon" {
			s.must(s.Wait("the daemon's parent has ended", func() (bool, error) {
				return slices.ContainsFunc(echo.main().Args, func(arg string) bool { return strings.HasPrefix(arg, "answer=") }), nil
			}))
		}
		now := echo.main()
		name := strconv.Itoa(now.BoxPid)
		g.newFlowsAt(name, 100)
		switch habit {
		case "execs":
			_, err := s.Systemctl("kill", "--kill-who=main", "--signal=HUP", echo.Unit)
			s.must(err)
			s.must(s.Wait("it has executed itself again", func() (bool, error) {
				return echo.main().Comm == "exe", nil
			}))
		case "loud":
			echo.statusHas("loud")
		case "forger":
			echo.isItself()
		}
		g.more(2000)
	}
	g.end()
	echo.drained()
	lines, err := s.Journal(echo.Unit)
	s.must(err)
	// systemd has two lines for each process that is left at a restart; those do not count.
	if lines = slices.DeleteFunc(lines, func(line string) bool { return !strings.Contains(line, "grm-") || strings.Contains(line, "process") }); len(lines) > 80 {
		t.Errorf("%d lines in the journal:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	install("forks", "deaf")
	echo.restart()
	s.must(echo.Stop())
	// It had to be killed, which systemd does not forget.
	echo.active("failed")
	_, err = s.Systemctl("reset-failed", echo.Unit)
	s.must(err)
	s.nothingLeft(echo)
}

// isItself asserts that nothing which a server said has changed what the unit is.
func (v *service) isItself() {
	v.s.Helper()
	v.active("active")
	procs := v.processes()
	main, err := v.s.Property(v.Unit, "MainPID")
	v.s.must(err)
	if procs.Decoy == nil || strconv.Itoa(procs.Decoy.BoxPid) != main {
		v.s.Errorf("the main process is %s: %+v", main, procs)
	}
	// Two sockets, two flow tables, the control map and the way to the keeper, and as much of an older instance as the watch is not over.
	if n, err := v.s.FDStore(v.Unit); err != nil || n < 6 {
		v.s.Errorf("%d descriptors are in the store, %v", n, err)
	}
	if status, err := v.Status(); err != nil || strings.ContainsRune(status, '\x1b') {
		v.s.Errorf("status %q, %v", status, err)
	}
}

// TestBadServers restarts into versions that hang or are gone at once in further ways. The old one serves on.
func TestBadServers(t *testing.T) {
	s := newOdd(t)
	settings := quickly("30s")
	echo := s.install("echo", settings...)
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/timeout.conf": "[Service]\nTimeoutStartSec=4\n"}))
	echo.start()
	g := echo.load()
	old, before := echo.instance(), echo.remains()
	killed := uint64(0)
	// What is said of one that leaves depends on whether systemd heard that it was ready.
	for habit, says := range map[string]string{"dies": "SIGKILL", "leaves": "failed", "stops": "ready", "mute": "ready"} {
		g.Mark(habit)
		change := append(slices.Clone(settings), has(habit)...)
		if habit == "stops" {
			change = append(change, "[[listen]]", "[ready]\ntimeout = \"1s\"\n\n[[listen]]") // the decoy's timeout; for "mute" it is systemd's
		}
		s.install("echo", change...)
		_, err := echo.Restart()
		// Who dies after it was ready may do so before systemd has heard that, or after.
		if ready := habit == "dies" || habit == "leaves"; err == nil && !ready {
			t.Errorf("%s: the restart did not fail", habit)
		} else if ready {
			killed++
		}
		echo.servesOn(g, habit, old, before, says)
	}
	s.install("echo", quickly("0s")...)
	echo.restart()
	g.newFlowsAt(echo.instance(), 100)
	echo.balanced(g.stop(), killed)
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestIgnorant restarts into a version that says that it is ready and reads nothing. The probe finds out.
func TestIgnorant(t *testing.T) {
	s := newOdd(t)
	settings := quickly("30s")
	settings[1] = strings.Replace(settings[1], "[watch]\n", "[watch]\nprobe = [\"/usr/lib/grm/test/server\", \"ask\", \"127.0.0.1:5201\"]\n", 1)
	settings[1] = strings.Replace(settings[1], `timeout = "1m"`, `timeout = "3s"`, 1) // what waits in its queues it will never take
	echo := s.install("echo", settings...)
	echo.start()
	g := echo.load()
	old, before := echo.instance(), echo.remains()
	g.newFlowsAt(old, 300) // from here on flows begin all the time
	g.Mark("ignorant")
	s.install("echo", append(slices.Clone(settings), has("ignorant")...)...)
	echo.restart()
	echo.statusHas("gen 1 serving", "gen 2 failed", "probe")
	g.newFlowsAt(old, g.Snapshot().Instances[old].Flows+150)
	echo.drained()
	echo.servesOn(g, "ignorant", old, before, "probe")
	s.install("echo", quickly("0s")...) // without a probe, whose process would be taken for a server
	g.Mark("good")
	echo.restart()
	g.newFlowsAt(echo.instance(), 100)
	r := g.stop()
	// The probe's own datagram was discarded as well.
	if discarded := echo.discarded(); r.Lost+1 != discarded || r.Lost == 0 || r.Moved+r.Duplicated+r.Strange != 0 || s.overflow() != 0 {
		t.Errorf("%d datagrams were discarded, one of them the probe's: %v", discarded, r)
	}
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestChangesUser has a service of root's whose servers give that up, as many that know nothing of units do.
func TestChangesUser(t *testing.T) {
	s := newOdd(t)
	text := example(t, "echo", append(append(quickly("1s"), has("nobody")...), `user = "grm-echo"`, `user = "root"`)...)
	echo := s.installText(text + "\n[systemd.Service]\nCapabilityBoundingSet = \"CAP_SETUID CAP_SETGID CAP_KILL\"\nSystemCallFilter = []\n")
	echo.start()
	g := echo.load()
	for range 3 {
		echo.restart()
		g.newFlowsAt(echo.instance(), 100)
	}
	server := echo.server()
	status, err := s.ReadFile(fmt.Sprintf("/proc/%d/status", server.BoxPid))
	s.must(err)
	if !strings.Contains(status, "Uid:\t65534\t") {
		t.Errorf("the server did not change its user:\n%s", status)
	}
	g.end()
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestStoppedServer stops servers with SIGSTOP: their flows wait, new ones go to the next instance, and nothing is lost.
func TestStoppedServer(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load()
	stopped := echo.server()
	s.must(stopped.Kill(unix.SIGSTOP))
	g.more(2000)
	echo.restart()
	g.newFlowsAt(echo.instance(), 100)
	s.must(stopped.Kill(unix.SIGCONT))
	g.more(2000)
	// And one that is stopped while it serves alone.
	s.must(echo.server().Kill(unix.SIGSTOP))
	g.more(4000)
	s.must(echo.server().Kill(unix.SIGCONT))
	g.more(2000)
	g.end()
	echo.drained()
	s.must(echo.server().Kill(unix.SIGSTOP))
	s.must(echo.Stop())
	s.nothingLeft(echo)
}
