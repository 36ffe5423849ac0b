package bpfprog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const batch = 256

// spoofer sends UDP packets from any IPv4 source, many with one call.
type spoofer struct {
	fd      int
	to      netip.AddrPort
	packets [batch][36]byte // IPv4, UDP, 8 bytes of payload
	headers [batch]mmsghdr
	vectors [batch]unix.Iovec
	address unix.RawSockaddrInet4
	n       int
}

// mmsghdr is the kernel's, which x/sys/unix does not have.
type mmsghdr struct {
	unix.Msghdr
	len uint32
	_   uint32
}

func newSpoofer(t testing.TB, to netip.AddrPort) *spoofer {
	s := &spoofer{to: to}
	s.fd = must(unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW))(t)
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	check(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<20))
	s.address = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr().As4()}
	for i := range s.packets {
		p := s.packets[i][:]
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP // the kernel fills in length and checksum
		copy(p[16:20], s.address.Addr[:])
		binary.BigEndian.PutUint16(p[22:], to.Port())
		binary.BigEndian.PutUint16(p[24:], uint16(len(p)-20))
		s.vectors[i] = unix.Iovec{Base: &p[0], Len: uint64(len(p))}
		h := &s.headers[i].Msghdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&s.address)), unix.SizeofSockaddrInet4
		h.Iov, h.Iovlen = &s.vectors[i], 1
	}
	return s
}

// add queues a packet from that source; the payload is word.
func (s *spoofer) add(source uint32, port uint16, word uint64) error {
	p := s.packets[s.n][:]
	binary.BigEndian.PutUint32(p[12:], source)
	binary.BigEndian.PutUint16(p[20:], port)
	binary.NativeEndian.PutUint64(p[28:], word)
	if s.n++; s.n == batch {
		return s.flush()
	}
	return nil
}

// flush sends what is queued. On loopback it has arrived when flush returns.
func (s *spoofer) flush() error {
	for sent := 0; sent < s.n; {
		n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.headers[sent])), uintptr(s.n-sent), 0, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("sendmmsg: %w", errno)
		}
		if errno == 0 {
			sent += int(n)
		}
	}
	s.n = 0
	return nil
}

// sink reads packets that have arrived at a socket, many with one call.
type sink struct {
	fd      int
	words   [batch]uint64
	headers [batch]mmsghdr
	vectors [batch]unix.Iovec
	sources [batch]unix.RawSockaddrInet4
}

func newSink(fd int) *sink {
	s := &sink{fd: fd}
	for i := range s.headers {
		s.vectors[i] = unix.Iovec{Base: (*byte)(unsafe.Pointer(&s.words[i])), Len: 8}
		h := &s.headers[i].Msghdr
		h.Name = (*byte)(unsafe.Pointer(&s.sources[i]))
		h.Iov, h.Iovlen = &s.vectors[i], 1
	}
	return s
}

// drain reads all that has arrived. It calls each with a packet's source and
// payload, and answers it if answer is set: nothing need arrive, as the hook
// sees an answer before it is routed.
func (s *sink) drain(answer bool, each func(source uint32, port uint16, word uint64)) (total int, err error) {
	for {
		for i := range s.headers {
			s.headers[i].Msghdr.Namelen = unix.SizeofSockaddrInet4
		}
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(s.fd), uintptr(unsafe.Pointer(&s.headers[0])), batch, unix.MSG_DONTWAIT, 0, 0)
		if errors.Is(errno, unix.EAGAIN) {
			return total, nil
		}
		if errno != 0 && errno != unix.EINTR {
			return total, fmt.Errorf("recvmmsg: %w", errno)
		}
		for i := range int(n) {
			from := &s.sources[i]
			if each != nil {
				port := (*[2]byte)(unsafe.Pointer(&from.Port))
				each(binary.BigEndian.Uint32(from.Addr[:]), binary.BigEndian.Uint16(port[:]), s.words[i])
			}
			if answer {
				_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&s.words[i])), 8, 0,
					uintptr(unsafe.Pointer(from)), unix.SizeofSockaddrInet4)
				if errno != 0 && errno != unix.ENETUNREACH {
					return total, fmt.Errorf("sendto: %w", errno)
				}
			}
		}
		total += int(n)
		if errno == 0 && n < batch {
			return total, nil
		}
	}
}
