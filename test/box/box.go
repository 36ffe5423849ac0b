// Package box boots a private, real systemd as PID 1 of its own mount, pid, uts, ipc, cgroup and network namespaces, in about 0.3 s.
//
// The host is not touched: the box's root file system is an overlay of the host's whose upper layer is a tmpfs, /dev, /run, /tmp and the
// unit directories are its own, its bpffs is its own, /proc/sys is read-only but for the network, and its systemd lives in a cgroup of its
// own. It works the same on a host whose PID 1 is a systemd, and on unified and hybrid cgroup hierarchies. All of it goes with [Box.Stop],
// or with the process that started it, however that one ends.
//
// A program that imports this package becomes the box's first process by running itself again (see init.go).
// Every wait in here has a deadline. It needs root, overlayfs and util-linux's nsenter.
package box

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// BinDir is where [Options.Bin] appears inside of a box.
const BinDir = "/usr/lib/grm"

// defaultTimeout bounds every wait and command in a box that was not given another limit.
const defaultTimeout = 60 * time.Second

// cgroupPrefix starts the name of every box's cgroup; the owner's pid and a counter follow.
const cgroupPrefix = "grm-box-"

// Options say what a box is to contain. The zero value is a minimal systemd without journal and bus.
type Options struct {
	// Journal runs systemd-journald, so that [Box.Journal] has something to read.
	Journal bool
	// DBus offers the system bus (dbus-daemon starts when somebody connects).
	DBus bool
	// Bin is a directory of the host that appears, read-only, at [BinDir].
	Bin string
	// Binds are further directories or files: path in the box → path on the host, read-only.
	Binds map[string]string
	// Root is the root file system to boot, the host's own by default. Another one brings another systemd.
	Root string
	// LogLevel is systemd's own, "info" by default.
	LogLevel string
	// Timeout bounds the boot and, later, every single wait and command; a minute by default.
	Timeout time.Duration
}

// Box is a running private systemd.
type Box struct {
	opts    Options
	pid     int
	cgroup  string // the box's cgroup in the host's hierarchy
	console *log   // what PID 1 wrote to its console and to stderr
	ptmx    *os.File
	slave   *os.File // held open: without one, reading ptmx ends with EIO, and a full terminal blocks PID 1

	kill   context.CancelFunc
	exited chan struct{} // closed once PID 1 was reaped
	stop   sync.Once
	err    error // of the stop
}

var counter atomic.Uint32

// Start boots a box. The caller ends it with [Box.Stop]; it also ends when ctx does, or when this process does.
func Start(ctx context.Context, o Options) (*Box, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start box: needs root (namespaces, mounts and a cgroup are made)")
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.LogLevel == "" {
		o.LogLevel = "info"
	}
	if o.Root == "" {
		o.Root = "/"
	}
	base, err := cgroupBase()
	if err != nil {
		return nil, fmt.Errorf("start box: %w", err)
	}
	sweep(base)
	b := &Box{
		opts:    o,
		cgroup:  filepath.Join(base, cgroupPrefix+strconv.Itoa(os.Getpid())+"-"+strconv.Itoa(int(counter.Add(1)))),
		console: &log{},
		exited:  make(chan struct{}),
	}
	if err := os.Mkdir(b.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("start box: make its cgroup: %w", err)
	}
	if err := b.boot(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start box: %w%s", err, b.console.tail()), b.Stop())
	}
	return b, nil
}

// TB is what a box needs of a test.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(func())
}

// ForTest is Start for a test: a failed boot ends the test, and the box is stopped when the test is over.
func ForTest(tb TB, o Options) *Box {
	tb.Helper()
	b, err := Start(context.Background(), o)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() {
		if err := b.Stop(); err != nil {
			tb.Errorf("%v", err)
		}
	})
	return b
}

// boot starts PID 1 and waits until systemd has finished starting up.
func (b *Box) boot(ctx context.Context) error {
	var slave string
	var err error
	if b.ptmx, slave, err = openPTY(); err != nil {
		return err
	}
	if b.slave, err = os.OpenFile(slave, os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		return fmt.Errorf("open the box's console: %w", err)
	}
	go io.Copy(b.console, b.ptmx) //nolint:errcheck // ends when the pty is closed by Stop

	spec, err := json.Marshal(bootSpec{Options: b.opts, Console: slave})
	if err != nil {
		return err
	}
	cg, err := os.Open(b.cgroup)
	if err != nil {
		return err
	}
	defer cg.Close()

	ctx, b.kill = context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{bootArg}
	cmd.Env = []string{bootEnv + "=" + string(spec)}
	cmd.Stderr = b.console
	cmd.WaitDelay = time.Second // nobody that outlives PID 1 can hold the pipe for longer
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
		UseCgroupFD: true,
		CgroupFD:    int(cg.Fd()),
		Setsid:      true,
		Pdeathsig:   syscall.SIGKILL,
	}
	started := make(chan error)
	go func() {
		// The parent-death signal follows the thread that forked, so this one has to live as long as the box.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it was killed: that is how boxes end
		}
		close(b.exited)
	}()
	if err := <-started; err != nil {
		return err
	}
	b.pid = cmd.Process.Pid
	return b.Wait("systemd is up", func() (bool, error) {
		select {
		case <-b.exited:
			return false, errors.New("PID 1 ended during boot")
		default:
		}
		if _, err := os.Stat(b.Path("/run/systemd/private")); err != nil {
			return false, nil // it does not listen yet
		}
		out, _ := b.Command(ctx, "systemctl", "is-system-running").Output()
		switch state := strings.TrimSpace(string(out)); state {
		case "running":
			return true, nil
		case "degraded", "maintenance":
			failed, _ := b.Systemctl("--failed", "--plain", "--no-legend")
			return false, fmt.Errorf("systemd came up %s: %s", state, failed)
		}
		return false, nil
	})
}

// Stop kills everything in the box and removes what the host had of it. Further calls return what the first one did.
func (b *Box) Stop() error {
	b.stop.Do(func() {
		if b.kill != nil {
			b.kill()
			<-b.exited // SIGKILL to the init of a pid namespace takes all of that namespace along before it is reaped
		}
		if b.ptmx != nil {
			b.ptmx.Close()
			b.slave.Close()
		}
		if err := b.Wait("its cgroup is gone", func() (bool, error) { return removeCgroup(b.cgroup) == nil, nil }); err != nil {
			b.err = fmt.Errorf("stop box: %w", errors.Join(err, removeCgroup(b.cgroup)))
		}
	})
	return b.err
}

// Pid is the host's number of the box's PID 1.
func (b *Box) Pid() int { return b.pid }

// NetNS is a path by which the box's network namespace can be entered.
func (b *Box) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", b.pid) }

// Console returns the end of what PID 1 wrote to its console: its log, unless a journal takes it.
func (b *Box) Console() string { return b.console.tail() }

// Wait polls until done says so or fails, at the longest for the box's timeout.
func (b *Box) Wait(what string, done func() (bool, error)) error {
	deadline := time.Now().Add(b.opts.Timeout)
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait until %s: not within %v", what, b.opts.Timeout)
		}
		time.Sleep(pause)
	}
}

// cgroupBase finds the mount point of the host's cgroup v2 hierarchy.
func cgroupBase() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified (mount one)")
}

// sweep removes the empty cgroups of boxes whose owner was killed before it could.
func sweep(base string) {
	dirs, _ := filepath.Glob(filepath.Join(base, cgroupPrefix+"*"))
	for _, dir := range dirs {
		owner, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), cgroupPrefix), "-")
		if pid, err := strconv.Atoi(owner); err == nil && unix.Kill(pid, 0) == unix.ESRCH {
			_ = removeCgroup(dir) // best effort: one that is still populated refuses
		}
	}
}

// removeCgroup removes a cgroup and all below it. None of them may hold a process.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			_ = removeCgroup(filepath.Join(dir, e.Name())) // the rmdir below tells
		}
	}
	if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// openPTY returns a new pseudo-terminal: the controlling end and the path of the other one.
func openPTY() (*os.File, string, error) {
	f, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, "", fmt.Errorf("open pseudo-terminal: %w", err)
	}
	var n int
	conn, err := f.SyscallConn()
	if err == nil {
		var e error
		err = conn.Control(func(fd uintptr) {
			if e = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); e == nil {
				n, e = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
			}
		})
		err = errors.Join(err, e)
	}
	if err != nil {
		f.Close()
		return nil, "", fmt.Errorf("unlock pseudo-terminal: %w", err)
	}
	return f, "/dev/pts/" + strconv.Itoa(n), nil
}

// log keeps the last part of what is written to it.
type log struct {
	mu  sync.Mutex
	buf []byte
}

const logSize = 64 << 10

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if over := len(l.buf) - logSize; over > 0 {
		l.buf = append(l.buf[:0], l.buf[over:]...)
	}
	return len(p), nil
}

// tail returns the kept part, on lines of its own, or nothing.
func (l *log) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buf) == 0 {
		return ""
	}
	return "\n" + string(bytes.ReplaceAll(l.buf, []byte("\r\n"), []byte("\n")))
}
