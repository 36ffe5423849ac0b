package bpfprog

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog/cbpf"
)

// Kind is how a packet names its flow.
type Kind uint8

const (
	Flow Kind = iota // by the sender's address and port
	Noop             // not at all: every packet is a new flow
	CBPF             // by the cookie that a classic BPF program finds in it
)

func (k Kind) String() string { return [...]string{"flow", "noop", "cbpf"}[k] }

// Assure is what makes a flow assured.
type Assure uint8

const (
	Reply    Assure = iota // the server answered, and the client came back
	Packet                 // the client's second packet
	Explicit               // the server says so, with UDP_GRM_FLOW_ASSURE
)

func (a Assure) String() string { return [...]string{"reply", "packet", "explicit"}[a] }

// Dissector says how a group tells flows apart.
type Dissector struct {
	Kind    Kind
	Timeout time.Duration // of an assured flow without packets; kind flow only
	Flows   uint32        // that the table is made for; kinds flow and cbpf
	Assure  Assure        // kind flow only
	Program cbpf.Program  // kind cbpf only
}

// GroupSpec is what a group is asked to be.
type GroupSpec struct {
	Network   string // udp or tcp
	Address   netip.AddrPort
	DualStack bool // an IPv6 address whose sockets get IPv4 too
	Dissector Dissector
	MaxApps   int // services behind the address, 1 to 16; 0 means 1
}

// MaxFlows is the largest table that a group may have.
const MaxFlows = 4 << 20

// Apps is how many services may share a group at most.
const Apps = 16

func (s GroupSpec) key() GroupKey { return GroupKey{s.Network, s.Address} }

// normal is s with everything set to zero that does not matter to its kind.
func (s GroupSpec) normal() GroupSpec {
	s.MaxApps = max(s.MaxApps, 1)
	d := &s.Dissector
	if d.Kind != Flow {
		d.Timeout, d.Assure = 0, 0
	}
	if d.Kind == Noop {
		d.Flows = 0
	}
	if d.Kind != CBPF {
		d.Program = nil
	}
	return s
}

func (s GroupSpec) check() error {
	var errs []error
	add := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.Network != "udp" && s.Network != "tcp" {
		add("network %q (want udp or tcp)", s.Network)
	}
	if !s.Address.IsValid() || s.Address.Port() == 0 {
		add("address %s (want an address and a port that is not 0)", s.Address)
	}
	if s.DualStack && !s.Address.Addr().Is6() {
		add("dual stack with the IPv4 address %s", s.Address)
	}
	if s.MaxApps < 1 || s.MaxApps > Apps {
		add("max_apps %d (want 1 to %d)", s.MaxApps, Apps)
	}
	d := s.Dissector
	if d.Kind > CBPF || d.Assure > Explicit {
		add("dissector %d, assure %d: no such thing", d.Kind, d.Assure)
	}
	if s.Network == "tcp" && d.Kind != Noop {
		add("dissector %s with tcp (want noop: the kernel itself knows a connection's packets)", d.Kind)
	}
	if d.Kind != Noop && (d.Flows < 1 || d.Flows > MaxFlows) {
		add("flows %d (want 1 to %d)", d.Flows, MaxFlows)
	}
	if d.Kind == Flow && (d.Timeout < time.Second || d.Timeout > 24*time.Hour) {
		add("timeout %s (want 1s to 24h)", d.Timeout)
	}
	if d.Kind == CBPF && len(d.Program) == 0 {
		add("dissector cbpf without a program")
	}
	return errors.Join(errs...)
}

// differs says in words how want differs from s; both are normal.
func (s GroupSpec) differs(want GroupSpec) error {
	var parts []string
	add := func(what string, have, want any) {
		if have != want {
			parts = append(parts, fmt.Sprintf("%s is %v, not %v", what, have, want))
		}
	}
	add("dual stack", s.DualStack, want.DualStack)
	add("dissector", s.Dissector.Kind, want.Dissector.Kind)
	add("timeout", s.Dissector.Timeout, want.Dissector.Timeout)
	add("flows", s.Dissector.Flows, want.Dissector.Flows)
	add("assure", s.Dissector.Assure, want.Dissector.Assure)
	add("max_apps", s.MaxApps, want.MaxApps)
	if !slices.Equal(s.Dissector.Program, want.Dissector.Program) {
		parts = append(parts, "the cbpf program is another one")
	}
	if parts == nil {
		return nil
	}
	return errors.New(strings.Join(parts, ", "))
}

// GroupKey is what there can be one group of in a network namespace.
type GroupKey struct {
	Network string
	Address netip.AddrPort
}

func (k GroupKey) String() string { return k.Network + "://" + k.Address.String() }

// name is k as a pin's name, which may have no dot: protocol, address in hex,
// port, and the interface of a link-local address.
func (k GroupKey) name() (string, error) {
	a := k.Address.Addr()
	name := fmt.Sprintf("%s-%s-%d", k.Network, hex.EncodeToString(a.AsSlice()), k.Address.Port())
	scope, err := scopeOf(a)
	if scope != 0 {
		name += fmt.Sprintf("-%d", scope)
	}
	return name, err
}

func scopeOf(a netip.Addr) (uint32, error) {
	if a.Zone() == "" {
		return 0, nil
	}
	if n, err := strconv.ParseUint(a.Zone(), 10, 32); err == nil {
		return uint32(n), nil
	}
	i, err := net.InterfaceByName(a.Zone())
	if err != nil {
		return 0, fmt.Errorf("interface of %s: %w", a, err)
	}
	return uint32(i.Index), nil
}

func withScope(a netip.Addr, scope uint32) netip.Addr {
	if scope == 0 {
		return a
	}
	if i, err := net.InterfaceByIndex(int(scope)); err == nil {
		return a.WithZone(i.Name)
	}
	return a.WithZone(fmt.Sprint(scope)) // the interface is gone
}

// parseKey is the inverse of name. False if it is none.
func parseKey(name string) (GroupKey, bool) {
	part := strings.Split(name, "-")
	if len(part) != 3 && len(part) != 4 || part[0] != "udp" && part[0] != "tcp" {
		return GroupKey{}, false
	}
	raw, err := hex.DecodeString(part[1])
	a, ok := netip.AddrFromSlice(raw)
	port, err2 := strconv.ParseUint(part[2], 10, 16)
	if err != nil || err2 != nil || !ok || port == 0 {
		return GroupKey{}, false
	}
	if len(part) == 4 {
		scope, err := strconv.ParseUint(part[3], 10, 32)
		if err != nil || scope == 0 || !a.Is6() {
			return GroupKey{}, false
		}
		a = withScope(a, uint32(scope))
	}
	k := GroupKey{part[0], netip.AddrPortFrom(a, uint16(port))}
	back, err := k.name()
	return k, err == nil && back == name
}

func protocol(network string) uint32 {
	if network == "tcp" {
		return unix.IPPROTO_TCP
	}
	return unix.IPPROTO_UDP
}
