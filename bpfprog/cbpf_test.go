package bpfprog

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"grm/bpfprog/cbpf"
	"grm/control"
)

// The dissector of these tests: the payload's first 32-bit word is the result.
var firstWord = cbpf.Program{
	{Op: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0},
	{Op: unix.BPF_RET | unix.BPF_A},
}

func cbpfSpec(address string, apps int) GroupSpec {
	return GroupSpec{Network: "udp", Address: addr(address), MaxApps: apps,
		Dissector: Dissector{Kind: CBPF, Flows: 1024, Program: firstWord}}
}

// askWith sends a packet with that result.
func askWith(t *testing.T, c *net.UDPConn, result uint32) string {
	t.Helper()
	return askRaw(t, c, binary.BigEndian.AppendUint32(nil, result))
}

func askRaw(t *testing.T, c *net.UDPConn, payload []byte) string {
	t.Helper()
	must(c.Write(payload))(t)
	return read(t, c)
}

const noCookie = 0x7fffffff

func TestCookies(t *testing.T) {
	r := newRig(t, cbpfSpec("127.0.0.1:5001", 1))
	one := r.generation(0, 1, 2)
	for i, c := range one {
		serve([]*net.UDPConn{c}, fmt.Sprint("one", i))
	}
	r.ctl.Flip(0)
	two := r.generation(1, 2, 1)
	serve(two, "two")
	r.ctl.Flip(1)
	cookies := map[uint32]string{r.cookie(0, 0, 0): "one0", r.cookie(0, 0, 1): "one1", r.cookie(0, 1, 0): "two"}
	want(t, "different cookies", len(cookies), 3)
	for cookie, at := range cookies {
		want(t, fmt.Sprintf("cookie %#x", cookie), askWith(t, dial(t, r.Spec.Address), cookie), at)
	}
	if s := r.ctl.Stats(0); s.SinceAssured < 0 {
		t.Error("a packet with a cookie does not count as one of a flow that is known")
	}
	// All others are new flows.
	for c := range uint32(1 << 16) {
		if c%97 != 0 || cookies[c] != "" { // a sample
			continue
		}
		want(t, fmt.Sprintf("cookie %#x", c), askWith(t, dial(t, r.Spec.Address), c), "two")
	}
	for _, result := range []uint32{0, 0x10000, noCookie, 0x80000000, 0x80000010, 0xffffffff} {
		want(t, fmt.Sprintf("result %#x", result), askWith(t, dial(t, r.Spec.Address), result), "two")
	}
	want(t, "app that cannot be", askWith(t, dial(t, r.Spec.Address), 0x80000001), "two")
	want(t, "empty packet", askRaw(t, dial(t, r.Spec.Address), nil), "two")
	c := must(r.Counters())(t)
	want(t, "packet too short for the program", c[CBPFError], 1)
	want(t, "bad app", c[BadApp], 1)

	// The cookie of a generation that has ended.
	cookie := r.cookie(0, 0, 0)
	r.ctl.Withdraw(0)
	want(t, "cookie of a dead generation", askWith(t, dial(t, r.Spec.Address), cookie), "two")
	for generation := range uint64(6) {
		check(t, r.Clear(0, 0))
		r.ctl.Release(0)
		serve(r.generation(0, 3+generation, 1), "new")
		r.ctl.Flip(0)
		r.ctl.Flip(1)
		want(t, "cookie of an earlier generation of the bank", askWith(t, dial(t, r.Spec.Address), cookie), "two")
	}
}

// The packets of a handshake have no cookie yet, and stay together.
func TestCookielessPacketsStayTogether(t *testing.T) {
	r := newRig(t, cbpfSpec("[::1]:5001", 1))
	serve(r.generation(0, 1, 2), "one")
	serve(r.generation(1, 2, 2), "two")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	want(t, "first", askWith(t, c, noCookie), "one")
	r.ctl.Flip(1)
	want(t, "second", askWith(t, c, noCookie), "one")
	want(t, "new flow", askWith(t, dial(t, r.Spec.Address), noCookie), "two")
	want(t, "assured flows", r.ctl.Stats(0).Assured, 0)
}

func TestApps(t *testing.T) {
	needRoot(t)
	spec := cbpfSpec("127.0.0.1:5001", 4)
	g := must(CreateGroup(spec))(t)
	t.Cleanup(func() { check(t, g.Remove()); check(t, g.Close()) })
	apps := make([]*rig, 3)
	for app := range apps {
		apps[app] = addService(t, g, app, fmt.Sprint("app", app))
	}
	ask := func(what string, result uint32, at string) {
		t.Helper()
		want(t, what, askWith(t, dial(t, spec.Address), result), at)
	}
	for app, r := range apps[:2] {
		serve(r.generation(0, 1, 2), fmt.Sprint(app, ".1"))
		r.ctl.Flip(0)
	}
	for app := range uint32(2) {
		ask("app with a generation", 0x80000000+app, fmt.Sprint(app, ".1"))
	}
	ask("no app", noCookie, "0.1")
	ask("app whose service has never served", 0x80000002, "0.1")
	ask("app without a service", 0x80000003, "0.1")
	want(t, "counted", must(g.Counters())(t)[AppGone], 2)

	// Each restarts on its own, and cookies find the app.
	handshake := dial(t, spec.Address)
	want(t, "handshake", askWith(t, handshake, 0x80000001), "1.1")
	serve(apps[1].generation(1, 2, 1), "1.2")
	apps[1].ctl.Flip(1)
	ask("app 1 after its flip", 0x80000001, "1.2")
	ask("app 0 after app 1's flip", 0x80000000, "0.1")
	want(t, "handshake after the flip", askWith(t, handshake, 0x80000001), "1.1")
	want(t, "the same client with another app", askWith(t, handshake, 0x80000000), "0.1")
	seen := map[uint32]bool{}
	for _, at := range []struct {
		app, bank int
		text      string
	}{{0, 0, "0.1"}, {1, 0, "1.1"}, {1, 1, "1.2"}} {
		cookie := g.cookie(at.app, at.bank, 0)
		want(t, "cookies differ", seen[cookie], false)
		seen[cookie] = true
		ask("cookie of "+at.text, cookie, at.text)
	}

	// One that stops leaves its new flows to app 0.
	apps[1].ctl.SwapOrder(apps[1].ctl.Order(), nil)
	ask("app that stopped", 0x80000001, "0.1")
	want(t, "packets of app 1 are counted there", apps[1].ctl.Stats(1).Packets, 2)

	// Of the flow table each app is shown its own flows, and of a bank those of the generation that has it.
	flowsOf := func(app int) int {
		n := 0
		check(t, g.Flows(func(e FlowEntry) bool {
			if e.App == app {
				n++
			}
			return true
		}))
		return n
	}
	want(t, "flows of app 0", flowsOf(0) > 0, true)
	want(t, "flows of app 1", flowsOf(1), 2)
	check(t, g.Clear(1, 0))
	want(t, "flows of app 1 without a generation of its own", flowsOf(1), 1)
	apps[1].generation(0, 3, 1)
	want(t, "flows of app 1's next generation in that bank", flowsOf(1), 1)
	if _, ok := g.FlowsFD(); ok {
		t.Error("a table with the flows of several services was to be handed out")
	}
	if err := g.Join(4, apps[0].service); err == nil {
		t.Error("an app beyond max_apps joined")
	}
}

// Names for cookies are shared by all apps; the group says so when there are none left.
func TestCookieNamesRunOut(t *testing.T) {
	needRoot(t)
	g := must(CreateGroup(cbpfSpec("127.0.0.1:5001", 2)))(t)
	t.Cleanup(func() { check(t, g.Remove()); check(t, g.Close()) })
	for i := range control.Banks {
		check(t, g.SetBank(i%2, i, uint64(i+1), 1))
	}
	if err := g.SetBank(1, 0, 100, 1); err == nil {
		t.Fatal("a 33rd generation got a cookie")
	}
	check(t, g.Clear(0, 4))
	check(t, g.SetBank(1, 0, 100, 1))
	want(t, "name", g.cookie(1, 0, 0)&31, 4)
}
