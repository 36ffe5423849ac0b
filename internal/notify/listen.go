package notify

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Listener is the service manager's end of the protocol.
type Listener struct {
	fd      int
	address string
	text    [maxText + 1]byte
	control []byte
}

// Message is one message as it came. Pid and UID are the kernel's word for who
// sent it, Pid as the listener's pid namespace counts, 0 for one outside it.
// The descriptors are the receiver's to close.
type Message struct {
	Text []byte // only until the next Receive
	Pid  int
	UID  int
	FDs  []int
}

// Close closes the message's descriptors.
func (m Message) Close() {
	for _, fd := range m.FDs {
		_ = unix.Close(fd) // received, so never written through this number
	}
}

// Listen makes a socket for senders: at a path, or at @ and an abstract name;
// "@" alone lets the kernel choose a free one.
func Listen(address string) (*Listener, error) {
	if address != "@" {
		if err := checkAddress(address); err != nil {
			return nil, err
		}
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	l := &Listener{fd: fd, control: make([]byte, unix.CmsgSpace(4*maxFDs)+unix.CmsgSpace(unix.SizeofUcred))}
	if err := l.bind(address); err != nil {
		_ = unix.Close(fd) // nothing was received yet
		return nil, fmt.Errorf("notify socket %s: %w", address, err)
	}
	return l, nil
}

func (l *Listener) bind(address string) error {
	if err := unix.SetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return fmt.Errorf("SO_PASSCRED: %w", err)
	}
	to := &unix.SockaddrUnix{Name: address}
	if address == "@" {
		to.Name = "" // autobind
	}
	if err := unix.Bind(l.fd, to); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	sa, err := unix.Getsockname(l.fd)
	if err != nil {
		return fmt.Errorf("getsockname: %w", err)
	}
	l.address = sa.(*unix.SockaddrUnix).Name
	return nil
}

// Address is what NOTIFY_SOCKET is to be for senders.
func (l *Listener) Address() string { return l.address }

// FD is the socket, which stays the listener's: readable when Receive has
// something.
func (l *Listener) FD() int { return l.fd }

// Close closes the socket. A path stays.
func (l *Listener) Close() error { return unix.Close(l.fd) }

// ErrNone says that there is nothing to receive now.
var ErrNone = errors.New("no notification")

// Receive takes one message without waiting: ErrNone if there is none. A
// message longer than what systemd reads comes as one byte more than that, so
// that Parse refuses it.
func (l *Listener) Receive() (Message, error) {
	var n, cn, flags int
	for {
		var err error
		n, cn, flags, _, err = unix.Recvmsg(l.fd, l.text[:], l.control, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return Message{}, ErrNone
		}
		if err != nil {
			return Message{}, fmt.Errorf("receive notification: %w", err)
		}
		break
	}
	m := Message{Text: l.text[:n]}
	parts, err := unix.ParseSocketControlMessage(l.control[:cn])
	if err != nil {
		return Message{}, fmt.Errorf("receive notification: %w", err)
	}
	for _, part := range parts {
		if rights, err := unix.ParseUnixRights(&part); err == nil {
			m.FDs = append(m.FDs, rights...)
		}
		if cred, err := unix.ParseUnixCredentials(&part); err == nil {
			m.Pid, m.UID = int(cred.Pid), int(cred.Uid)
		}
	}
	if flags&unix.MSG_CTRUNC != 0 {
		m.Close()
		return Message{}, errors.New("receive notification: more descriptors than one message carries")
	}
	return m, nil
}

// Wait blocks until there is something to Receive, or for the given number of
// milliseconds.
func (l *Listener) Wait(milliseconds int) error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.fd), Events: unix.POLLIN}}, milliseconds)
	switch {
	case err != nil && !errors.Is(err, unix.EINTR):
		return fmt.Errorf("wait for notification: %w", err)
	case n == 0:
		return ErrNone
	}
	return nil
}
