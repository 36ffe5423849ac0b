package activate

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const firstFD = 3 // SD_LISTEN_FDS_START

// reserve takes the descriptors that a command's sockets will have, before
// anything else of this process gets one of those numbers. They are not let
// go: exec closes them.
func reserve(n int) error {
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	for fd := firstFD; fd < firstFD+n; fd++ {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			continue // inherited, or ours already
		}
		if err := unix.Dup3(null, fd, unix.O_CLOEXEC); err != nil {
			return fmt.Errorf("reserve descriptor %d: %w (raise the limit of open files)", fd, err)
		}
	}
	return nil
}

// exec becomes the command, which finds its sockets as one does that systemd
// has started.
func (s *start) exec() error {
	path, err := exec.LookPath(s.Command[0])
	if err != nil {
		return fmt.Errorf("command %s: %w", s.Command[0], err)
	}
	var names []string
	for _, l := range s.Listeners {
		for range int(l.Sockets) {
			names = append(names, l.Name)
		}
	}
	for i, fd := range s.sockets {
		if err := unix.Dup3(fd, firstFD+i, 0); err != nil {
			return fmt.Errorf("descriptor %d: %w", firstFD+i, err)
		}
	}
	env := listenEnv(os.Environ(), os.Getpid(), names)
	return fmt.Errorf("command %s: %w", path, unix.Exec(path, s.Command, env))
}

// listenEnv puts what sd_listen_fds(3) reads into an environment, in place of
// what somebody else was told.
func listenEnv(env []string, pid int, names []string) []string {
	var kept []string
	for _, entry := range env {
		switch key, _, _ := strings.Cut(entry, "="); key {
		case "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID":
		default:
			kept = append(kept, entry)
		}
	}
	return append(kept, "LISTEN_PID="+strconv.Itoa(pid), "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
}
