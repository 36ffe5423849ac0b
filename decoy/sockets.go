package decoy

import (
	"fmt"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/internal/proc"
	"grm/internal/reuseport"
)

// lookEvery is how often a keeper looks at what its server does with the sockets
// that it was given.
const lookEvery = 5 * time.Second

// given is what a keeper knows of one of its server's sockets.
type given struct {
	waits string // the datagram that waited in it at the last look, as nobody took it; "": none
	left  bool   // it has left the group, as its server has closed it
	said  [len(oddities)]bool
}

// oddities are what servers do to their sockets that others can see.
var oddities = [...]struct {
	is   func(fd int) bool
	text string
}{
	{shutDown, "was shut down by its server"},
	{filtered, "has a filter of its server's, which decides what it gets"},
	{peered, "is connected, and gets nothing from others"},
	{deafListener, "does not listen any more"},
}

// lookAtSockets says, once for each socket, what its server has done to it. One
// that the server has closed is still in its group, as others have it open to
// be able to save what it holds: as soon as it is sure that nobody reads what
// waits there it leaves the group, so that the server's other sockets get the
// rest.
func (k *keeper) lookAtSockets(now time.Duration) {
	if !k.lookAt.due(now) {
		return
	}
	k.lookAt = timer(now + lookEvery)
	if k.given == nil {
		k.given = make([]given, len(k.sockets))
	}
	var stuck []int
	for i, s := range k.sockets {
		g := &k.given[i]
		for n, oddity := range oddities {
			if !g.said[n] && oddity.is(s.fd) {
				g.said[n] = true
				say("%s: socket %d of %s %s", k, s.index, s.listener, oddity.text)
			}
		}
		if g.left {
			continue
		}
		before := g.waits
		if g.waits = peek(s.fd); g.waits != "" && g.waits == before {
			stuck = append(stuck, i)
		}
	}
	if len(stuck) == 0 {
		return
	}
	open, hidden, err := k.openSockets()
	if err != nil || hidden {
		return // somebody may read it
	}
	for _, i := range stuck {
		s := k.sockets[i]
		inode, err := proc.Inode(s.fd)
		if err != nil || open[inode] {
			continue // who has it open may yet read it
		}
		if err := reuseport.Leave(s.fd); err != nil {
			say("%s: socket %d of %s: %v", k, s.index, s.listener, err)
			continue
		}
		k.given[i].left = true
		say("%s: socket %d of %s was closed by its server: others get its packets now", k, s.index, s.listener)
	}
}

// openSockets are the sockets that the server's processes have open, by inode,
// and whether one of them does not let itself be looked at.
func (k *keeper) openSockets() (inodes map[uint64]bool, hidden bool, err error) {
	pids, err := descendants(k.pid)
	if err != nil {
		return nil, false, err
	}
	if k.adopted {
		pids = append(pids, k.server.pid)
	}
	inodes = map[uint64]bool{}
	for _, pid := range pids {
		its, err := proc.SocketInodes(pid)
		hidden = hidden || err != nil
		for _, inode := range its {
			inodes[inode] = true
		}
	}
	return inodes, hidden, nil
}

// peek is the datagram that is next in a socket's queue, with its sender; ""
// if there is none, or this is a TCP listener.
func peek(fd int) string {
	var buf [512]byte
	n, from, err := unix.Recvfrom(fd, buf[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != nil {
		return ""
	}
	var sender strings.Builder
	switch from := from.(type) {
	case *unix.SockaddrInet4:
		fmt.Fprint(&sender, from.Addr, from.Port)
	case *unix.SockaddrInet6:
		fmt.Fprint(&sender, from.Addr, from.Port)
	}
	return sender.String() + " " + string(buf[:n])
}

func option(fd, name int) int {
	value, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, name)
	if err != nil {
		return 0
	}
	return value
}

func shutDown(fd int) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(poll, 0)
	return err == nil && n == 1 && poll[0].Revents&unix.POLLRDHUP != 0 && option(fd, unix.SO_TYPE) == unix.SOCK_DGRAM
}

// filtered asks for the length of the filter only: there is no room for more.
func filtered(fd int) bool {
	var length uint32
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_GET_FILTER, 0, uintptr(unsafe.Pointer(&length)), 0)
	return errno == 0 && length > 0 || errno == unix.EACCES // of an eBPF one
}

func peered(fd int) bool {
	_, err := unix.Getpeername(fd)
	return err == nil
}

func deafListener(fd int) bool {
	return option(fd, unix.SO_TYPE) == unix.SOCK_STREAM && option(fd, unix.SO_ACCEPTCONN) == 0
}
