package decoy

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/proc"
)

// Without grm's sockets grm-decoy is what mmdecoy is.

func TestEverySignal(t *testing.T) {
	t.Parallel()
	m := newManager(t, "ignore-term", "say=READY=1")
	r := m.start()
	server, _ := m.report("start")
	m.hears("READY=1")
	sent := 0
	for s := syscall.Signal(1); s <= 64; s++ {
		if kept[s] {
			continue
		}
		r.signal(s)
		if pid, _ := m.report(fmt.Sprintf("signal %d", int(s))); pid != server {
			t.Errorf("signal %d went to %d, want %d", s, pid, server)
		}
		sent++
	}
	if want := 64 - len(kept); sent != want {
		t.Errorf("%d signals sent, want %d", sent, want)
	}
	_ = unix.Kill(server, unix.SIGKILL)
	r.expect(128 + int(syscall.SIGKILL))
}

// A journal that went away costs words, and no process.
func TestNobodyListens(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	_ = reader.Close()
	m.stderr = writer
	r, server := m.begun()
	keeper := m.bankOf(1).Keeper
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(0)
	if alive(keeper) || alive(server) {
		t.Error("stopped, but something lives")
	}
}

func TestEveryStatus(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	for _, status := range []int{0, 1, 2, 3, 42, 77, 125, 126, 127, 128, 129, 200, 254, 255} {
		m.server = []string{"exit=" + strconv.Itoa(status)}
		m.start().expect(status)
	}
	m.o.Command = []string{"", "-c", "kill -$0 $$"}
	for s := 1; s <= 31; s++ {
		switch syscall.Signal(s) {
		case syscall.SIGCHLD, syscall.SIGURG, syscall.SIGWINCH, syscall.SIGCONT, // ignored by default
			syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU: // no death
			continue
		}
		m.o.Command = []string{"/bin/sh", "-c", fmt.Sprintf("ulimit -c 0; kill -%d $$", s)}
		m.start().expect(128 + s)
	}
}

func TestNoSuchServer(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	script := t.TempDir() + "/script"
	if err := os.WriteFile(script, []byte("#!/nonexistent/interpreter\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		command string
		status  int
		message string
	}{
		{"/nonexistent/server", 127, "run /nonexistent/server: no such file or directory (install it, or correct the command)"},
		{"no-such-server", 127, "run no-such-server: file does not exist in PATH="},
		{"/etc/passwd", 126, "run /etc/passwd: permission denied (it has to be a program that the service's user may execute)"},
		{"/tmp", 126, "run /tmp: permission denied"},
		{script, 126, "run " + script + ": its interpreter does not exist (install the one that it names)"},
	} {
		m.o.Command = []string{c.command}
		r := m.start()
		r.expect(c.status)
		if !strings.Contains(r.stderr(), c.message) {
			t.Errorf("%s: %q", c.command, r.stderr())
		}
	}
}

// mmdecoy's protocol: told to end, the server says that it drains, and the
// decoy goes.
func TestUrgentFromServer(t *testing.T) {
	t.Parallel()
	m := newManager(t, "urg-on-term", "say=READY=1")
	r := m.start()
	server, _ := m.report("start")
	m.hears("READY=1")
	r.signal(syscall.SIGTERM)
	m.report("signal 15")
	r.expect(0)
	if !alive(server) {
		t.Error("the server ended with its decoy")
	}
}

func TestUrgentFromGrandchild(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1")
	// More than once: one that has ended before anybody looks cannot be told from a stranger.
	m.o.Command = []string{"/bin/sh", "-c", "(for i in $(seq 100); do kill -URG $PPID; sleep 0.1; done) & sleep 1000"}
	m.start().expect(0)
}

func TestUrgentFromStranger(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "report=up")
	r := m.start()
	server, _ := m.report("up")
	keeper := proc.Parent(server)
	for range 1000 {
		_ = unix.Kill(keeper, unix.SIGURG)
		_ = unix.Kill(r.cmd.Process.Pid, unix.SIGURG)
	}
	r.signal(syscall.SIGUSR1) // both are still there to forward it
	m.report("signal 10")
}

func TestStopping(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "say=STOPPING=1")
	r := m.start()
	server, _ := m.report("start")
	r.expect(0)
	if !alive(server) || m.heardBySystemd("STOPPING") {
		t.Errorf("server alive %v; systemd heard %q", alive(server), m.said)
	}
	// One that ends after it has said so, has ended.
	m.server = []string{"say=READY=1", "say=STOPPING=1", "exit=7"}
	m.start().expect(7)
}

// stopped says whether a process was stopped, by a SIGSTOP.
func stopped(pid int) bool {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(text), ") T ")
}

// A server that is stopped has not ended.
func TestStoppedIsNotDead(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "report=up")
	r := m.start()
	server, _ := m.report("up")
	_ = unix.Kill(server, unix.SIGSTOP)
	m.until("it is stopped", func() bool { return stopped(server) })
	r.signal(syscall.SIGUSR1)
	_ = unix.Kill(server, unix.SIGCONT)
	m.report("signal 10")
	_ = unix.Kill(server, unix.SIGKILL)
	r.expect(137)
}

func TestEnvironmentWithoutSystemd(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	m.env = environ(m.env).without("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "SYSTEMD_EXEC_PID").set("GODEBUG", "gctrace=0").set("LISTEN_PIDFDID", "1").set("LISTEN_PIDX", "x")
	m.server = []string{"exit=0"}
	r := m.start()
	_, text := m.report("start")
	r.expect(0)
	_, text, _ = strings.Cut(text, " ")
	env := environ(strings.Split(text, "\x01"))
	for key, want := range map[string]string{
		"GODEBUG": "gctrace=0", "LISTEN_FDS": "", "LISTEN_PID": "", "LISTEN_PIDFDID": "", "LISTEN_PIDX": "x", "WATCHDOG_PID": "", "SYSTEMD_EXEC_PID": "", "GRM_STAGE": "", "GRM_GENERATION": "",
	} {
		if got := env.get(key); got != want {
			t.Errorf("server has %s=%q, want %q", key, got, want)
		}
	}
}

// Descriptors that are not grm's reach the server as they came.
func TestForeignDescriptors(t *testing.T) {
	t.Parallel()
	m := newManager(t, "report=up")
	m.put("b", 1)
	m.put("a", 2)
	m.put("b", 1)
	m.start()
	server, text := m.report("start")
	for _, want := range []string{"LISTEN_FDS=3", "LISTEN_FDNAMES=b:a:b", "LISTEN_PID=" + strconv.Itoa(server)} {
		if !strings.Contains(text, want) {
			t.Errorf("server lacks %s", want)
		}
	}
	// And nothing else does.
	m.o.Command = []string{"sleep", "1000"}
	m.start()
	sleeps := func() (pid int) {
		for _, pid := range m.processes() {
			if proc.Comm(pid) == "sleep" {
				return pid
			}
		}
		return 0
	}
	m.until("sleep runs", func() bool { return sleeps() != 0 })
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", sleeps()))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", sleeps(), f.Name()))
		if n, _ := strconv.Atoi(f.Name()); n > 5 && (strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:")) {
			t.Errorf("server has %s open: %s", f.Name(), target)
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	m := newManager(t)
	m.o.Listen = []string{"echo"}
	r := m.start()
	r.expect(ExitFailure)
	if !strings.Contains(r.stderr(), "no control map grm.ctl among the 0 descriptors from systemd") {
		t.Errorf("no map: %q", r.stderr())
	}
	m.put("grm.ctl", 0)
	r = m.start()
	r.expect(ExitFailure)
	if !strings.Contains(r.stderr(), "is no BPF map") {
		t.Errorf("not a map: %q", r.stderr())
	}
}

func TestRefusalsWithMap(t *testing.T) {
	t.Parallel()
	m := newManager(t).withControl()
	for _, c := range []struct {
		prepare func()
		message string
	}{
		{func() {}, "the control map has no plan for this start"},
		{func() { m.ctl.SetPlan(control.Plan{Verb: control.Start}) }, "bank 0 has no generation"},
		{func() { m.activate(0) }, "listener echo: no socket grm.echo.1.0 in the fd store"},
		{func() { m.plan(control.StandIn, 1) }, "stand in for gen 1: neither keeper nor server"},
	} {
		c.prepare()
		r := m.start()
		r.expect(ExitFailure)
		if !strings.Contains(r.stderr(), c.message) {
			t.Errorf("want %q: %q", c.message, r.stderr())
		}
	}
}
