// Package proc reads what the kernel tells about processes, their cgroup and
// their sockets, and signals processes without believing a number: through a
// pidfd, and only if the process behind it is in the cgroup that it must be in.
package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup of the unified hierarchy, by its directory.
type Cgroup struct {
	dir  string // in the file system
	path string // as /proc/PID/cgroup has it
}

// Own is the cgroup of the calling process: that of its unit. Commands of a
// unit with Delegate= run in a .control below it, which is cut off.
func Own() (Cgroup, error) {
	c, err := Of(os.Getpid())
	c.dir, c.path = strings.TrimSuffix(c.dir, "/.control"), strings.TrimSuffix(c.path, "/.control")
	return c, err
}

// Of is the cgroup of a process.
func Of(pid int) (Cgroup, error) {
	path, err := cgroupOf(pid)
	if err != nil {
		return Cgroup{}, err
	}
	root, err := cgroupRoot()
	if err != nil {
		return Cgroup{}, err
	}
	return Cgroup{dir: filepath.Join(root, path), path: path}, nil
}

// CgroupRoots is where the unified hierarchy may be mounted: alone, or beside
// the old ones.
var CgroupRoots = [...]string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// cgroupRoot is the one where it is.
func cgroupRoot() (string, error) {
	for _, dir := range CgroupRoots {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted on /sys/fs/cgroup (boot with systemd.unified_cgroup_hierarchy=1)")
}

// cgroupOf reads the one line of /proc/PID/cgroup that is of cgroup v2.
func cgroupOf(pid int) (string, error) {
	name := fmt.Sprintf("/proc/%d/cgroup", pid)
	text, err := os.ReadFile(name)
	if err != nil {
		return "", err
	}
	for line := range bytes.Lines(text) {
		if path, ok := bytes.CutPrefix(line, []byte("0::")); ok {
			return strings.TrimSuffix(string(path), "\n"), nil
		}
	}
	return "", fmt.Errorf("%s has no line of cgroup v2 (boot with systemd.unified_cgroup_hierarchy=1)", name)
}

// String is the path as systemd writes it, such as /system.slice/echo.service.
func (c Cgroup) String() string { return c.path }

// Unit is the name of the systemd unit whose cgroup this is, "" if it is none's.
func (c Cgroup) Unit() string {
	if name := filepath.Base(c.path); strings.HasSuffix(name, ".service") {
		return strings.TrimPrefix(name, "_") // systemd escapes names that the kernel could take for its own
	}
	return ""
}

// IsUnit says whether the cgroup is that of a unit of the machine's service
// manager, process 1, or below it. One of a container, or of a user's manager,
// may have the same name.
func (c Cgroup) IsUnit(unit string) (bool, error) {
	manager, err := cgroupOf(1)
	return err == nil && c.isUnit(unit, manager), err
}

// isUnit is IsUnit with the cgroup of process 1: units are beside that one, in slices.
func (c Cgroup) isUnit(unit, manager string) bool {
	root := strings.TrimSuffix(strings.TrimSuffix(manager, "init.scope"), "/")
	rest, ok := strings.CutPrefix(c.path, root+"/")
	if !ok {
		return false
	}
	for name := range strings.SplitSeq(rest, "/") {
		if !strings.HasSuffix(name, ".slice") {
			return strings.TrimPrefix(name, "_") == unit
		}
	}
	return false
}

// Open opens the cgroup's directory.
func (c Cgroup) Open() (*os.File, error) { return os.Open(c.dir) }

// Pids lists the processes in the cgroup and below it.
func (c Cgroup) Pids() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a cgroup below that has just been removed
		}
		if err != nil || !d.IsDir() {
			return err
		}
		text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		// Those of a threaded cgroup, EOPNOTSUPP, are listed by the one above that it belongs to.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		for field := range bytes.FieldsSeq(text) {
			if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
				pids = append(pids, pid) // 0 is a process of another pid namespace
			}
		}
		return nil
	})
	return pids, err
}

// contains says whether a path of /proc/PID/cgroup is the cgroup or one below.
func (c Cgroup) contains(path string) bool {
	return path == c.path || strings.HasPrefix(path, strings.TrimSuffix(c.path, "/")+"/")
}

// All lists all processes that are visible.
func All() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Process is a process that cannot be mistaken for another one that got its
// number later.
type Process struct {
	Pid int
	fd  int
}

// ErrElsewhere says that a process is not in the cgroup.
var ErrElsewhere = errors.New("process is not in the cgroup")

// Find takes hold of process pid if it is in the cgroup. It fails with ESRCH
// if there is none, and with ErrElsewhere if it is another's.
func (c Cgroup) Find(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	path, err := cgroupOf(pid)
	switch {
	case err != nil:
		err = fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	case !c.contains(path):
		err = fmt.Errorf("process %d is in %s: %w", pid, path, ErrElsewhere)
	default:
		// What was read is of the pidfd's process only if that is still there.
		err = unix.PidfdSendSignal(fd, 0, nil, 0)
	}
	if err != nil {
		_ = unix.Close(fd) // a pidfd has nothing to flush
		return nil, err
	}
	return &Process{Pid: pid, fd: fd}, nil
}

// Signal sends a signal. One to a process that is already gone is no error.
func (p *Process) Signal(sig unix.Signal) error {
	if err := unix.PidfdSendSignal(p.fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send %s to process %d: %w", unix.SignalName(sig), p.Pid, err)
	}
	return nil
}

// Wait returns once the process has ended, or says false when the time is over.
func (p *Process) Wait(timeout time.Duration) bool {
	deadline := time.Now().Add(timeout)
	for {
		left := max(0, time.Until(deadline))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if n > 0 {
			return true
		}
		if left == 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
}

// Close lets go of the process.
func (p *Process) Close() error { return unix.Close(p.fd) }

// SocketInodes lists the inodes of the sockets that a process has open. A
// process that has gone meanwhile has none.
func SocketInodes(pid int) ([]uint64, error) {
	var inodes []uint64
	err := eachSocket(pid, func(_ string, inode uint64) bool {
		inodes = append(inodes, inode)
		return true
	})
	return inodes, err
}

// SocketFD is the number under which a process has a socket open, -1 if it has not.
func SocketFD(pid int, inode uint64) (int, error) {
	fd := -1
	err := eachSocket(pid, func(name string, found uint64) bool {
		if n, err := strconv.Atoi(name); err == nil && found == inode {
			fd = n
		}
		return fd < 0
	})
	return fd, err
}

// eachSocket goes through the sockets of a process until yield says false.
func eachSocket(pid int, yield func(fd string, inode uint64) bool) error {
	dir, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return ignoreGone(err)
	}
	defer dir.Close()
	fds, err := dir.Readdirnames(-1)
	if err != nil {
		return ignoreGone(err)
	}
	var buf [64]byte
	for _, fd := range fds {
		n, err := unix.Readlinkat(int(dir.Fd()), fd, buf[:])
		if err != nil {
			if err := ignoreGone(err); err != nil {
				return err // not known to be no socket
			}
			continue // closed meanwhile
		}
		if inode, ok := socketInode(buf[:n]); ok && !yield(fd, inode) {
			return nil
		}
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// socketInode reads "socket:[123]".
func socketInode(link []byte) (uint64, bool) {
	digits, ok := bytes.CutPrefix(link, []byte("socket:["))
	if !ok || len(digits) == 0 || digits[len(digits)-1] != ']' {
		return 0, false
	}
	inode, err := strconv.ParseUint(string(digits[:len(digits)-1]), 10, 64)
	return inode, err == nil
}

// Inode is the inode of an open file: for a socket, what SocketInodes lists.
func Inode(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat descriptor %d: %w", fd, err)
	}
	return st.Ino, nil
}

// Comm is the name that a process goes by, "" if it is gone. The process chooses
// it: what cannot be printed is a question mark.
func Comm(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.TrimSuffix(string(text), "\n"))
}

// Parent is the pid of a process's parent; 0 if it has none or is gone.
func Parent(pid int) int {
	ppid, err := strconv.Atoi(stat(pid, 4))
	if err != nil || ppid < 0 {
		return 0
	}
	return ppid
}

// Tick is how exact Started is.
const Tick = 10 * time.Millisecond // 1/USER_HZ

// Started is when a process was started, on CLOCK_BOOTTIME; 0 if it is gone.
func Started(pid int) time.Duration {
	ticks, err := strconv.ParseInt(stat(pid, 22), 10, 48)
	if err != nil || ticks < 0 {
		return 0
	}
	return time.Duration(ticks) * Tick
}

// stat reads a field of /proc/PID/stat, "" if the process is gone.
func stat(pid, field int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return statField(text, field)
}

// statField finds a field after the second one, counting from 1. The second
// one is a name in parentheses that may contain anything, parentheses included.
func statField(text []byte, field int) string {
	end := bytes.LastIndexByte(text, ')')
	if end < 0 {
		return ""
	}
	fields := bytes.Fields(text[end+1:])
	if i := field - 3; i < len(fields) {
		return string(fields[i])
	}
	return ""
}
