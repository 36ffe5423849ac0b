package decoy

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"grm/internal/proc"
)

// process is one that this one watches, by its pidfd. The zero value is none.
type process struct {
	pid   int
	pidfd int
}

// spawn starts this program again to play another part, with the same command
// line. files become its descriptors from 0 on and stay the caller's.
func spawn(argv0 string, env environ, files []int, sys syscall.SysProcAttr) (process, error) {
	attr := syscall.ProcAttr{Env: env, Sys: &sys}
	for _, fd := range files {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	p := process{pidfd: -1}
	sys.PidFD = &p.pidfd
	path := self()
	argv := append([]string{argv0}, os.Args[1:]...)
	var err error
	if p.pid, err = syscall.ForkExec(path, argv, &attr); err != nil {
		return process{}, fmt.Errorf("start %s: %w", path, err)
	}
	return p, nil
}

// open watches a process that is not a child.
func open(pid int) (process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return process{pid, fd}, nil
}

func (p *process) close() {
	if p.pid != 0 {
		_ = unix.Close(p.pidfd) // nothing is written to it
	}
	*p = process{}
}

// kill sends s, to nobody if the process has ended.
func (p process) kill(s unix.Signal) {
	if p.pid != 0 {
		_ = unix.PidfdSendSignal(p.pidfd, s, nil, 0) // ESRCH: it has ended, which its pidfd tells
	}
}

// ended says whether the process is gone or a zombie.
func (p process) ended() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}

// reap takes the status of every child that has ended. A child that stops has
// not.
func reap(each func(pid int, status syscall.WaitStatus)) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		each(pid, ws)
	}
}

// exitStatus is a child's status as a shell has it.
func exitStatus(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// describe is the exit status of a server or a probe in words.
func describe(status int) string {
	switch {
	case status == ExitNotFound:
		return "exit 127 (no such command)"
	case status == ExitCannotExec:
		return "exit 126 (cannot be executed)"
	case status > 128 && status <= 128+64: // there are no more signals; 255 is exit(-1)
		return signalName(unix.Signal(status - 128))
	}
	return fmt.Sprintf("exit %d", status)
}

// signalName is a signal as an operator knows it.
func signalName(s unix.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", int(s)) // the real-time ones have no names
}

// signalWord is a signal as a server reads it in its environment.
func signalWord(s unix.Signal) string {
	if name := unix.SignalName(s); name != "" {
		return name
	}
	return strconv.Itoa(int(s))
}

// maxDepth bounds walks up the process tree, which can change meanwhile.
const maxDepth = 256

// descends says whether pid is a descendant of ancestor, which leads a session
// and is a subreaper: a process in that session is one, and any other's line of
// parents leads there.
func descends(pid, ancestor int) bool {
	if pid == 0 {
		return false // outside of this pid namespace; getsid(2) would answer for whoever asks
	}
	if sid, err := unix.Getsid(pid); err == nil && sid == ancestor {
		return pid != ancestor
	}
	for range maxDepth {
		switch pid = proc.Parent(pid); pid {
		case ancestor:
			return true
		case 0:
			return false
		}
	}
	return false
}

// descendants are the processes below ancestor.
func descendants(ancestor int) ([]int, error) {
	pids, err := proc.All()
	if err != nil {
		return nil, err
	}
	parents := map[int]int{}
	for _, pid := range pids {
		parents[pid] = proc.Parent(pid)
	}
	var found []int
	for _, pid := range pids {
		at := pid
		for range maxDepth {
			if at = parents[at]; at == 0 || at == ancestor {
				break
			}
		}
		if at == ancestor && pid != ancestor {
			found = append(found, pid)
		}
	}
	return found, nil
}

// openMember watches the process with that pid if it is in this unit's cgroup
// and, unless comm is empty, goes by that name. The pid comes from the control
// map, where it may be old or forged.
func openMember(pid int, comm string) (process, error) {
	if pid <= 1 || pid == os.Getpid() {
		return process{}, fmt.Errorf("process %d: not one of this service's", pid)
	}
	p, err := open(pid)
	if err != nil {
		return process{}, err
	}
	if err = member(pid, comm); err == nil && p.ended() {
		err = unix.ESRCH // what was read could be of another process
	}
	if err != nil {
		p.close()
		return process{}, fmt.Errorf("process %d: not one of this service's: %w", pid, err)
	}
	return p, nil
}

func member(pid int, comm string) error {
	if name := proc.Comm(pid); comm != "" && name != comm {
		return fmt.Errorf("it is %q, not %q", name, comm)
	}
	own, err := proc.Own()
	if err != nil {
		return err
	}
	its, err := proc.Of(pid)
	if err == nil && its != own {
		err = fmt.Errorf("it is in cgroup %s", its)
	}
	return err
}
