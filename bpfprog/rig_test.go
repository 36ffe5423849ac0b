package bpfprog

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
)

const patience = 20 * time.Second // for what must come, but may take a while on a busy machine

// rig is one service with one group, and what its generations answer with.
type rig struct {
	*Group
	t       *testing.T
	service *Service
	ctl     *control.Map
	app     int
}

// newRig is a rig without hooks, which most tests do without: the fewer
// programs a test run loads, the better.
func newRig(t *testing.T, spec GroupSpec) *rig {
	needRoot(t)
	g := must(CreateGroup(spec))(t)
	t.Cleanup(func() { check(t, g.Remove()); check(t, g.Close()) })
	return addService(t, g, 0, fmt.Sprintf("svc%d", time.Now().UnixNano()))
}

func newHookedRig(t *testing.T, spec GroupSpec) *rig {
	r := newRig(t, spec)
	r.hook()
	return r
}

func (r *rig) hook() {
	cg := must(os.Open(cgroupRoot))(r.t)
	defer cg.Close()
	check(r.t, r.service.AttachHooks(cg, []*Group{r.Group}))
}

func addService(t *testing.T, g *Group, app int, name string) *rig {
	s := must(CreateService(name))(t)
	t.Cleanup(func() { check(t, s.Remove()); check(t, s.Close()) })
	check(t, g.Join(app, s))
	return &rig{Group: g, t: t, service: s, ctl: s.Control(), app: app}
}

func flowSpec(address string) GroupSpec {
	return GroupSpec{Network: "udp", Address: addr(address),
		Dissector: Dissector{Kind: Flow, Timeout: 124 * time.Second, Flows: 4096}}
}

func noopSpec(address string) GroupSpec {
	return GroupSpec{Network: "udp", Address: addr(address), Dissector: Dissector{Kind: Noop}}
}

// bind makes a socket of the group, as activation does.
func (r *rig) bind() *net.UDPConn {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			if err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20)
			}
			if err == nil && r.Spec.Address.Addr().Is6() {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, int(1-flag(r.Spec.DualStack)))
			}
		}); e != nil {
			return e
		}
		return err
	}}
	network := "udp4"
	if r.Spec.Address.Addr().Is6() {
		network = "udp6"
		if r.Spec.DualStack {
			network = "udp"
		}
	}
	c := must(lc.ListenPacket(context.Background(), network, r.Spec.Address.String()))(r.t)
	return c.(*net.UDPConn)
}

func fd(t testing.TB, c syscall.Conn) int {
	var n int
	raw := must(c.SyscallConn())(t)
	check(t, raw.Control(func(fd uintptr) { n = int(fd) }))
	return n
}

// generation binds n sockets into a bank.
func (r *rig) generation(bank int, generation uint64, n int) []*net.UDPConn {
	r.t.Helper()
	r.ctl.Assign(bank, generation, control.Prepared)
	check(r.t, r.SetBank(r.app, bank, generation, n))
	var conns []*net.UDPConn
	for i := range n {
		c := r.bind()
		r.t.Cleanup(func() { _ = c.Close() }) // some tests close it before
		check(r.t, r.Put(r.app, bank, i, fd(r.t, c)))
		check(r.t, r.Attach(fd(r.t, c)))
		conns = append(conns, c)
	}
	return conns
}

// serve answers each packet with text until the socket is closed.
func serve(conns []*net.UDPConn, text string) {
	for _, c := range conns {
		go func() {
			buf := make([]byte, 2048)
			for {
				_, from, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteToUDPAddrPort([]byte(text), from) // a client that is gone is no matter
			}
		}()
	}
}

func dial(t *testing.T, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	c := must(net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to)))(t)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func ask(t *testing.T, c *net.UDPConn) string {
	t.Helper()
	must(c.Write([]byte("hello")))(t)
	return read(t, c)
}

func read(t *testing.T, c *net.UDPConn) string {
	t.Helper()
	check(t, c.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 2048)
	n := must(c.Read(buf))(t)
	return string(buf[:n])
}

func want[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: %v, not %v", what, got, want)
	}
}
