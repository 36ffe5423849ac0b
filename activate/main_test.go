package activate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"grm/config"
)

const (
	insideVar  = "GRM_ACTIVATE_TEST_INSIDE"
	holdVar    = "GRM_ACTIVATE_TEST_HOLD"    // the name of a process that holds its descriptors until its standard input ends
	commandVar = "GRM_ACTIVATE_TEST_COMMAND" // a shell script to start as TestCommand does
	cgroupRoot = "/sys/fs/cgroup"
)

// TestMain runs the tests in network and mount namespaces of their own, with a
// /run, a bpffs and a cgroup hierarchy to themselves. Without root, those that
// need it are skipped.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(holdVar) != "":
		hold(os.Getenv(holdVar))
	case os.Getenv(commandVar) != "":
		become(os.Getenv(commandVar))
	case os.Geteuid() != 0:
		os.Exit(m.Run())
	case os.Getenv(insideVar) == "":
		os.Exit(reexec())
	default:
		if err := setUp(); err != nil {
			fmt.Fprintln(os.Stderr, "set up tests:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
}

// hold plays a server or a keeper.
func hold(name string) {
	if err := os.WriteFile("/proc/self/comm", []byte(name), 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("up")
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test lets go
	os.Exit(0)
}

// become starts a command, or a script, with the sockets of TestCommand.
func become(script string) {
	req := Request{Service: "echo", User: "nobody", Command: []string{"/bin/sh", "-c", script}}
	if strings.HasPrefix(script, "/") {
		req.Command = []string{script}
	}
	for _, address := range []string{"udp://127.0.0.1:5201?sockets=2&name=a", "tcp://127.0.0.1:5201?name=b"} {
		l, err := config.ParseListener(address, config.DefaultListener())
		if err != nil {
			panic(err)
		}
		req.Listeners = append(req.Listeners, l)
	}
	fmt.Fprintln(os.Stderr, Start(context.Background(), req, Env{Log: os.Stderr}))
	os.Exit(1)
}

func reexec() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideVar+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
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

func setUp() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	for target, kind := range map[string]string{"/run": "tmpfs", "/sys/fs/bpf": "bpf", cgroupRoot: "cgroup2"} {
		// Where the hierarchy is a unified one, cgroup2 is there already, and that is refused.
		if err := unix.Mount(kind, target, kind, 0, ""); err != nil && !(kind == "cgroup2" && errors.Is(err, unix.EBUSY)) {
			return fmt.Errorf("mount %s on %s: %w", kind, target, err)
		}
	}
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

// enterCgroup makes a unit's cgroup for the test, with the test in it. It is
// gone at the end, and everybody in it.
func enterCgroup(t *testing.T, unit string) {
	t.Helper()
	home := ownCgroup(t)
	top := filepath.Join(cgroupRoot, fmt.Sprintf("grm-activate-%d", os.Getpid()))
	dir := filepath.Join(top, unit)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	move(t, dir)
	t.Cleanup(func() {
		move(t, home)
		if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Error(err)
		}
		eventually(t, "cgroup of the test is empty", func() bool { return os.Remove(dir) == nil })
		if err := os.Remove(top); err != nil {
			t.Error(err)
		}
	})
}

func ownCgroup(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, path, found := strings.Cut("\n"+string(text), "\n0::")
	if !found {
		t.Fatalf("no cgroup v2 in %q", text)
	}
	path, _, _ = strings.Cut(path, "\n")
	return filepath.Join(cgroupRoot, path)
}

func move(t *testing.T, cgroup string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
		t.Fatal(err)
	}
}
