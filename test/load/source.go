package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// sources hands out local addresses, each of them once: no flow can be taken for one before it.
type sources struct {
	v4, v6 source
}

// source is the next address of a family.
type source struct {
	host uint32 // of 127.0.0.0/8, for targets there
	port uint16
	left int // how many ports are left, of this host if there are others
}

// A flow's port is one of these. With 16 million hosts of the loopback network there is no end to them for IPv4.
const firstPort, ports = 10000, 55000

// generators counts those of this process: each begins elsewhere, so that it does not use again what the one before it has used.
var generators atomic.Uint32

func newSources() *sources {
	n := generators.Add(1)
	return &sources{
		v4: source{host: 1<<16 + n<<8 + 1, port: firstPort, left: ports},
		v6: source{port: firstPort + uint16(n*5000%ports), left: ports},
	}
}

// dial makes a connected, non-blocking socket from an address that was not used before.
func (s *sources) dial(target netip.AddrPort) (int, error) {
	family, next := unix.AF_INET6, &s.v6
	if target.Addr().Unmap().Is4() {
		family, next = unix.AF_INET, &s.v4
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	err = next.bind(fd, family, target.Addr().IsLoopback())
	if err == nil {
		if err = unix.Connect(fd, sockaddr(family, target)); err != nil {
			err = fmt.Errorf("connect to %s: %w", target, err)
		}
	}
	if err != nil {
		_ = unix.Close(fd) // the error at hand is the one to tell
		return -1, err
	}
	return fd, nil
}

// bind binds to the next free address.
func (s *source) bind(fd, family int, loopback bool) error {
	for {
		if s.left == 0 {
			if family == unix.AF_INET6 || !loopback {
				return errors.New("all source ports were used (use fewer or longer flows)")
			}
			s.host, s.left = s.host+1, ports
		}
		host := netip.IPv4Unspecified()
		switch {
		case family == unix.AF_INET6:
			host = netip.IPv6Unspecified()
		case loopback:
			var b [4]byte
			binary.BigEndian.PutUint32(b[:], 127<<24|s.host)
			host = netip.AddrFrom4(b)
		}
		at := netip.AddrPortFrom(host, s.port)
		s.left--
		if s.port++; s.port == firstPort+ports {
			s.port = firstPort
		}
		err := unix.Bind(fd, sockaddr(family, at))
		if err == nil {
			return nil
		}
		if err != unix.EADDRINUSE { // a server, or another load, has this one
			return fmt.Errorf("bind to %s: %w", at, err)
		}
	}
}

func sockaddr(family int, a netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().Unmap().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
