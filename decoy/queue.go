package decoy

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/internal/reuseport"
)

// queued says whether a socket holds something that nobody has taken yet:
// datagrams, or connections to accept. A keeper asks through its duplicate of
// its server's socket.
func queued(fd int) bool {
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err == nil && listening == 1 {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		return err == nil && info.Unacked > 0 // of a listening socket: its accept queue
	}
	// Not SIOCINQ: it is 0 for an empty datagram.
	var meminfo [9]uint32
	size := uint32(unsafe.Sizeof(meminfo))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&meminfo)), uintptr(unsafe.Pointer(&size)), 0)
	return errno == 0 && meminfo[unix.SK_MEMINFO_RMEM_ALLOC] > 0
}

// leave takes the sockets of an instance that is over out of their groups. What
// is being delivered meanwhile is there in the next round.
func leave(instance string, sockets []socket) {
	for _, s := range sockets {
		if err := reuseport.Leave(s.fd); err != nil {
			say("%s: %v", instance, err)
		}
	}
}

// discardAll empties sockets that have left, and says how much was in them.
func discardAll(instance string, sockets []socket) {
	lost := 0
	for _, s := range sockets {
		lost += discard(s.fd)
	}
	if lost > 0 {
		say("%s: %d datagrams discarded that its server had not taken", instance, lost)
	}
}

// Bounds for reading a queue that may be filled meanwhile, or fail for ever.
const (
	maxDiscard = 1 << 20
	maxErrors  = 16
)

// discard empties the queue of a UDP socket whose server is gone, and counts
// the datagrams: what is lost is to be known.
func discard(fd int) (datagrams int) {
	if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || kind != unix.SOCK_DGRAM {
		return 0
	}
	for failures := 0; failures < maxErrors && datagrams < maxDiscard; {
		_, _, err := unix.Recvfrom(fd, nil, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			failures++ // a pending error of the socket, which this took
		} else {
			datagrams++
		}
	}
	return datagrams
}
