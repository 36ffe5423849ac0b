package activate

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"grm/config"
	"grm/internal/proc"
)

// openSocket makes one socket of a listener, bound and, with TCP, listening.
// It blocks, as sockets do that systemd hands to a server. What is not as
// asked for, and can be lived with, is told to warn.
func openSocket(l config.Listener, uid uint32, warn func(string)) (int, error) {
	domain, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if l.Address.Addr().Is4() {
		domain = unix.AF_INET
	}
	if l.Address.Proto == config.TCP {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket for %s: %w", l.Address, err)
	}
	if err := prepare(fd, domain, l, uid, warn); err != nil {
		_ = unix.Close(fd) // nothing was sent on it
		return -1, err
	}
	return fd, nil
}

func prepare(fd, domain int, l config.Listener, uid uint32, warn func(string)) error {
	set := func(level, option int, name string, value int) error {
		if err := unix.SetsockoptInt(fd, level, option, value); err != nil {
			return fmt.Errorf("set %s of %s: %w", name, l.Address, err)
		}
		return nil
	}
	if err := set(unix.SOL_SOCKET, unix.SO_REUSEPORT, "SO_REUSEPORT", 1); err != nil {
		return err
	}
	if domain == unix.AF_INET6 {
		only := 1
		if l.DualStack {
			only = 0
		}
		if err := set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, "IPV6_V6ONLY", only); err != nil {
			return err
		}
	}
	if l.Freebind {
		// The option is of level IP for both families.
		if err := set(unix.IPPROTO_IP, unix.IP_FREEBIND, "IP_FREEBIND", 1); err != nil {
			return err
		}
	}
	if l.RcvBuf > 0 {
		if err := setRcvBuf(fd, l, warn); err != nil {
			return err
		}
	}
	// All sockets of a group must have the same uid when they are bound.
	if err := unix.Fchown(fd, int(uid), -1); err != nil {
		return fmt.Errorf("give socket of %s to uid %d: %w", l.Address, uid, err)
	}
	if err := unix.Bind(fd, sockaddr(l.Address.AddrPort)); err != nil {
		return fmt.Errorf("bind %s: %w%s", l.Address, err, bindHint(err))
	}
	if l.Address.Proto == config.TCP {
		if err := unix.Listen(fd, unix.SOMAXCONN); err != nil {
			return fmt.Errorf("listen on %s: %w", l.Address, err)
		}
	}
	return nil
}

// socketsUID is whose a listener's sockets are to be: the server's, so that it
// may bind more. Services that share an address have users of their own, while
// the kernel wants the sockets of one address to be one user's: there they are
// root's, or whose those are that live, from a grm that gave them to a user.
func socketsUID(l config.Listener, server uint32) uint32 {
	if l.MaxApps <= 1 {
		return server
	}
	if uid, lives := proc.UID(string(l.Address.Proto), l.Address.AddrPort); lives {
		return uid
	}
	return uint32(unix.Geteuid())
}

// setRcvBuf asks for the buffer, beyond rmem_max where it may. The kernel
// doubles what it is asked for, to have room for its own bookkeeping.
func setRcvBuf(fd int, l config.Listener, warn func(string)) error {
	want := int(l.RcvBuf)
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, want)
	if errors.Is(err, unix.EPERM) {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, want)
	}
	if err != nil {
		return fmt.Errorf("set SO_RCVBUF of %s: %w", l.Address, err)
	}
	got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
	if err != nil {
		return fmt.Errorf("get SO_RCVBUF of %s: %w", l.Address, err)
	}
	if got/2 < want {
		warn(fmt.Sprintf("%s: the receive buffer has %d bytes, not %d (set sysctl net.core.rmem_max=%d, or run it with CAP_NET_ADMIN)", l.Address, got/2, want, want))
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func bindHint(err error) string {
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return " (no interface has this address: add it, or use --freebind)"
	case errors.Is(err, unix.EACCES):
		return " (the port needs CAP_NET_BIND_SERVICE: run it as root, in a unit with ExecStartPre=+)"
	}
	return ""
}
