package bpfprog

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const inside = "GRM_BPFPROG_TEST_INSIDE"

var cgroupRoot string // a cgroup of the tests' own

// TestMain runs the tests in a network and a mount namespace of their own, in
// a cgroup of their own, with bpffs mounted. Without root, those that need it
// are skipped.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	code, err := runInside(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "set up tests:", err)
		code = 1
	}
	os.Exit(code)
}

func reexec() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "run tests in namespaces:", err)
		return 1
	}
	return 0
}

func runInside(m *testing.M) (code int, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 1, fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return 1, fmt.Errorf("bpffs: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "grm-bpfprog")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	if err := unix.Mount("cgroup2", dir, "cgroup2", 0, ""); err != nil {
		return 1, fmt.Errorf("cgroup2: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH)) }()
	cgroupRoot = filepath.Join(dir, "grm-bpfprog-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(cgroupRoot, 0o755); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.Remove(cgroupRoot)) }()
	if err := enterCgroup(cgroupRoot); err != nil {
		return 1, err
	}
	code = m.Run()
	return code, enterCgroup(dir)
}

func enterCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	return nil
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatalf("%v", err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
