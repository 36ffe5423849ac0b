package decoy

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kept are the signals that are not forwarded: those that cannot be caught,
// those by which the kernel tells a process of its own faults, those of the Go
// runtime and of libc, and three that are about the process itself.
var kept = map[unix.Signal]bool{
	unix.SIGKILL: true, unix.SIGSTOP: true,
	unix.SIGILL: true, unix.SIGTRAP: true, unix.SIGBUS: true, unix.SIGFPE: true, unix.SIGSEGV: true, unix.SIGSTKFLT: true, unix.SIGSYS: true,
	unix.SIGPROF: true, 32: true, 33: true, 34: true,
	unix.SIGCHLD: true, unix.SIGPIPE: true, unix.SIGURG: true,
}

// signals calls handle for each signal. One that was ignored when the process
// started stays ignored, for its children too.
func (l *loop) signals(handle func(unix.Signal) error) error {
	var caught []os.Signal
	for s := unix.Signal(1); s <= 64; s++ {
		if !kept[s] && !signal.Ignored(s) {
			caught = append(caught, s)
		}
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("pipe for signals: %w", err)
	}
	arrived := make(chan os.Signal, 64)
	signal.Notify(arrived, caught...)
	go func() {
		for s := range arrived {
			_, _ = unix.Write(p[1], []byte{byte(s.(unix.Signal))}) // its reader lives as long as the process
		}
	}()
	l.add(p[0], func() error {
		var b [1]byte
		if n, err := unix.Read(p[0], b[:]); n != 1 {
			return fmt.Errorf("pipe for signals: %w", err)
		}
		return handle(unix.Signal(b[0]))
	})
	return nil
}

// How the sender of a SIGURG is established, which is mmdecoy's protocol: a
// server sends it to its parent to say "I drain, go". Package os/signal tells
// no sender, and the Go runtime sends SIGURG to its own threads to preempt
// them. So a keeper starts with the signal blocked, and with preemption by
// signals off, for otherwise the runtime would unblock it; its threads inherit
// the mask; and a signalfd tells who sent what is pending. The server gets back
// the mask and the GODEBUG that the decoy was started with.
const (
	debugVar  = "GODEBUG"
	noPreempt = "asyncpreemptoff=1"
	urgent    = 1 << (unix.SIGURG - 1)
)

// blockUrgent is e for a process that is to call urgentFrom.
func (e environ) blockUrgent() environ {
	if was := e.get(debugVar); was != "" {
		return e.set(debugVar, was+","+noPreempt)
	}
	return e.set(debugVar, noPreempt)
}

// unblockUrgent takes back what blockUrgent did.
func (e environ) unblockUrgent() environ {
	was := strings.TrimSuffix(strings.TrimSuffix(e.get(debugVar), noPreempt), ",")
	if was == "" {
		return e.without(debugVar)
	}
	return e.set(debugVar, was)
}

// urgentFrom calls handle with the sender of each SIGURG. Those that come
// before the last was read are one.
func (l *loop) urgentFrom(handle func(sender int) error) error {
	var set unix.Sigset_t
	set.Val[0] = urgent
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|unix.SFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("signalfd: %w", err)
	}
	l.add(fd, func() error {
		var info unix.SignalfdSiginfo
		_, err := unix.Read(fd, (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[:])
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("signalfd: %w", err)
		}
		return handle(int(info.Pid))
	})
	return nil
}
