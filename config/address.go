package config

import (
	"net/netip"
	"strings"
)

// Proto is a transport protocol.
type Proto string

// The protocols.
const (
	UDP Proto = "udp"
	TCP Proto = "tcp"
)

// Address is where a listener is bound. Its text form is a URL without a path: "udp://0.0.0.0:5201", "tcp://[::1]:443".
type Address struct {
	Proto Proto
	netip.AddrPort
}

// UnmarshalText reads an address with a literal IP and a port other than 0.
func (a *Address) UnmarshalText(text []byte) error {
	const hint = `write protocol://address:port, such as "udp://0.0.0.0:5201", "udp://[::]:5201" or "tcp://127.0.0.1:443"`
	scheme, rest, ok := strings.Cut(string(text), "://")
	if !ok {
		return problemf(hint, "%s is not an address", quote(string(text)))
	}
	proto := Proto(scheme)
	if proto != UDP && proto != TCP {
		return problemf(hint, "%s is not a protocol that grm knows", quote(scheme))
	}
	ap, err := netip.ParseAddrPort(rest)
	if err != nil {
		return problemf(hint, "%s is not a literal IP address and port", quote(rest))
	}
	ip := ap.Addr()
	switch {
	case ap.Port() == 0:
		return problemf("choose one: sockets of the old and the new instance must have the same port", "%s has port 0", quote(string(text)))
	case ip.Is4In6():
		return problemf("write it as "+ip.Unmap().String(), "%s is an IPv4 address in IPv6 clothes", ip)
	case ip.Zone() != "" || ip.IsLinkLocalUnicast() && ip.Is6():
		return problemf("listen on [::]", "%s is a link-local address, which is bound to one interface", ip)
	case ip.IsMulticast():
		return problemf("listen on an address of the host, or on 0.0.0.0 or [::]", "%s is a multicast address: the kernel gives its packets to every socket, old and new", ip)
	case ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return problemf("listen on 0.0.0.0", "%s is the broadcast address", ip)
	}
	*a = Address{proto, ap}
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (a Address) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// String is the URL.
func (a Address) String() string { return string(a.Proto) + "://" + a.AddrPort.String() }
