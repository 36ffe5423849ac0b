package decoy

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
)

// second is a service whose gen 1 serves and whose gen 2, a server with those
// steps, was just started.
func second(t *testing.T, change func(*Options), server ...string) (m *manager, r *run, server1 int) {
	t.Helper()
	m = newManager(t, "say=READY=1").withControl()
	first, server1 := m.begun()
	first.signal(syscall.SIGTERM)
	first.expect(0)
	m.server, m.said = server, nil
	if change != nil {
		change(&m.o)
	}
	m.activate(1)
	return m, m.start(), server1
}

func watched(o *Options) { o.Watch = time.Minute }

// leaves ends a decoy as a restart does.
func (r *run) leaves() {
	r.m.t.Helper()
	r.signal(syscall.SIGTERM)
	r.expect(0)
}

func TestDiesInWatch(t *testing.T) {
	t.Parallel()
	m, r, server1 := second(t, watched, "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1\nSTATUS=gen 2 serving since")
	m.hears("watched · gen 1 standing by")
	if m.ctl.Working() != m.bank[2] || m.bankOf(1).State != control.Serving {
		t.Fatalf("order %v, %+v", m.ctl.Order().Banks(), m.bankOf(1))
	}
	if !slices.Contains(m.names(), "grm.echo.1.0") {
		t.Fatalf("fd store lost the watched generation: %q", m.names())
	}
	_ = unix.Kill(server2, unix.SIGKILL)
	m.hears("STATUS=gen 1 serving; gen 2 failed: SIGKILL (")
	if m.ctl.Working() != m.bank[1] || m.ctl.Alive(m.bank[2]) || m.bankOf(2).State != control.Ended || !alive(server1) {
		t.Errorf("order %v, %+v", m.ctl.Order().Banks(), m.bankOf(2))
	}
	want := []string{"grm.echo.1.0", "grm.echo.1.1", "grm.keeper.1"}
	m.until("the failed generation leaves the store", func() bool { return slices.Equal(m.names(), want) })
	if p := m.ctl.Plan(); p.Verb != control.StandIn || p.Bank != m.bank[1] {
		t.Errorf("plan %+v", p)
	}
	// It speaks for gen 1 like any decoy: signals, and leaving.
	r.signal(syscall.SIGUSR2)
	if pid, _ := m.report("signal 12"); pid != server1 {
		t.Errorf("signal went to %d, want %d", pid, server1)
	}
	r.leaves()
	if !alive(server1) {
		t.Error("gen 1 did not survive")
	}
}

func TestReadyAndDeadAtOnce(t *testing.T) {
	t.Parallel()
	m, _, server1 := second(t, watched, "say=READY=1", "barrier", "exit=3")
	m.hears("gen 2 failed")
	m.until("gen 1 works", func() bool { return m.ctl.Working() == m.bank[1] })
	if !alive(server1) || m.ctl.Alive(m.bank[2]) {
		t.Error("gen 1 does not serve alone")
	}
}

func TestDiscardedIsCounted(t *testing.T) {
	t.Parallel()
	m, r, _ := second(t, watched, "deaf", "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1")
	m.fill(2, 7)
	_ = unix.Kill(server2, unix.SIGKILL)
	m.hears("gen 2 failed")
	m.until("the count is told", func() bool {
		return strings.Contains(r.stderr(), "decoytest gen 2: 7 datagrams discarded that its server had not taken")
	})
}

func TestWatchProbe(t *testing.T) {
	t.Parallel()
	well := filepath.Join(t.TempDir(), "well")
	if err := os.WriteFile(well, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m, _, server1 := second(t, func(o *Options) {
		o.Watch, o.WatchProbe, o.DrainIdle = time.Minute, []string{"test", "-e", well}, time.Minute
	}, "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1")
	m.packet(m.bank[2], true)
	if err := os.Remove(well); err != nil {
		t.Fatal(err)
	}
	m.hears("gen 1 serving; gen 2 failed: watch probe: exit 1")
	// Its flows are its own as long as it serves them.
	if m.ctl.Working() != m.bank[1] || !m.ctl.Alive(m.bank[2]) || !alive(server2) || !alive(server1) || m.bankOf(2).State != control.Draining {
		t.Errorf("order %v, alive %b, %+v", m.ctl.Order().Banks(), m.ctl.AliveBanks(), m.bankOf(2))
	}
	m.ctl.SetDrainUntil(m.bank[2], control.Now())
	m.until("gen 2 ends", func() bool { return !alive(server2) && m.bankOf(2).State == control.Ended })
}

func TestWatchProbeThatHangs(t *testing.T) {
	t.Parallel()
	m, _, _ := second(t, func(o *Options) { o.Watch, o.WatchProbe = time.Minute, []string{"sleep", "1000"} }, "say=READY=1")
	m.hears("gen 2 failed: watch probe: no answer within 5s")
}

func TestRollback(t *testing.T) {
	t.Parallel()
	m, _, server1 := second(t, watched, "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1")
	m.ctl.SetWatchUntil(m.bank[2], control.Now())
	m.ctl.SwapOrder(m.ctl.Order(), []int{m.bank[1]})
	m.hears("gen 1 serving; gen 2 failed: rolled back by hand (")
	m.until("gen 2 drains and ends", func() bool { return !alive(server2) })
	if !alive(server1) || m.ctl.Working() != m.bank[1] {
		t.Error("gen 1 does not serve")
	}
}

// A generation that was rolled back ends before its decoy has looked.
func TestRolledBackAndDeadAtOnce(t *testing.T) {
	t.Parallel()
	m, first, _ := second(t, nil, "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1")
	first.leaves()
	stdin, keepOpen, err := os.Pipe() // nothing can be read from it, as from a terminal
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	defer keepOpen.Close()
	m.stdin, m.said = stdin, nil
	watched(&m.o)
	r, server3 := m.begun()
	m.ctl.SwapOrder(m.ctl.Order(), []int{m.bank[2]})
	_ = unix.Kill(server3, unix.SIGKILL)
	m.hears("gen 2 serving; gen 3 failed: rolled back by hand (")
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(0)
	if alive(server2) {
		t.Error("stopped, but the server lives")
	}
}

// After the watch a crash is a crash: what waits in the sockets is for the next
// server.
func TestCrash(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	r, server := m.begun()
	_ = unix.Kill(server, unix.SIGKILL)
	r.expect(137)
	if m.ctl.Working() != m.bank[1] || !m.ctl.Alive(m.bank[1]) || m.bankOf(1).State != control.Serving {
		t.Errorf("order %v, %+v", m.ctl.Order().Banks(), m.bankOf(1))
	}
	c, err := net.Dial("udp", "127.0.0.1:"+strconv.Itoa(m.port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("sent to nobody")); err != nil {
		t.Fatal(err)
	}
	m.said = nil
	m.plan(control.Again, 1)
	again := m.start()
	m.hears("READY=1\nSTATUS=gen 1 serving")
	buf := make([]byte, 10)
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "1" {
		t.Errorf("the packet that waited: %q, %v", buf[:n], err)
	}
	// If that one fails too, the sockets still wait.
	_, _ = m.report("start")
	again.signal(syscall.SIGTERM)
	again.expect(0)
}

func TestAgainFails(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	r, server := m.begun()
	_ = unix.Kill(server, unix.SIGKILL)
	r.expect(137)
	m.server = []string{"exit=4"}
	m.plan(control.Again, 1)
	m.start().expect(4)
	if m.ctl.Working() != m.bank[1] || !slices.Contains(m.names(), "grm.echo.1.0") {
		t.Errorf("order %v, store %q", m.ctl.Order().Banks(), m.names())
	}
}

func TestDecoyKilled(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=STATUS=busy", "say=READY=1").withControl()
	r, server := m.begun()
	m.hears("busy")
	r.signal(syscall.SIGKILL)
	r.expect(-9)
	m.said = nil
	m.plan(control.StandIn, 1)
	standIn := m.start()
	m.hears("READY=1\nSTATUS=gen 1 serving since")
	m.hears("busy") // the keeper tells it again
	if m.ask(m.port) != "1" || !alive(server) {
		t.Error("gen 1 does not serve")
	}
	m.ctl.SetRequest(control.Stop)
	standIn.signal(syscall.SIGTERM)
	standIn.expect(0)
	if alive(server) {
		t.Error("stopped, but the server lives")
	}
}

func TestDecoyKilledBeforeReady(t *testing.T) {
	t.Parallel()
	m, r, server1 := second(t, nil)
	server2, _ := m.report("start")
	r.signal(syscall.SIGKILL)
	r.expect(-9)
	m.until("the attempt ends", func() bool { return !alive(server2) && m.bankOf(2).State == control.Ended })
	if m.ctl.Working() != m.bank[1] || !alive(server1) {
		t.Error("gen 1 does not serve")
	}
}

func TestKeeperKilled(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	r, server1 := m.begun()
	_ = unix.Kill(m.bankOf(1).Keeper, unix.SIGKILL)
	r.expect(137)
	if !alive(server1) || m.ctl.Working() != m.bank[1] || m.ask(m.port) != "1" {
		t.Error("the server does not go on")
	}
	// The next start replaces it as in a restart.
	next, server2 := m.begun()
	m.until("the orphan is drained", func() bool { return !alive(server1) && m.bankOf(1).State == control.Ended })
	if !alive(server2) || m.ctl.Working() != m.bank[2] {
		t.Error("gen 2 does not serve")
	}
	next.leaves()
}

// A draining instance whose keeper is killed gets a new one from the decoy that
// runs.
func TestKeeperOfDrainingKilled(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	m.o.DrainIdle = time.Hour
	first, server1 := m.begun()
	m.packet(m.bank[1], true)
	first.leaves()
	_, server2 := m.begun()
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	killed := m.bankOf(1).Keeper
	_ = unix.Kill(killed, unix.SIGKILL)
	m.until("it has a new keeper", func() bool { keeper := m.bankOf(1).Keeper; return keeper != killed && keeper != 0 })
	m.ctl.SetDrainUntil(m.bank[1], control.Now())
	m.until("gen 1 ends", func() bool { return !alive(server1) && m.bankOf(1).State == control.Ended })
	if !alive(server2) || m.ctl.Working() != m.bank[2] {
		t.Error("gen 2 does not serve")
	}
}

// An instance that stands by is killed together with its keeper: its flows are
// new flows at once, and what is stored of it does not wait for the watch's end.
// What waits in there is counted.
func TestKilledWithItsKeeper(t *testing.T) {
	t.Parallel()
	m, r, server1 := second(t, watched, "say=READY=1")
	m.hears("gen 1 standing by")
	m.until("its sockets are stored", func() bool { return slices.Contains(m.names(), "grm.echo.1.0") })
	_ = unix.Kill(server1, unix.SIGSTOP)
	m.until("it is stopped", func() bool { return stopped(server1) })
	m.fill(1, 7)
	_ = unix.Kill(m.bankOf(1).Keeper, unix.SIGKILL)
	_ = unix.Kill(server1, unix.SIGKILL)
	m.until("gen 1 is over", func() bool {
		return !m.ctl.Alive(m.bank[1]) && m.bankOf(1).State == control.Ended && !slices.Contains(m.names(), "grm.echo.1.0")
	})
	if m.ctl.Working() != m.bank[2] || !m.ctl.Alive(m.bank[2]) {
		t.Errorf("gen 2 does not work: order %v", m.ctl.Order().Banks())
	}
	m.until("the count is told", func() bool {
		return strings.Contains(r.stderr(), "gen 1: 7 datagrams discarded that its server had not taken")
	})
}

// All was killed, and grm-activate has taken back what nobody serves any more:
// the decoy counts what waits there, and throws it away. One that ends at once
// counts as well.
func TestOrphansAreCounted(t *testing.T) {
	t.Parallel()
	for _, server := range []string{"say=READY=1", "exit=4"} {
		m := newManager(t, "say=READY=1").withControl()
		r, server1 := m.begun()
		_ = unix.Kill(server1, unix.SIGKILL)
		r.expect(137)
		m.fill(1, 5)
		m.ctl.Withdraw(m.bank[1])
		m.ctl.Release(m.bank[1])
		m.server = []string{server}
		m.activate(1)
		r = m.start()
		m.until("the count is told", func() bool {
			return strings.Contains(r.stderr(), "gen 1: 5 datagrams discarded that its server had not taken")
		})
		m.until("nothing of it is stored", func() bool { return !slices.Contains(m.names(), "grm.echo.1.0") })
		if server == "exit=4" {
			r.expect(4)
		}
	}
}

// Both end at the same time in the watch, as systemctl kill has it. Each may
// take the other for the one that goes on: somebody's sockets have to wait.
func TestBothEndInWatch(t *testing.T) {
	t.Parallel()
	for range 5 {
		m, r, server1 := second(t, watched, "say=READY=1")
		server2, _ := m.report("start")
		m.hears("gen 1 standing by")
		_ = unix.Kill(server1, unix.SIGKILL)
		_ = unix.Kill(server2, unix.SIGKILL)
		m.until("the decoy ends", func() bool {
			select {
			case <-r.done:
				return true
			default:
				return false
			}
		})
		working := m.ctl.Working()
		if working < 0 || !m.ctl.Alive(working) || m.ctl.Bank(working).State != control.Serving {
			t.Fatalf("order %v", m.ctl.Order().Banks())
		}
		if name := socketName("echo", m.ctl.Bank(working).Generation, 0); !slices.Contains(m.names(), name) {
			t.Errorf("%s works, and is not among what is stored: %q", name, m.names())
		}
	}
}

// Keeper and server of the older instance are told apart also when it has to
// take over.
func TestGoBackToOrphan(t *testing.T) {
	t.Parallel()
	m, r, server1 := second(t, watched, "say=READY=1")
	server2, _ := m.report("start")
	m.hears("READY=1")
	killed := m.bankOf(1).Keeper
	_ = unix.Kill(killed, unix.SIGKILL)
	m.until("it is gone", func() bool { return !alive(killed) })
	_ = unix.Kill(server2, unix.SIGKILL)
	m.hears("gen 1 serving; gen 2 failed: SIGKILL")
	r.signal(syscall.SIGUSR1)
	if pid, _ := m.report("signal 10"); pid != server1 {
		t.Errorf("signal went to %d, want %d", pid, server1)
	}
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(0)
	m.until("the orphan has ended and init has seen it", func() bool { return !alive(server1) })
}

func TestStop(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what   string
		server []string
		status int
	}{
		{"ends on the signal", []string{"say=READY=1"}, 0},
		{"dies of the signal", []string{"default-signals", "say=READY=1"}, 0},
		{"was stopped by SIGSTOP", []string{"say=READY=1", "kill=19"}, 0},
	} {
		t.Run(c.what, func(t *testing.T) {
			m, first, server1 := second(t, watched, "say=READY=1")
			server2, _ := m.report("start")
			m.hears("READY=1")
			first.leaves()
			m.server, m.said = c.server, nil
			m.activate(1)
			r := m.start()
			server3, _ := m.report("start")
			m.hears("READY=1")
			if slices.Contains(c.server, "kill=19") {
				m.until("it is stopped", func() bool { return stopped(server3) })
			}
			m.ctl.SetRequest(control.Stop)
			m.ctl.SetClosing(true)
			r.signal(syscall.SIGTERM)
			r.expect(c.status)
			for i, pid := range []int{server1, server2, server3} {
				if alive(pid) {
					t.Errorf("server of gen %d lives", i+1)
				}
			}
			if left := m.processes(); len(left) > 0 {
				t.Errorf("processes left: %v", left)
			}
			if m.ctl.AliveBanks() != 0 {
				t.Errorf("alive %b", m.ctl.AliveBanks())
			}
		})
	}
}

func TestStopOfServerThatExitsBadly(t *testing.T) {
	t.Parallel()
	m := newManager(t).withControl()
	file := filepath.Join(t.TempDir(), "trapped")
	m.o.Command = []string{"/bin/sh", "-c", "trap 'exit 9' TERM; : >" + file + "; while :; do sleep 0.01; done"}
	m.o.Ready, m.o.ReadyExec = Exec, []string{"test", "-e", file}
	m.activate(1)
	r := m.start()
	m.hears("READY=1")
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(9)
}

func TestTermDuringStart(t *testing.T) {
	t.Parallel()
	m, r, server1 := second(t, nil)
	server2, _ := m.report("start")
	r.signal(syscall.SIGTERM)
	r.expect(0)
	if alive(server2) || !alive(server1) || m.ctl.Working() != m.bank[1] || m.bankOf(2).State != control.Ended {
		t.Errorf("server 1 alive %v, 2 alive %v, %+v", alive(server1), alive(server2), m.bankOf(2))
	}
	if want := []string{"grm.echo.1.0", "grm.echo.1.1", "grm.keeper.1"}; !slices.Equal(m.names(), want) {
		t.Errorf("fd store holds %q", m.names())
	}
}

func TestReadiness(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ready")
	m := newManager(t).withControl()
	m.o.Ready, m.o.ReadyExec, m.o.ReadyTimeout = Exec, []string{"test", "-e", file}, patience
	m.activate(1)
	r := m.start()
	m.report("start")
	m.hears("STATUS=gen 1 starting")
	if m.ctl.Working() != -1 || m.heardBySystemd("READY=1") {
		t.Error("ready before the probe says so")
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.hears("READY=1")
	r.leaves()

	m.said = nil
	m.o.Ready, m.o.ReadyDelay = Delay, time.Millisecond
	m.activate(1)
	m.start()
	m.hears("READY=1\nSTATUS=gen 2 serving")
}

// A daemon's main process ends well, and another goes on.
func TestDaemon(t *testing.T) {
	t.Parallel()
	m := newManager(t, "daemon=report=daemon;say=READY=1;forever", "wait=/", "exit=0").withControl()
	m.activate(1)
	r := m.start()
	daemon, _ := m.report("daemon")
	m.hears("READY=1")
	m.until("the daemon is the server", func() bool { return m.bankOf(1).Server == daemon })
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(0)
	if alive(daemon) {
		t.Error("the daemon lives")
	}
}

// It may be the main process that says that the daemon is ready, with its last
// breath.
func TestDaemonReadyByMain(t *testing.T) {
	t.Parallel()
	m := newManager(t, "daemon=report=daemon;forever", "wait=/", "say=READY=1", "exit=0").withControl()
	for range 5 {
		m.activate(1)
		m.said = nil
		r := m.start()
		daemon, _ := m.report("daemon")
		m.hears("READY=1")
		m.until("the daemon is the server", func() bool { return m.bankOf(m.gen).Server == daemon })
		r.leaves()
	}
}

// Workers do not outlive their server: they hold its sockets.
func TestWorkersEndWithServer(t *testing.T) {
	t.Parallel()
	m := newManager(t, "child=report=worker;forever", "daemon=report=worker;forever", "wait=/", "say=READY=1").withControl()
	r, server := m.begun()
	worker1, _ := m.report("worker")
	worker2, _ := m.report("worker")
	_ = unix.Kill(server, unix.SIGKILL)
	r.expect(137)
	if alive(worker1) || alive(worker2) {
		t.Error("a worker lives")
	}
}
