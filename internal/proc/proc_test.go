package proc

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// waits makes this binary a process that ends with its standard input.
const waits = "GRM_PROC_TEST_WAITS"

func TestMain(m *testing.M) {
	if os.Getenv(waits) != "" {
		_, _ = io.Copy(io.Discard, os.Stdin) // its end is all that counts
		return
	}
	os.Exit(m.Run())
}

func TestOwnCgroupHasThisProcess(t *testing.T) {
	c, err := Own()
	if err != nil {
		t.Skip(err) // no cgroup v2 at all
	}
	pids, err := c.Pids()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(pids, os.Getpid()) {
		t.Fatalf("cgroup %s has %v, not this process %d", c, pids, os.Getpid())
	}
}

func TestContains(t *testing.T) {
	for _, c := range []struct {
		cgroup, path string
		want         bool
	}{
		{"/a.service", "/a.service", true},
		{"/a.service", "/a.service/.control", true},
		{"/a.service", "/a.service2", false},
		{"/a.service", "/", false},
		{"/", "/x", true},
	} {
		if got := (Cgroup{path: c.cgroup}).contains(c.path); got != c.want {
			t.Errorf("%s contains %s: %v", c.cgroup, c.path, got)
		}
	}
}

// A threaded cgroup, as whoever has Delegate= may make one, hides no process.
func TestPidsOfThreadedCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root, err := cgroupRoot()
	if err != nil {
		t.Skip(err) // no cgroup v2 at all
	}
	dir, err := os.MkdirTemp(root, "grm-proc-test-")
	if err != nil {
		t.Fatal(err)
	}
	child := filepath.Join(dir, "threads")
	t.Cleanup(func() {
		if err := errors.Join(os.Remove(child), os.Remove(dir)); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(child, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(child, "cgroup.type"), []byte("threaded"), 0); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), waits+"=1")
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = in.Close(), cmd.Wait() }() // its end is all that counts
	pid := cmd.Process.Pid
	for _, at := range []string{"cgroup.procs", "threads/cgroup.threads"} {
		if err := os.WriteFile(filepath.Join(dir, at), []byte(strconv.Itoa(pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if pids, err := (Cgroup{dir: dir}).Pids(); err != nil || !slices.Contains(pids, pid) {
		t.Errorf("%v, %v: not %d", pids, err, pid)
	}
}

// A unit of the same name in a container, or of a user's, is not the machine's.
func TestInUnit(t *testing.T) {
	for _, c := range []struct {
		root, path string
		want       bool
	}{
		{"/init.scope", "/system.slice/echo.service", true},
		{"/init.scope", "/system.slice/system-echo.slice/echo.service/worker", true},
		{"/init.scope", "/echo.service", true},
		{"/init.scope", "/system.slice/_echo.service", true},
		{"/init.scope", "/system.slice/echo.service2", false},
		{"/init.scope", "/system.slice", false},
		{"/init.scope", "/machine.slice/one.scope/system.slice/echo.service", false},
		{"/init.scope", "/user.slice/user-1.slice/user@1.service/app.slice/echo.service", false},
		{"/docker/1/init.scope", "/docker/1/system.slice/echo.service", true},
		{"/docker/1/init.scope", "/docker/10/system.slice/echo.service", false},
		{"/docker/1/init.scope", "/system.slice/echo.service", false},
		{"/", "/echo.service", true},
	} {
		if got := (Cgroup{path: c.path}).isUnit("echo.service", c.root); got != c.want {
			t.Errorf("%s is echo.service's of %s: %v", c.path, c.root, got)
		}
	}
}

func TestUnit(t *testing.T) {
	for path, want := range map[string]string{
		"/system.slice/echo.service":      "echo.service",
		"/system.slice/_cpu.service":      "cpu.service",
		"/user.slice/session-1.scope":     "",
		"/system.slice/e@a\\x2db.service": "e@a\\x2db.service",
		"/":                               "",
	} {
		if got := (Cgroup{path: path}).Unit(); got != want {
			t.Errorf("unit of %s: %q, want %q", path, got, want)
		}
	}
}

func TestFindSignalWait(t *testing.T) {
	c, err := Own()
	if err != nil {
		t.Skip(err) // no cgroup v2 at all
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	p, err := c.Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.Wait(0) {
		t.Fatal("a sleeping process counts as ended")
	}
	if _, err := (Cgroup{path: "/nowhere"}).Find(cmd.Process.Pid); !errors.Is(err, ErrElsewhere) {
		t.Fatalf("found it in another cgroup: %v", err)
	}
	if Parent(cmd.Process.Pid) != os.Getpid() {
		t.Fatalf("parent of the child is %d", Parent(cmd.Process.Pid))
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !p.Wait(10 * time.Second) {
		t.Fatal("still there after SIGKILL")
	}
	_ = cmd.Wait() // killed, as it should be
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Fatalf("signal to a dead process: %v", err)
	}
	if _, err := c.Find(cmd.Process.Pid); !errors.Is(err, unix.ESRCH) {
		t.Fatalf("found a dead process: %v", err)
	}
}

func TestHolder(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		for _, local := range []string{"127.0.0.1:0", "[::1]:0"} {
			var addr netip.AddrPort
			if network == "udp" {
				c, err := net.ListenPacket(network, local)
				if err != nil {
					t.Skip(err) // no IPv6 here
				}
				defer c.Close()
				addr = c.LocalAddr().(*net.UDPAddr).AddrPort()
			} else {
				l, err := net.Listen(network, local)
				if err != nil {
					t.Skip(err) // no IPv6 here
				}
				defer l.Close()
				addr = l.Addr().(*net.TCPAddr).AddrPort()
			}
			none := func(uint64) bool { return false }
			o, found := Holder(network, addr, none)
			if !found || o.Pid != os.Getpid() || o.UID != os.Getuid() || o.Comm != Comm(os.Getpid()) {
				t.Errorf("holder of %s %s: %v, %v", network, addr, o, found)
			}
			if o, found := Twin(network, addr, none); !found || o.Pid != os.Getpid() {
				t.Errorf("twin of %s %s: %v, %v", network, addr, o, found)
			}
			if uid, found := UID(network, addr); !found || int(uid) != os.Getuid() {
				t.Errorf("uid of %s %s: %d, %v", network, addr, uid, found)
			}
			if o, found := Twin(network, netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()), none); found {
				t.Errorf("twin of the wildcard: %v", o)
			}
			if o, found := Holder(network, addr, func(uint64) bool { return true }); found {
				t.Errorf("our own socket was found: %v", o)
			}
		}
	}
}

// A process names itself: what it puts there reaches root's terminal.
func TestComm(t *testing.T) {
	const file = "/proc/self/comm"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"grm-keeper": "grm-keeper", "a\x1b[2J\nb": "a?[2J?b", "ü b": "ü b"} {
		if err := os.WriteFile(file, []byte(name), 0); err != nil {
			t.Fatal(err)
		}
		if got := Comm(os.Getpid()); got != want {
			t.Errorf("%q is %q, not %q", name, got, want)
		}
	}
	if err := os.WriteFile(file, before, 0); err != nil {
		t.Error(err)
	}
}

func TestStatField(t *testing.T) {
	for text, want := range map[string]string{
		"7 (a) S 3 7 7 0":     "3",
		"7 (a) b) (c) R 12 7": "12",
		"7 (a) S":             "",
		"":                    "",
		"garbage":             "",
	} {
		if got := statField([]byte(text), 4); got != want {
			t.Errorf("%q: field 4 is %q, want %q", text, got, want)
		}
	}
}

func TestStarted(t *testing.T) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	if at, now := Started(os.Getpid()), time.Duration(ts.Nano()); at <= 0 || at > now+Tick {
		t.Errorf("started at %v, now is %v", at, now)
	}
	if at := Started(1 << 30); at != 0 {
		t.Errorf("a process that does not exist started at %v", at)
	}
}

func TestSocketInodes(t *testing.T) {
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inode uint64
	if err := raw.Control(func(fd uintptr) { inode, err = Inode(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	inodes, err := SocketInodes(os.Getpid())
	if err != nil || !slices.Contains(inodes, inode) {
		t.Fatalf("%v, %v: no %d", inodes, err, inode)
	}
	if fd, err := SocketFD(os.Getpid(), inode); err != nil || fd < 0 {
		t.Fatalf("number of the socket: %d, %v", fd, err)
	}
	if fd, err := SocketFD(os.Getpid(), 1); err != nil || fd != -1 {
		t.Fatalf("number of a socket that is not there: %d, %v", fd, err)
	}
	if inodes, err := SocketInodes(1 << 30); err != nil || inodes != nil {
		t.Fatalf("a process that does not exist: %v, %v", inodes, err)
	}
}

// FuzzSocketLine: whatever the line, what is found in it is found again in what
// the kernel would print for that.
func FuzzSocketLine(f *testing.F) {
	f.Add([]byte("  12: 0100007F:1451 00000000:0000 07 00000000:00000000 00:00000000 00000000  1000        0 4711 2 0000000000000000 0"))
	f.Add([]byte("  12: 00000000000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 99 1"))
	f.Fuzz(func(t *testing.T, line []byte) {
		s, ok := parseSocket(line)
		if !ok {
			return
		}
		raw := s.local.Addr().AsSlice()
		for word := range slices.Chunk(raw, 4) {
			if littleEndian {
				slices.Reverse(word)
			}
		}
		printed := fmt.Sprintf("  1: %X:%04X 0:0 %02X 0:0 0:0 0 %d 0 %d 2", raw, s.local.Port(), s.state, s.uid, s.inode)
		if again, ok := parseSocket([]byte(printed)); !ok || again != s {
			t.Fatalf("%q is %+v, and %q is %+v", line, s, printed, again)
		}
	})
}

// FuzzStat: whatever a process calls itself, the fields behind its name are
// the kernel's, and a descriptor's link is a socket's only if it says so.
func FuzzStat(f *testing.F) {
	f.Add("a) b) (c", uint64(7))
	f.Add("socket:[12]", uint64(0))
	f.Fuzz(func(t *testing.T, name string, number uint64) {
		text := fmt.Sprintf("1 (%s) S %d 3 4", name, number)
		for field, want := range map[int]string{3: "S", 4: strconv.FormatUint(number, 10), 6: "4", 7: ""} {
			if got := statField([]byte(text), field); got != want {
				t.Fatalf("%q: field %d is %q, want %q", text, field, got, want)
			}
		}
		statField([]byte(name), 4)
		if inode, ok := socketInode(fmt.Appendf(nil, "socket:[%d]", number)); !ok || inode != number {
			t.Fatalf("inode %d is %d, %v", number, inode, ok)
		}
		if _, ok := socketInode([]byte(name)); ok && (!strings.HasPrefix(name, "socket:[") || !strings.HasSuffix(name, "]")) {
			t.Fatalf("%q is a socket's", name)
		}
	})
}
