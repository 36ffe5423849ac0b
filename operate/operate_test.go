package operate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/control"
	"grm/inspect"
	"grm/internal/proc"
	"grm/internal/state"
)

// The test binary runs again in namespaces of its own, and as the processes of
// a service.
const asWhat = "GRM_OPERATE_TEST"

func TestMain(m *testing.M) {
	switch what := os.Getenv(asWhat); {
	case what == "process":
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the test lets go
		os.Exit(0)
	case os.Geteuid() != 0:
		os.Exit(m.Run())
	case what == "":
		os.Exit(reexec())
	}
	if err := furnish(); err != nil {
		fmt.Fprintln(os.Stderr, "set up tests:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func reexec() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), asWhat+"=inside")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "tests in namespaces:", err)
		return 1
	}
	return 0
}

// furnish gives the namespaces a /run and a bpffs.
func furnish() error {
	return errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"),
		unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700"),
	)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// process starts something that lives until it is let go.
func process(t *testing.T) (pid int, end func()) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asWhat+"=process")
	in, err := cmd.StdinPipe()
	check(t, err)
	check(t, cmd.Start())
	ended := false
	end = func() {
		if !ended {
			ended = true
			_ = in.Close() // this is what it waits for
			_ = cmd.Wait() // and this is its end, however it comes
		}
	}
	t.Cleanup(end)
	return cmd.Process.Pid, end
}

const address = "127.0.0.1:5201"

// aService is one that was made without systemd.
type aService struct {
	*testing.T
	s   *bpfprog.Service
	g   *bpfprog.Group
	dir *state.Dir
	st  *state.State
}

func newService(t *testing.T) *aService {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	a := &aService{T: t, st: state.New("echo")}
	var err error
	a.dir, err = state.Open(state.Root)
	check(t, err)
	a.s, err = bpfprog.CreateService("echo")
	check(t, err)
	a.g, err = bpfprog.CreateGroup(bpfprog.GroupSpec{Network: "udp", Address: netip.MustParseAddrPort(address),
		Dissector: bpfprog.Dissector{Kind: bpfprog.Flow, Timeout: time.Minute, Flows: 1024}})
	check(t, err)
	check(t, a.g.Join(0, a.s))
	t.Cleanup(func() {
		// Whatever the test has left.
		_ = errors.Join(a.g.Remove(), a.g.Close(), a.s.Remove(), a.s.Close(), a.dir.Remove("echo"), a.dir.Close())
	})
	return a
}

// generation gives sockets and a server to a bank, and new flows, with a watch
// that is far from over.
func (a *aService) generation(bank int, number uint64) (end func()) {
	a.Helper()
	const sockets = 2
	var open []net.PacketConn
	b := state.Bank{Bank: bank, Generation: number, Created: time.Now(), Listeners: []state.Listener{{Name: "echo", Address: "udp://" + address}}}
	check(a, a.g.SetBank(0, bank, number, sockets))
	for i := range sockets {
		lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }), err)
		}}
		c, err := lc.ListenPacket(context.Background(), "udp4", address)
		check(a, err)
		open = append(open, c)
		raw, err := c.(*net.UDPConn).SyscallConn()
		check(a, err)
		check(a, raw.Control(func(fd uintptr) {
			check(a, a.g.Put(0, bank, i, int(fd)))
			check(a, a.g.Attach(int(fd)))
			inode, err := proc.Inode(int(fd))
			check(a, err)
			b.Listeners[0].Inodes = append(b.Listeners[0].Inodes, inode)
		}))
	}
	a.st.Banks[bank], a.st.Generation = b, number
	a.st.Groups = []state.Group{{Address: "udp://" + address}}
	check(a, a.dir.Write(a.st))
	pid, endProcess := process(a.T)
	end = func() {
		endProcess()
		for _, c := range open {
			_ = c.Close() // nothing was written; it may be a second time
		}
	}
	a.Cleanup(end)
	m := a.s.Control()
	m.Assign(bank, number, control.Prepared)
	m.SetPids(bank, 0, pid)
	m.SetState(bank, control.Serving)
	m.SetReady(bank, control.Now(), control.Now()+time.Hour)
	m.Flip(bank)
	return end
}

func (a *aService) report() inspect.Service {
	a.Helper()
	r, err := inspect.Read()
	check(a, err)
	if !r.Complete || len(r.Problems) > 0 || len(r.Services) != 1 || len(r.Groups) != 1 {
		a.Fatalf("report %+v", r)
	}
	return r.Services[0]
}

func states(s inspect.Service) string {
	var all []string
	for _, g := range s.Generations {
		all = append(all, fmt.Sprintf("%d %s %d", g.Number, g.State, g.Sockets[0].Live))
	}
	return strings.Join(all, ", ")
}

func TestRollback(t *testing.T) {
	a := newService(t)
	a.generation(0, 1)
	if _, err := Rollback("echo"); !errors.Is(err, ErrLive) {
		t.Errorf("with one generation: %v", err)
	}
	endSecond := a.generation(1, 2)
	a.generation(2, 3)
	if got := states(a.report()); got != "3 watched 2, 2 standby 2, 1 standby 2" {
		t.Errorf("before: %s", got)
	}
	endSecond() // its keeper has not seen it yet: it must not be chosen
	got, err := Rollback("echo")
	if err != nil || got != (Rolled{Working: 1, Withdrawn: 3}) {
		t.Fatalf("rollback: %+v, %v", got, err)
	}
	m := a.s.Control()
	if order := m.Order().Banks(); order[0] != 0 || slices.Contains(order, 2) || !m.Alive(2) {
		t.Errorf("order %v, generation 3 alive: %v", order, m.Alive(2))
	}
	s := a.report()
	if s.Working != 1 || s.Failed == nil || s.Failed.Generation != 3 || s.Failed.Reason != "rolled back by hand" {
		t.Errorf("afterwards: working %d, failed %+v", s.Working, s.Failed)
	}
	if _, err := Rollback("nosuch"); !errors.Is(err, inspect.ErrNone) {
		t.Errorf("of no service: %v", err)
	}
}

func TestTold(t *testing.T) {
	for _, c := range []struct {
		args []string
		want bool
	}{
		{[]string{"--name", "x", "--", "server", "--drain-signal", "USR1"}, false},
		{[]string{"--drain-signal", "USR1", "--", "server"}, true},
		{[]string{"-drain-signal=USR1", "--", "server"}, true},
		{nil, false},
	} {
		cmd := exec.Command("/proc/self/exe", c.args...)
		cmd.Env = append(os.Environ(), asWhat+"=process")
		in, err := cmd.StdinPipe()
		check(t, err)
		check(t, cmd.Start())
		// Start returns when the exec is past failing, not when it is done.
		for line := []byte(nil); len(line) == 0; {
			line, err = os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
			check(t, err)
		}
		if got := told(cmd.Process.Pid); got != c.want {
			t.Errorf("%q: %v", c.args, got)
		}
		check(t, in.Close())
		check(t, cmd.Wait())
	}
	if !told(1 << 30) {
		t.Error("a keeper that is gone cannot be known to have told nothing")
	}
}

func TestDrain(t *testing.T) {
	a := newService(t)
	a.generation(0, 1)
	a.generation(1, 2)
	m := a.s.Control()
	got, err := Drain("echo", false)
	if err != nil || !slices.Equal(got, []uint64{1}) {
		t.Fatalf("drain: %v, %v", got, err)
	}
	if m.Bank(1).WatchUntil > control.Now() {
		t.Error("the watch goes on")
	}
	// A keeper begins to drain when it has seen the end of the watch.
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m.Bank(1).WatchUntil > control.Now() {
			time.Sleep(time.Millisecond)
		}
		m.SetDrainUntil(0, control.Now()+time.Hour)
		m.SetState(0, control.Draining)
	}()
	if _, err := Drain("echo", true); err != nil {
		t.Fatal(err)
	}
	<-done
	if m.Bank(0).DrainUntil > control.Now() {
		t.Error("the drain goes on")
	}
	if got := states(a.report()); got != "2 working 2, 1 draining 2" {
		t.Errorf("afterwards: %s", got)
	}
}

func TestDelete(t *testing.T) {
	a := newService(t)
	end := a.generation(0, 1)
	for _, force := range []bool{false, true} { // it is in no unit: nothing says that its processes may be ended
		if _, err := Delete("echo", force); !errors.Is(err, ErrLive) {
			t.Errorf("force %v, while it lives: %v", force, err)
		}
	}
	if _, err := Delete("udp://"+address, false); !errors.Is(err, ErrLive) || !strings.Contains(err.Error(), "echo") {
		t.Errorf("its group: %v", err)
	}
	end()
	removed, err := Delete("echo", false)
	if err != nil || !slices.Equal(removed, []string{"group udp://" + address, "service echo"}) {
		t.Fatalf("removed %q, %v", removed, err)
	}
	r, err := inspect.Read()
	if err != nil || len(r.Services)+len(r.Groups)+len(r.Problems) != 0 {
		t.Errorf("afterwards: %+v, %v", r, err)
	}
	if left, err := os.ReadDir(state.Root); err != nil || len(left) > 0 {
		t.Errorf("left in %s: %v, %v", state.Root, left, err)
	}
	if _, err := Delete("echo", false); !errors.Is(err, inspect.ErrNone) {
		t.Errorf("a second time: %v", err)
	}
	for name, want := range map[string]string{"udp://" + address: "nothing of that name", "udp://x": "address", "../etc": "name"} {
		if _, err := Delete(name, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("delete %s: %v", name, err)
		}
	}
}

// A server that became grm-activate's command is named nowhere: only its sockets tell that it lives.
func TestDeleteOfACommand(t *testing.T) {
	a := newService(t)
	end := a.generation(0, 1)
	a.s.Control().SetPids(0, 0, 0)
	if _, err := Delete("echo", false); !errors.Is(err, ErrLive) || !strings.Contains(err.Error(), "generation 1 has sockets open") {
		t.Errorf("while it lives: %v", err)
	}
	end()
	if removed, err := Delete("echo", false); err != nil || len(removed) != 2 {
		t.Errorf("removed %q, %v", removed, err)
	}
}

// What has been started while a delete waited for its turn lives.
func TestDeleteBesideAStart(t *testing.T) {
	a := newService(t)
	end := a.generation(0, 1)
	end()
	lock, err := a.dir.Lock(context.Background(), "echo")
	check(t, err)
	done := make(chan error)
	go func() {
		_, err := Delete("echo", false)
		done <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); lockFiles(t, "echo") < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the delete does not come to wait")
		}
	}
	a.generation(1, 2)
	check(t, lock.Unlock())
	if err := <-done; !errors.Is(err, ErrLive) {
		t.Errorf("it was deleted: %v", err)
	}
	a.report() // it is all there
}

// The same of a group.
func TestDeleteGroupBesideAStart(t *testing.T) {
	a := newService(t)
	lock, err := a.dir.Lock(context.Background(), state.GroupsLock)
	check(t, err)
	done := make(chan error)
	go func() {
		_, err := Delete("udp://"+address, false)
		done <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); lockFiles(t, state.GroupsLock) < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the delete does not come to wait")
		}
	}
	a.generation(0, 1)
	check(t, lock.Remove())
	if err := <-done; !errors.Is(err, ErrLive) {
		t.Errorf("it was deleted: %v", err)
	}
}

// lockFiles is how often this process has a lock file open.
func lockFiles(t *testing.T, name string) (n int) {
	fds, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	for _, fd := range fds {
		if link, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && link == state.Root+"/"+name+".lock" {
			n++
		}
	}
	return n
}

// A group whose sockets no record tells of is in use all the same, alone or by another service that shares it.
func TestDeleteGroupWithoutRecord(t *testing.T) {
	a := newService(t)
	a.generation(0, 1)
	check(t, os.RemoveAll(state.Root+"/echo"))
	if _, err := Delete("udp://"+address, false); !errors.Is(err, ErrLive) || !strings.Contains(err.Error(), "sockets in it, as app 0") {
		t.Errorf("while it lives: %v", err)
	}
	r, err := inspect.Read()
	check(t, err)
	if len(r.Groups) != 1 {
		t.Fatalf("groups %+v", r.Groups)
	}
	removed, err := leave(r.Groups[0], inspect.Service{Name: "second"}, 1)
	if err != nil || removed {
		t.Errorf("another service's end removes the group: %v, %v", removed, err)
	}
}

func TestDeleteGroup(t *testing.T) {
	newService(t) // the service has recorded nothing: nobody knows whose the group is
	removed, err := Delete("udp://"+address, false)
	if err != nil || !slices.Equal(removed, []string{"group udp://" + address}) {
		t.Fatalf("removed %q, %v", removed, err)
	}
	if keys, err := bpfprog.Groups(); err != nil || len(keys) != 0 {
		t.Errorf("groups afterwards: %v, %v", keys, err)
	}
}

func TestSnapshot(t *testing.T) {
	a := newService(t)
	a.generation(3, 1)
	s, err := inspect.Snapshot("udp://" + address)
	check(t, err)
	bank := s.Apps[0].Banks[3]
	if !s.Apps[0].Joined || s.Apps[0].Order.Working() != 3 || bank.Generation != 1 || bank.Sockets != 2 || len(bank.Dead) != 0 {
		t.Errorf("snapshot %+v", s.Apps[0])
	}
	used := 0
	for _, n := range s.Names {
		if n.Used {
			used++
		}
	}
	if used != 1 {
		t.Errorf("%d names are used", used)
	}
}
