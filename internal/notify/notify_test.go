package notify

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func mustListen(t testing.TB, address string) *Listener {
	t.Helper()
	l, err := Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func mustDial(t testing.TB, address string) *Conn {
	t.Helper()
	c, err := Dial(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestSendAndReceive(t *testing.T) {
	for _, address := range []string{filepath.Join(t.TempDir(), "notify"), "@"} {
		l := mustListen(t, address)
		t.Setenv(Env, l.Address())
		c, err := Open()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.Send("READY=1\nSTATUS=a=b"); err != nil {
			t.Fatal(err)
		}
		m, err := l.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if m.Pid != os.Getpid() || m.UID != os.Getuid() || len(m.FDs) != 0 {
			t.Errorf("message from pid %d, uid %d with %d descriptors", m.Pid, m.UID, len(m.FDs))
		}
		fields, err := Parse(m.Text)
		if want := []Field{{"READY", "1"}, {"STATUS", "a=b"}}; err != nil || !slices.Equal(fields, want) {
			t.Errorf("received %v, %v", fields, err)
		}
		if _, err := l.Receive(); !errors.Is(err, ErrNone) {
			t.Errorf("empty socket: %v", err)
		}
	}
}

func TestStoreInBatches(t *testing.T) {
	l := mustListen(t, "@")
	c := mustDial(t, l.Address())
	fds := make([]int, 300)
	for i := range fds {
		fds[i] = 0
	}
	if err := c.Store("grm.x.1.0", fds...); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{253, 47} {
		m, err := l.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.FDs) != want || string(m.Text) != "FDSTORE=1\nFDNAME=grm.x.1.0\nFDPOLL=0" {
			t.Errorf("%q with %d descriptors, want %d", m.Text, len(m.FDs), want)
		}
		m.Close()
	}
	if err := c.Forget("grm.x.1.0"); err != nil {
		t.Fatal(err)
	}
	if m, _ := l.Receive(); string(m.Text) != "FDSTOREREMOVE=1\nFDNAME=grm.x.1.0" {
		t.Errorf("forget sent %q", m.Text)
	}
	for _, name := range []string{"", "a:b", "é", "a\nb", strings.Repeat("x", 256)} {
		if c.Store(name, 0) == nil || c.Forget(name) == nil {
			t.Errorf("name %q was taken", name)
		}
	}
}

func TestBarrier(t *testing.T) {
	l := mustListen(t, "@")
	c := mustDial(t, l.Address())
	done := make(chan error, 1)
	go func() { done <- c.Barrier(10 * time.Second) }()
	if err := l.Wait(10_000); err != nil {
		t.Fatal(err)
	}
	m, err := l.Receive()
	if err != nil || string(m.Text) != "BARRIER=1" || len(m.FDs) != 1 {
		t.Fatalf("barrier came as %q with %d descriptors, %v", m.Text, len(m.FDs), err)
	}
	select {
	case err := <-done:
		t.Errorf("barrier passed before it was answered: %v", err)
	default:
	}
	m.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := c.Barrier(time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("unanswered barrier: %v", err)
	}
}

func TestNobodyThere(t *testing.T) {
	t.Setenv(Env, "")
	c, err := Open()
	if c != nil || err != nil {
		t.Errorf("without a socket: %v, %v", c, err)
	}
	if err := errors.Join(c.Send("READY=1"), c.Store("x", 0), c.Forget("x"), c.Barrier(0), c.Close()); err != nil {
		t.Errorf("a nil Conn failed: %v", err)
	}
	for _, bad := range []string{"vsock:2:1", "relative", "@", strings.Repeat("/x", 60)} {
		t.Setenv(Env, bad)
		if _, err := Open(); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	gone := mustDial(t, filepath.Join(t.TempDir(), "gone"))
	if err := gone.Send("READY=1"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no such socket: %v", err)
	}
	if err := gone.Send("READY=1", make([]int, 254)...); err == nil {
		t.Error("254 descriptors went into one message")
	}
}

func TestTooLong(t *testing.T) {
	l := mustListen(t, "@")
	c := mustDial(t, l.Address())
	if err := c.Send(strings.Repeat("x", maxText+1)); err == nil {
		t.Error("a message that systemd would ignore was sent")
	}
	if err := unix.Sendmsg(c.fd, make([]byte, 3*maxText), nil, &c.to, 0); err != nil {
		t.Fatal(err)
	}
	m, err := l.Receive()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(m.Text); err == nil {
		t.Error("an overlong message was parsed")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("READY=1\nSTATUS=up"))
	f.Add([]byte("MAINPID=1\n\n=x\nA=\n\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		fields, err := Parse(data)
		if err != nil {
			return
		}
		again, err := Parse([]byte(Format(fields...)))
		if err != nil || !slices.Equal(fields, again) {
			t.Fatalf("%q parsed as %q, and that as %q, %v", data, fields, again, err)
		}
	})
}
