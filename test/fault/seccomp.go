package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// calls are those that go wrong in real life, by number. Those of Go's own scheduler, timers and heap are not among them, nor close(2),
// nor fcntl(2), with which Go's library looks what kind of file it has.
var calls = map[uint32]string{
	unix.SYS_BPF: "bpf", unix.SYS_BIND: "bind", unix.SYS_CAPGET: "capget", unix.SYS_CONNECT: "connect", unix.SYS_EXECVE: "execve",
	unix.SYS_FCHMOD: "fchmod", unix.SYS_FCHMODAT: "fchmodat", unix.SYS_FCHOWN: "fchown", unix.SYS_FCHOWNAT: "fchownat",
	unix.SYS_FLOCK: "flock", unix.SYS_FSTAT: "fstat", unix.SYS_FSYNC: "fsync", unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_GETDENTS64: "getdents64",
	unix.SYS_GETPEERNAME: "getpeername", unix.SYS_GETSOCKNAME: "getsockname", unix.SYS_GETSOCKOPT: "getsockopt", unix.SYS_IOCTL: "ioctl",
	unix.SYS_LINKAT: "linkat", unix.SYS_LISTEN: "listen", unix.SYS_MKDIRAT: "mkdirat", unix.SYS_MMAP: "mmap", unix.SYS_MOUNT: "mount",
	unix.SYS_OPENAT: "openat", unix.SYS_OPENAT2: "openat2", unix.SYS_PIDFD_OPEN: "pidfd_open", unix.SYS_PIDFD_SEND_SIGNAL: "pidfd_send_signal",
	unix.SYS_PIPE2: "pipe2", unix.SYS_PREAD64: "pread64", unix.SYS_READ: "read", unix.SYS_READLINKAT: "readlinkat", unix.SYS_RECVFROM: "recvfrom",
	unix.SYS_RECVMSG: "recvmsg", unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2", unix.SYS_SENDMSG: "sendmsg", unix.SYS_SENDTO: "sendto",
	unix.SYS_SETSOCKOPT: "setsockopt", unix.SYS_SOCKET: "socket", unix.SYS_SOCKETPAIR: "socketpair", unix.SYS_STATFS: "statfs", unix.SYS_FSTATFS: "fstatfs",
	unix.SYS_SYMLINKAT: "symlinkat", unix.SYS_UNAME: "uname", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_WRITE: "write",
	sysFstatat: "fstatat",
}

// bpfCommands are bpf(2)'s, by number; another one is shown as its number.
var bpfCommands = map[uint64]string{
	unix.BPF_MAP_CREATE: "MAP_CREATE", unix.BPF_MAP_LOOKUP_ELEM: "MAP_LOOKUP", unix.BPF_MAP_UPDATE_ELEM: "MAP_UPDATE", unix.BPF_MAP_DELETE_ELEM: "MAP_DELETE",
	unix.BPF_MAP_GET_NEXT_KEY: "MAP_NEXT", unix.BPF_PROG_LOAD: "PROG_LOAD", unix.BPF_OBJ_PIN: "OBJ_PIN", unix.BPF_OBJ_GET: "OBJ_GET",
	unix.BPF_PROG_ATTACH: "PROG_ATTACH", unix.BPF_OBJ_GET_INFO_BY_FD: "OBJ_INFO", unix.BPF_BTF_LOAD: "BTF_LOAD", unix.BPF_LINK_CREATE: "LINK_CREATE",
	unix.BPF_LINK_UPDATE: "LINK_UPDATE", unix.BPF_MAP_FREEZE: "MAP_FREEZE", unix.BPF_PROG_QUERY: "PROG_QUERY",
}

// Offsets in struct seccomp_data.
const (
	dataNumber = 0
	dataArgs   = 16
)

// install makes a filter that reports the calls, for this thread and what it executes. The descriptor to listen at is closed by an exec.
func install() error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	var filter []unix.SockFilter
	add := func(code uint16, jt, jf uint8, k uint32) {
		filter = append(filter, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
	}
	add(load, 0, 0, dataNumber)
	for number := range calls {
		if number == unix.SYS_MMAP {
			continue
		}
		add(equal, 0, 1, number)
		add(ret, 0, 0, unix.SECCOMP_RET_USER_NOTIF)
	}
	// Memory without a file behind it is the heap's.
	add(equal, 0, 3, unix.SYS_MMAP)
	add(load, 0, 0, dataArgs+8*4)
	add(equal, 1, 0, 0xffffffff)
	add(ret, 0, 0, unix.SECCOMP_RET_USER_NOTIF)
	add(ret, 0, 0, unix.SECCOMP_RET_ALLOW)
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// Once a call is being asked about, a signal, which Go's scheduler sends all the time, must not start it anew.
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// call is struct seccomp_notif.
type call struct {
	ID      uint64
	Pid     uint32
	Flags   uint32
	Number  uint32
	Arch    uint32
	Pointer uint64
	Args    [6]uint64
}

// answer is struct seccomp_notif_resp.
type answer struct {
	ID    uint64
	Value int64
	Error int32
	Flags uint32
}

const (
	ioctlReceive = 3<<30 | uint(unsafe.Sizeof(call{}))<<16 | '!'<<8
	ioctlSend    = 3<<30 | uint(unsafe.Sizeof(answer{}))<<16 | '!'<<8 | 1
	goOn         = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
)

// watch is the child: it answers for each call of its parent, to the parent's end.
func watch(dir string) (err error) {
	order, err := take(dir)
	if err != nil {
		return err
	}
	if err := leaveCgroup(); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "log.new"))
	if err != nil {
		return err
	}
	// Whoever waits for the log finds it whole.
	defer func() { err = errors.Join(err, log.Close(), os.Rename(log.Name(), filepath.Join(dir, "log"))) }()
	parent, err := unix.PidfdOpen(os.Getppid(), 0)
	if err != nil {
		return err
	}
	listener, err := findListener(os.Getppid(), parent)
	if err != nil {
		return err
	}
	seen := map[string]int{}
	for {
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		} else if err != nil {
			return err
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return nil // nobody is left who could call
		}
		var c call
		if err := ioctl(listener, ioctlReceive, unsafe.Pointer(&c)); err == unix.ENOENT || err == unix.EINTR {
			continue // a signal came first
		} else if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		name := c.name()
		seen[name]++
		a := answer{ID: c.ID, Flags: goOn}
		mark := ""
		if name == order.Call && seen[name] == order.N {
			if order.Kill {
				mark = " KILLED"
				err = unix.PidfdSendSignal(parent, unix.SIGKILL, nil, 0)
			} else {
				mark = " " + unix.ErrnoName(order.Errno)
				a.Flags, a.Error = 0, -int32(order.Errno)
			}
		}
		if _, err2 := fmt.Fprintf(log, "%s %d%s %s\n", name, seen[name], mark, c.about()); err != nil || err2 != nil {
			return errors.Join(err, err2)
		}
		if err := ioctl(listener, ioctlSend, unsafe.Pointer(&a)); err != nil && err != unix.ENOENT {
			return fmt.Errorf("answer: %w", err)
		}
	}
}

// findListener takes a copy of the descriptor that the parent's filter reports to, which is not there at once.
func findListener(pid, pidfd int) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	for {
		names, err := os.ReadDir(dir)
		if err != nil {
			return -1, err
		}
		for _, name := range names {
			if target, _ := os.Readlink(filepath.Join(dir, name.Name())); !strings.Contains(target, "seccomp notify") {
				continue
			}
			number, err := strconv.Atoi(name.Name())
			if err != nil {
				return -1, err
			}
			return unix.PidfdGetfd(pidfd, number, 0)
		}
		if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 1); n > 0 || err != nil && err != unix.EINTR {
			return -1, errors.New("the parent has ended")
		}
	}
}

func ioctl(fd int, request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// name is what the call goes by in orders and the log.
func (c *call) name() string {
	name := calls[c.Number]
	switch c.Number {
	case unix.SYS_BPF:
		if command, ok := bpfCommands[c.Args[0]]; ok {
			return name + "." + command
		}
		return fmt.Sprintf("%s.%d", name, c.Args[0])
	case unix.SYS_SETSOCKOPT, unix.SYS_GETSOCKOPT:
		return fmt.Sprintf("%s.%d.%d", name, c.Args[1], c.Args[2])
	}
	return name
}

// about is the path that the call is about, or its first arguments.
func (c *call) about() string {
	at := -1
	switch c.Number {
	case unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_READLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_FCHMODAT, sysFstatat:
		at = 1
	case unix.SYS_STATFS, unix.SYS_EXECVE:
		at = 0
	}
	if at < 0 {
		return fmt.Sprintf("%#x %#x %#x", c.Args[0], c.Args[1], c.Args[2])
	}
	buf := make([]byte, 256)
	local := []unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}
	n, err := unix.ProcessVMReadv(int(c.Pid), local, []unix.RemoteIovec{{Base: uintptr(c.Args[at]), Len: len(buf)}}, 0)
	if err != nil {
		return "?"
	}
	path, _, _ := strings.Cut(string(buf[:n]), "\x00")
	return strconv.Quote(path)
}
