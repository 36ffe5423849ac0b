// Command init is the first and only program of a virtual machine of test/vm:
// it makes the file systems that tests need, runs what /plan.json says, one
// after the other, and turns the machine off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"grm/test/vm"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: I am not process 1 and would turn this machine off")
		os.Exit(1)
	}
	if err := run(); err != nil {
		fmt.Printf("%s%v\n", vm.FailMark, err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// Process 1 must not end; and if the machine cannot be turned off, the
	// deadline outside does it.
	select {}
}

func run() error {
	if err := prepare(); err != nil {
		return err
	}
	text, err := os.ReadFile("/plan.json")
	if err != nil {
		return err
	}
	var commands []vm.Command
	if err := json.Unmarshal(text, &commands); err != nil {
		return fmt.Errorf("/plan.json: %w", err)
	}
	for i, c := range commands {
		status, err := execute(c)
		if err != nil {
			return fmt.Errorf("%s: %w", c.Args[0], err)
		}
		fmt.Printf("%s%d %d\n", vm.ExitMark, i, status)
	}
	return nil
}

// prepare mounts what a system has, and brings the loopback interface up.
func prepare() error {
	for _, m := range []struct {
		kind, at string
	}{
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"devtmpfs", "/dev"},
		{"tmpfs", "/tmp"},
		{"tmpfs", "/run"},
		{"bpf", "/sys/fs/bpf"},
		{"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.at, err)
		}
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	return loopback()
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, request); err != nil {
		return fmt.Errorf("flags of lo: %w", err)
	}
	request.SetUint16(request.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// execute runs one command to its end, and reaps whatever else ends meanwhile:
// the orphans of all processes are process 1's. A death by signal is 128 and
// the signal, as in a shell.
func execute(c vm.Command) (int, error) {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return 0, err
	}
	binary, err := filepath.Abs(c.Args[0])
	if err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(binary, c.Args, &syscall.ProcAttr{
		Dir:   c.Dir,
		Env:   append([]string{"PATH=/bin", "HOME=/tmp"}, c.Env...),
		Files: []uintptr{0, 1, 2},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	for {
		var status syscall.WaitStatus
		ended, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case ended != pid:
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		default:
			return status.ExitStatus(), nil
		}
	}
}
