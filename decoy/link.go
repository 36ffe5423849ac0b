package decoy

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// link joins a keeper and whatever decoy speaks for it: a pair of sockets whose
// decoys' end waits in the fd store for the next decoy. Nobody else can get at
// it. What it carries are hints and messages to pass on: the truth about an
// instance is in the control map and in its keeper's exit status, so nothing is
// lost for good if the link is full or its reader is gone.
type link struct {
	fd  int // -1: none
	buf [1 + 4096]byte
	oob []byte
}

// What a message is, in its first byte.
const (
	// From the decoy.
	msgHello  = 'h' // a decoy speaks for this keeper from now on: the sender
	msgSignal = 's' // to the server: a signal's number
	msgEnd    = 'e' // end a server that is not ready
	msgLook   = 'c' // look at the control map now
	msgGive   = 'k' // give your sockets from this index on, for the fd store

	// From the keeper.
	msgReady  = 'r' // the server is ready, and the flip done
	msgNotify = 'n' // for systemd as it is, with its descriptors
	msgStatus = 't' // what the server says of itself
	msgFailed = 'f' // this instance failed, and why
	msgGone   = 'g' // the server drains by itself: start another
	msgGiven  = 'k' // sockets: their names, one a line, and descriptors
)

// atOnce is how many sockets go in one message, whose names then fit.
const atOnce = 32

// newLink makes both ends.
func newLink() (decoys, keepers int, err error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("link to the keeper: %w", err)
	}
	if err := unix.SetsockoptInt(p[1], unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return -1, -1, errors.Join(fmt.Errorf("link to the keeper: SO_PASSCRED: %w", err), unix.Close(p[0]), unix.Close(p[1]))
	}
	return p[0], p[1], nil
}

func openLink(fd int) *link {
	l := &link{fd: fd}
	if fd >= 0 {
		l.oob = make([]byte, unix.CmsgSpace(253*4)+unix.CmsgSpace(unix.SizeofUcred))
	}
	return l
}

func (l *link) close() {
	if l.fd >= 0 {
		_ = unix.Close(l.fd) // a message in flight is kept for the other end
		l.fd = -1
	}
}

// send never waits: it says whether the message went. fds stay the caller's.
func (l *link) send(what byte, payload string, fds ...int) bool {
	if l.fd < 0 {
		return false
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(l.fd, append([]byte{what}, payload...), rights, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if !errors.Is(err, unix.EINTR) {
			return err == nil
		}
	}
}

// parcel is a received message. Its descriptors are the receiver's.
type parcel struct {
	what   byte
	text   string
	fds    []int
	sender int
}

func (p parcel) close() {
	for _, fd := range p.fds {
		_ = unix.Close(fd) // received and not written to
	}
}

// receive takes one message; ok is false if there is none now, and err is set
// when the other end is gone for good.
func (l *link) receive() (p parcel, ok bool, err error) {
	for {
		n, on, _, _, err := unix.Recvmsg(l.fd, l.buf[:], l.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return parcel{}, false, nil
		case err != nil:
			return parcel{}, false, fmt.Errorf("link: %w", err)
		case n == 0:
			return parcel{}, false, errors.New("link: closed")
		}
		p := parcel{what: l.buf[0], text: string(l.buf[1:n])}
		parts, err := unix.ParseSocketControlMessage(l.oob[:on])
		if err != nil {
			return parcel{}, false, fmt.Errorf("link: %w", err)
		}
		for _, part := range parts {
			if rights, err := unix.ParseUnixRights(&part); err == nil {
				p.fds = append(p.fds, rights...)
			}
			if cred, err := unix.ParseUnixCredentials(&part); err == nil {
				p.sender = int(cred.Pid)
			}
		}
		return p, true, nil
	}
}
