// Fault runs a command in place of itself and lets one of its system calls go wrong: it fails with an error, or the process gets SIGKILL
// instead of an answer.
//
//	fault DIRECTORY COMMAND [ARGS…]
//
// What is to go wrong is in DIRECTORY/order, which is used up; without that file the command just runs. DIRECTORY/log has, afterwards, a line
// for each call that was seen: its name, its place among those of that name, and what it is about. A name is the system call's, with the
// command or option where a call has many: "openat", "bpf.MAP_CREATE", "setsockopt.1.15".
//
// The calls are counted over all threads, by a seccomp filter that asks another process about each of them. That one is a child, for the command
// keeps the pid that systemd knows; it leaves the unit's cgroup first, so that it is none of the service's processes, and it ends with the command.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Order is what is to go wrong, as JSON in the file "order".
type Order struct {
	Call  string     // its name; "": nothing goes wrong, only the log is written
	N     int        // which one of that name, from 1 on
	Errno unix.Errno // the error; 0: do what Kill says
	Kill  bool       // SIGKILL
}

// supervise is the first argument of the child.
const supervise = "--supervise"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fault:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: fault DIRECTORY COMMAND [ARGS…]")
	}
	dir, command := args[0], args[1:]
	if command[0] == supervise {
		return watch(dir)
	}
	order := filepath.Join(dir, "order")
	if err := os.Rename(order, order+".taken"); errors.Is(err, fs.ErrNotExist) {
		return unix.Exec(command[0], command, os.Environ())
	} else if err != nil {
		return err
	}
	child := exec.Command("/proc/self/exe", dir, supervise)
	child.Stderr = os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	// The filter is this thread's; an exec makes it the process's only one.
	runtime.LockOSThread()
	if err := install(); err != nil {
		return errors.Join(err, child.Process.Kill())
	}
	return unix.Exec(command[0], command, os.Environ()) // it is a call of the filter: it waits until the child is there
}

// take reads the order.
func take(dir string) (Order, error) {
	var o Order
	text, err := os.ReadFile(filepath.Join(dir, "order.taken"))
	if err == nil {
		err = json.Unmarshal(text, &o)
	}
	return o, err
}

// leaveCgroup moves this process to where systemd's own is.
func leaveCgroup() error {
	for _, group := range []string{"/sys/fs/cgroup/init.scope", "/sys/fs/cgroup"} {
		if err := os.WriteFile(group+"/cgroup.procs", []byte(strconv.Itoa(os.Getpid())), 0); err == nil {
			return nil
		}
	}
	return errors.New("no cgroup to go to")
}
