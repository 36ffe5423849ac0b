package decoy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/notify"
)

func TestPassThrough(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "say=WATCHDOG=1", "say=EXTEND_TIMEOUT_USEC=5", "say=RELOADING=1|MONOTONIC_USEC=7", "say=READY=1",
		"store=mine", "barrier", "say=FDSTOREREMOVE=1|FDNAME=other", "say=STATUS=café\tau lait").withControl()
	m.begun()
	m.report("barrier <nil>")
	for _, text := range []string{"WATCHDOG=1", "EXTEND_TIMEOUT_USEC=5", "RELOADING=1\nMONOTONIC_USEC=7", "FDSTORE=1\nFDNAME=mine", "BARRIER=1", "FDSTOREREMOVE=1\nFDNAME=other"} {
		m.until("systemd hears "+text, func() bool { return slices.Contains(m.said, text) })
	}
	if !slices.Contains(m.names(), "mine") {
		t.Errorf("fd store holds %q", m.names())
	}
	reloading := slices.Index(m.said, "RELOADING=1\nMONOTONIC_USEC=7")
	if !slices.Contains(m.said[reloading:], "READY=1") {
		t.Errorf("no READY=1 after the reload: %q", m.said)
	}
	m.hears(" · café au lait")
}

// A server that asks for more time gets it, while it starts and while it stops.
func TestExtendTimeout(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "ready")
	m := newManager(t, "say=EXTEND_TIMEOUT_USEC=60000000", "report=asked", "wait="+file, "say=READY=1").withControl()
	m.o.ReadyTimeout = 2 * time.Second
	m.activate(1)
	r := m.start()
	m.report("asked")
	for end := control.Now() + m.o.ReadyTimeout + time.Second; control.Now() < end; m.serve(10) {
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.hears("READY=1")
	r.leaves()
}

func TestReadyIsHeldBack(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "go")
	m := newManager(t, "say=READY=1", "barrier", "wait="+file).withControl()
	m.o.Ready, m.o.ReadyExec = Exec, []string{"test", "-e", file}
	m.activate(1)
	m.start()
	m.report("barrier <nil>")
	if m.heardBySystemd("READY=1") || m.ctl.Working() != -1 {
		t.Errorf("systemd heard %q before the probe was content", m.said)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.hears("READY=1\nSTATUS=gen 1 serving")
}

func TestForgery(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "say=MAINPID=1", "say=MAINPID=1|STATUS=mixed", "store=grm.ctl", "store=grm.echo.9.0",
		"say=FDSTOREREMOVE=1|FDNAME=grm.ctl|FDNAME=ok", "say=FDSTOREREMOVE=1|FDNAME=ok|FDNAME=grm.ctl", "say=NOTIFYACCESS=none", "say=X_EVIL=1|=|a", "say=STOPPING=0",
		"child=say=MAINPID=2|STOPPING=0|STATUS=from a grandchild;barrier;report=told;forever").withControl()
	m.activate(1)
	before := m.names()
	m.start()
	_, _ = m.report("told")
	m.hears("from a grandchild")
	for _, bad := range []string{"MAINPID", "NOTIFYACCESS", "X_EVIL", "STOPPING", "grm.ctl", "grm.echo.9"} {
		for _, s := range m.said {
			if strings.Contains(s, bad) {
				t.Errorf("systemd heard %q", s)
			}
		}
	}
	if after := m.names(); !slices.Equal(after, append(before, "grm.keeper.1")) {
		t.Errorf("fd store holds %q, before %q", after, before)
	}
}

// Whoever finds the socket is not believed for that.
func TestStranger(t *testing.T) {
	t.Parallel()
	m := newManager(t, "report=up").withControl()
	m.activate(1)
	r := m.start()
	m.report("up")
	var text string
	for _, s := range m.heard {
		if _, rest, found := strings.Cut(s, " start "); found {
			text = rest
		}
	}
	c, err := notify.Dial(environ(strings.Split(text, "\x01")).get(notify.Env))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Send("READY=1\nSTATUS=forged"); err != nil {
		t.Fatal(err)
	}
	if err := c.Barrier(patience); err != nil { // it was read, and answered
		t.Fatal(err)
	}
	if m.ctl.Working() != -1 || m.heardBySystemd("forged") {
		t.Errorf("a stranger was believed: systemd heard %q", m.said)
	}
	m.until("it is told", func() bool { return strings.Contains(r.stderr(), "it is none of this instance") })
}

// Nothing that a draining instance says reaches systemd, and nobody waits for
// ever who asks it for a barrier.
func TestDrainingIsSilent(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "speak")
	m := newManager(t, "say=READY=1", "wait="+file, "say=STATUS=old|WATCHDOG=1", "say=READY=1", "say=STOPPING=1", "say=RELOADING=1", "store=theirs", "barrier").withControl()
	m.o.DrainIdle = time.Hour
	first, server1 := m.begun()
	m.packet(m.bank[1], true)
	first.leaves()
	m.server = []string{"say=READY=1"}
	m.begun()
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	m.said = nil
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if pid, _ := m.report("barrier <nil>"); pid != server1 {
		t.Errorf("barrier of %d, want %d", pid, server1)
	}
	m.serve(50)
	for _, s := range m.said {
		if !strings.HasPrefix(s, "STATUS=gen 2 serving") || strings.Contains(s, "old") {
			t.Errorf("systemd heard %q", s)
		}
	}
}

// Megabytes of messages slow down who sends them, and nobody else.
func TestFlood(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "flood=2000", "report=flooded").withControl()
	r, _ := m.begun()
	r.signal(syscall.SIGUSR1)
	m.report("signal 10") // forwarded meanwhile
	if len(m.said) > 100 {
		t.Errorf("systemd heard %d messages", len(m.said))
	}
	r.leaves()
	for _, s := range m.said {
		if len(s) > 1000 {
			t.Errorf("systemd heard %d bytes", len(s))
		}
	}
}

func TestStopDespiteFlood(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1", "child=flood=1000000").withControl()
	r, server := m.begun()
	m.ctl.SetRequest(control.Stop)
	r.signal(syscall.SIGTERM)
	r.expect(0)
	if alive(server) {
		t.Error("the server lives")
	}
}

// A server that lost its parent is known by its session, one that left that by
// its parents.
func TestDescends(t *testing.T) {
	if descends(1, os.Getpid()) || descends(os.Getpid(), os.Getpid()) || descends(0, os.Getpid()) || descends(-1, os.Getpid()) {
		t.Error("a process descends from this one that does not")
	}
	p, err := os.StartProcess("/bin/sleep", []string{"sleep", "1000"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = p.Kill()
		_, _ = p.Wait()
	}()
	if !descends(p.Pid, os.Getpid()) {
		t.Error("a child does not descend from this process")
	}
	pids, err := descendants(os.Getpid())
	if err != nil || !slices.Contains(pids, p.Pid) {
		t.Errorf("descendants %v, %v", pids, err)
	}
	if _, err := openMember(p.Pid, "grm-keeper"); err == nil {
		t.Error("sleep was taken for a keeper")
	}
	if _, err := openMember(1, ""); err == nil {
		t.Error("process 1 was taken for one of this service's")
	}
	q, err := openMember(p.Pid, "sleep")
	if err != nil {
		t.Fatal(err)
	}
	q.kill(unix.SIGKILL)
	for !q.ended() {
		time.Sleep(time.Millisecond)
	}
	q.close()
}

// A sender outside of the keeper's pid namespace has the number 0, by which
// getsid(2) understands whoever asks; and keepers lead their sessions.
func TestSenderOutside(t *testing.T) {
	t.Parallel()
	m := newManager(t, "daemon=who;forever", "say=READY=1").withControl()
	r, _ := m.begun()
	if _, said := m.report("outside"); said != "outside: false" {
		t.Errorf("the leader of a session, of one that is outside: %s", said)
	}
	r.leaves()
}

// A server without grm's sockets that drains by itself lives beside the next
// one, whose socket its keeper must not remove.
func TestNotifyNames(t *testing.T) {
	if a, b := notifyName(0, 10), notifyName(0, 11); a == b {
		t.Errorf("two instances have one socket, %s", a)
	}
	if a, b := notifyName(7, 10), notifyName(7, 11); a != b {
		t.Errorf("the server of a killed keeper sends to %s, its new keeper listens at %s", a, b)
	}
}

// What a server says of itself is shown at root's terminal.
func TestClean(t *testing.T) {
	for given, want := range map[string]string{"é\t✓": "é ✓", "a\x1b[2J\u009b2J\u0085\x7f": "a [2J 2J  ", "\xff": ""} {
		if got := clean(given); got != want {
			t.Errorf("%q is shown as %q, want %q", given, got, want)
		}
	}
}

func FuzzJudge(f *testing.F) {
	f.Add("READY=1\nSTATUS=x\nMAINPID=1")
	f.Add("FDSTORE=1\nFDNAME=grm.ctl")
	f.Add("FDNAME=a\nFDSTOREREMOVE=1\nFDNAME=grm.x\nSTOPPING=1")
	f.Fuzz(func(t *testing.T, text string) {
		fields, err := notify.Parse([]byte(text))
		if err != nil {
			return
		}
		v := judge(fields)
		if v.status != nil && (len(*v.status) > maxStatus || strings.ContainsAny(*v.status, "\n\x00")) {
			t.Fatalf("status %q", *v.status)
		}
		v.pass(func(sent string) {
			again, err := notify.Parse([]byte(sent))
			if err != nil {
				t.Fatalf("%q became %q: %v", text, sent, err)
			}
			store := false
			for _, g := range again {
				store = store || strings.HasPrefix(g.Key, "FDSTORE")
			}
			for _, g := range again {
				switch g.Key {
				case "MAINPID", "STOPPING", "NOTIFYACCESS", "STATUS":
					t.Fatalf("%q became %q", text, sent)
				case "FDNAME":
					if store && strings.HasPrefix(g.Value, ours) {
						t.Fatalf("%q became %q", text, sent)
					}
				}
			}
		}, true)
	})
}
