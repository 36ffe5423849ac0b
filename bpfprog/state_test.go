package bpfprog

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog/cbpf"
	"grm/bpfprog/model"
	"grm/control"
	"grm/internal/testenv"
)

// TestAsModel does anything to a group, sends packets of any kind, and compares
// where they arrive, and what is counted, with what package model says.
func TestAsModel(t *testing.T) {
	needRoot(t)
	seed, err := strconv.ParseUint(os.Getenv("GRM_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("GRM_SEED=%d", seed)
	// The payload's first word; if its second one is 9, a division by it.
	program := cbpf.Program{{Op: 0x20}, {Op: 0x02}, {Op: 0x30, K: 4}, {Op: 0x15, K: 9, JF: 3}, {Op: 0x01}, {Op: 0x60}, {Op: 0x3c}, {Op: 0x60}, {Op: 0x16}}
	for i, spec := range []GroupSpec{
		{Dissector: Dissector{Kind: Noop}},
		{Dissector: Dissector{Kind: Flow, Timeout: time.Minute, Flows: 1000}},
		{Dissector: Dissector{Kind: Flow, Timeout: time.Minute, Flows: 1000}, Address: addr("[::]:5102"), DualStack: true},
		{Dissector: Dissector{Kind: CBPF, Flows: 1000, Program: program}},
		{Dissector: Dissector{Kind: CBPF, Flows: 1000, Program: program}, MaxApps: 3},
	} {
		spec.Network = "udp"
		if !spec.Address.IsValid() {
			spec.Address = addr(fmt.Sprintf("127.0.0.1:%d", 5100+i))
		}
		t.Run(fmt.Sprintf("%s of %d on %s", spec.Dissector.Kind, max(spec.MaxApps, 1), spec.Address), func(t *testing.T) {
			newModelGroup(t, spec, rand.New(rand.NewPCG(seed, uint64(i)))).play(testenv.Scale(60))
		})
	}
}

// modelGroup is a group under a test that may do anything.
type modelGroup struct {
	*testing.T
	*rand.Rand
	group    *Group
	services []*Service // by app
	sockets  map[int]*modelSocket
	clients  []*modelClient
	last     uint64 // generation
	// How many packets were of known flows, of new ones, and dropped.
	known, fresh, dropped int
}

// modelClient sends from an address of its own, which the group sees like that.
type modelClient struct {
	fd   int
	to   unix.Sockaddr
	from netip.AddrPort
	sent bool // a packet that may have begun a flow
}

// modelSocket is one of the group's, by its descriptor.
type modelSocket struct{ app, bank, slot int }

func newModelGroup(t *testing.T, spec GroupSpec, random *rand.Rand) *modelGroup {
	m := &modelGroup{T: t, Rand: random, sockets: map[int]*modelSocket{}}
	m.group = must(CreateGroup(spec))(t)
	t.Cleanup(func() { check(t, m.group.Remove()); check(t, m.group.Close()) })
	for app := range max(spec.MaxApps, 1) {
		s := must(CreateService(fmt.Sprintf("model%d-%d", spec.Address.Port(), app)))(t)
		t.Cleanup(func() { check(t, s.Remove()); check(t, s.Close()) })
		m.services = append(m.services, s)
	}
	check(t, m.group.Join(0, m.services[0]))
	t.Cleanup(func() {
		for fd := range m.sockets {
			unix.Close(fd)
		}
		for _, c := range m.clients {
			unix.Close(c.fd)
		}
	})
	return m
}

// play changes the group and looks at some packets, so many times. A group
// whose last socket goes has no program any more: one that belongs to no bank
// keeps it.
func (m *modelGroup) play(rounds int) {
	keep := m.listen()
	defer unix.Close(keep)
	check(m, m.group.Attach(keep))
	for range rounds {
		m.clients = append(m.clients, m.client())
		for range 3 {
			m.change()
		}
		for range 8 {
			m.packet()
		}
	}
	m.Logf("%d packets of known flows, %d of new ones, %d dropped", m.known, m.fresh, m.dropped)
}

func (m *modelGroup) client() *modelClient {
	address := m.group.Spec.Address
	c := &modelClient{}
	if address.Addr().Is4() || m.IntN(2) == 0 {
		c.fd = must(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(m)
		check(m, unix.Bind(c.fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
		c.to = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(address.Port())}
	} else {
		c.fd = must(unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(m)
		check(m, unix.Bind(c.fd, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}))
		c.to = &unix.SockaddrInet6{Addr: [16]byte{15: 1}, Port: int(address.Port())}
	}
	switch from := must(unix.Getsockname(c.fd))(m).(type) {
	case *unix.SockaddrInet4:
		c.from = netip.AddrPortFrom(netip.AddrFrom4(from.Addr), uint16(from.Port))
	case *unix.SockaddrInet6:
		c.from = netip.AddrPortFrom(netip.AddrFrom16(from.Addr), uint16(from.Port))
	}
	return c
}

func (m *modelGroup) listen() int {
	address, family := m.group.Spec.Address, unix.AF_INET
	var bind unix.Sockaddr = &unix.SockaddrInet4{Port: int(address.Port())}
	if address.Addr().Is6() {
		family, bind = unix.AF_INET6, &unix.SockaddrInet6{Port: int(address.Port()), Addr: address.Addr().As16()}
	} else {
		bind.(*unix.SockaddrInet4).Addr = address.Addr().As4()
	}
	fd := must(unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))(m)
	check(m, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	check(m, unix.Bind(fd, bind))
	return fd
}

// change does one thing to the group that an operator, a keeper, a crash or a
// server may do, sensible or not.
func (m *modelGroup) change() {
	app := m.IntN(len(m.services))
	c := m.services[app].Control()
	bank := m.IntN(6)
	switch m.IntN(12) {
	case 0, 1, 2, 3: // a new generation, and a flip to it
		check(m, m.group.Join(app, m.services[app]))
		check(m, m.group.Clear(app, bank))
		m.close(func(s *modelSocket) bool { return s.app == app && s.bank == bank })
		m.last++
		sockets := 1 + m.IntN(7)
		if m.IntN(8) == 0 {
			sockets = 1 + m.IntN(60)
		}
		check(m, m.group.SetBank(app, bank, m.last, sockets))
		for slot := range sockets {
			fd := m.listen()
			check(m, m.group.Put(app, bank, slot, fd))
			m.sockets[fd] = &modelSocket{app, bank, slot}
		}
		c.Flip(bank)
		c.SetClosing(false)
	case 4, 5, 6: // some sockets are closed, or most
		left := m.IntN(20)
		m.close(func(s *modelSocket) bool { return s.app == app && s.bank == bank && m.IntN(20) >= left })
	case 7:
		c.Withdraw(bank)
	case 8:
		if m.IntN(4) == 0 {
			c.SetClosing(true)
		}
	case 9: // back to one that is perhaps none
		if m.IntN(4) == 0 {
			c.Flip(bank)
		}
	case 10:
		c.SwapOrder(c.Order(), m.Perm(control.Banks)[:m.IntN(3)])
	case 11:
		check(m, m.group.Clear(app, bank))
		m.close(func(s *modelSocket) bool { return s.app == app && s.bank == bank })
	}
}

func (m *modelGroup) close(which func(*modelSocket) bool) {
	for fd, s := range m.sockets {
		if which(s) {
			check(m, unix.Close(fd))
			delete(m.sockets, fd)
		}
	}
}

// payload is too short for the program, or a cookie that was given out, or was
// once, or is made up, or an app, or anything; or it makes the program divide.
func (m *modelGroup) payload(s *model.State) []byte {
	if m.IntN(8) == 0 {
		return make([]byte, m.IntN(5))
	}
	word := m.Uint32()
	switch m.IntN(8) {
	case 0:
		word = m.Uint32N(1 << 16)
	case 1, 2:
		word = 1<<31 | m.Uint32N(20)
	case 3, 4, 5, 6:
		name := m.IntN(model.Names)
		for range model.Names {
			if s.Names[name].Used {
				break
			}
			name = (name + 1) % model.Names
		}
		word = uint32(model.MakeCookie(name, s.Names[name].Serial-uint16(m.UintN(8)/7), m.IntN(8)))
	}
	return []byte{byte(word >> 24), byte(word >> 16), byte(word >> 8), byte(word), byte(m.UintN(16))}
}

// counts are all counters that a packet can move.
type counts struct {
	events  Counters
	packets uint64
}

func (m *modelGroup) counts() counts {
	c := counts{events: must(m.group.Counters())(m)}
	for _, s := range m.services {
		for bank := range control.Banks {
			c.packets += s.Control().Stats(bank).Packets
		}
	}
	return c
}

// packet sends one and compares.
func (m *modelGroup) packet() {
	client := m.clients[len(m.clients)-1-m.IntN(min(len(m.clients), 10))]
	state := must(m.group.State())(m)
	payload := m.payload(state)
	before := m.counts()
	check(m, unix.Sendto(client.fd, payload, 0, client.to))
	var after counts
	deadline := time.Now().Add(10 * time.Second)
	for { // until it is either delivered or dropped
		after = m.counts()
		dropped := after.events[DroppedClosing] + after.events[DroppedNoSocket] - before.events[DroppedClosing] - before.events[DroppedNoSocket]
		if after.packets-before.packets+dropped == 1 {
			break
		}
		if time.Now().After(deadline) {
			m.Fatalf("a packet is neither delivered nor dropped: %+v, %+v", before, after)
		}
	}
	arrived := m.arrived(payload, after.packets > before.packets, deadline)
	packet := model.Packet{Remote: client.from, EtherType: unix.ETH_P_IP, Payload: payload}
	if client.from.Addr().Is6() {
		packet.EtherType = unix.ETH_P_IPV6
	}
	if !client.sent && m.strange(payload) {
		m.mustBeNew(arrived, payload)
	}
	client.sent = true
	verdicts := model.Possible(state, packet)
	for _, v := range verdicts {
		got := arrived == nil && v.Dropped || arrived != nil && !v.Dropped && *arrived == modelSocket{v.App, v.Bank, v.Slot}
		if got && m.sameEvents(before.events, after.events, v) {
			switch {
			case v.Dropped:
				m.dropped++
			case v.NewFlow:
				m.fresh++
			default:
				m.known++
			}
			return
		}
	}
	for c := range counterCount {
		if n := after.events[c] - before.events[c]; n != 0 {
			m.Logf("counted %s: %d", c, n)
		}
	}
	m.Fatalf("packet %x arrived at %+v, against all %d of the model, such as\n%s", payload, arrived, len(verdicts), verdicts[0])
}

// strange says whether a payload names no flow and no app.
func (m *modelGroup) strange(payload []byte) bool {
	return m.group.Spec.Dissector.Kind != CBPF || len(payload) >= 4 && payload[0] < 0x80 && (payload[0] != 0 || payload[1] != 0)
}

// mustBeNew asserts what the first packet of a client has to do, by what the
// test itself knows: it goes to the newest generation of the order that has an
// open socket, and to no older one, and is dropped if there is none or the
// service is being stopped.
func (m *modelGroup) mustBeNew(arrived *modelSocket, payload []byte) {
	c := m.services[0].Control()
	if c.Closing() {
		if arrived != nil {
			m.Fatalf("a new flow's packet %x arrived at %+v of a service that is being stopped", payload, arrived)
		}
		return
	}
	for _, bank := range c.Order().Banks() {
		for _, s := range m.sockets {
			if s.app != 0 || s.bank != bank {
				continue
			}
			if arrived == nil || arrived.app != 0 || arrived.bank != bank {
				m.Fatalf("a new flow's packet %x arrived at %+v, but bank %d of %v lives", payload, arrived, bank, c.Order().Banks())
			}
			return
		}
	}
	if arrived != nil {
		m.Fatalf("a new flow's packet %x arrived at %+v, which is not in the order", payload, arrived)
	}
}

// arrived is the socket that has the packet; nil if it was dropped.
func (m *modelGroup) arrived(payload []byte, delivered bool, deadline time.Time) *modelSocket {
	for {
		var at *modelSocket
		for fd, s := range m.sockets {
			buffer := make([]byte, 100)
			n, _, err := unix.Recvfrom(fd, buffer, 0)
			if err == unix.EAGAIN {
				continue
			}
			check(m, err)
			if at != nil || !slices.Equal(buffer[:n], payload) {
				m.Fatalf("%+v has a packet %x that nobody sent", s, buffer[:n])
			}
			at = s
		}
		if at != nil || !delivered {
			return at
		}
		if time.Now().After(deadline) {
			m.Fatal("a packet was counted as delivered, but is in no socket")
		}
	}
}

// sameEvents compares what was counted with what the model says; about the flow
// table's own affairs it says nothing.
func (m *modelGroup) sameEvents(before, after Counters, v model.Verdict) bool {
	for c := range counterCount {
		switch c {
		case TableFull, EmbryoEvicted, InsertRace:
			continue
		}
		counted, expected := after[c]-before[c], uint64(0)
		for _, e := range v.Events {
			if e == model.Event(c.String()) {
				expected++
			}
		}
		if c == StaleFlow && v.NewFlow && counted == 1 {
			continue // an entry of a generation that is gone need not have been in the state
		}
		if counted != expected {
			return false
		}
	}
	return true
}
