package load

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"grm/internal/testenv"
)

// server answers on a loopback socket as its function says: with as many packets as that returns.
func server(t *testing.T, address string, answer func(request []byte) [][]byte) testServer {
	t.Helper()
	local := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))
	c, err := net.ListenUDP("udp", local)
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	t.Cleanup(func() {
		c.Close()
		running.Wait()
	})
	running.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return // closed
			}
			for _, packet := range answer(buf[:n]) {
				c.WriteToUDPAddrPort(packet, from)
			}
		}
	})
	return testServer{c.LocalAddr().(*net.UDPAddr).AddrPort(), c}
}

// testServer is the address of a running server, and its socket.
type testServer struct {
	netip.AddrPort
	conn *net.UDPConn
}

// overflow is how many datagrams the kernel dropped because the server was too slow to take them: on a busy machine even a few are many.
func (s testServer) overflow(t *testing.T) uint64 {
	t.Helper()
	conn, err := s.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info [9]uint32 // SK_MEMINFO_VARS, of which the last is SK_MEMINFO_DROPS
	size := uint32(unsafe.Sizeof(info))
	if err := conn.Control(func(fd uintptr) {
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_MEMINFO, uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			t.Errorf("SO_MEMINFO: %v", errno)
		}
	}); err != nil {
		t.Fatal(err)
	}
	return uint64(info[8])
}

// clean fails the test if more went wrong than that the servers were too slow.
func clean(t *testing.T, r Result, servers ...testServer) {
	t.Helper()
	var overflow uint64
	for _, s := range servers {
		overflow += s.overflow(t)
	}
	if r.Lost != overflow || r.Moved+r.Duplicated+r.Strange+r.Pending() != 0 {
		t.Errorf("%d overflowed; %v", overflow, r)
	}
}

func echo(instance string) func([]byte) [][]byte {
	return func(request []byte) [][]byte { return [][]byte{append([]byte(instance+" "), request...)} }
}

// run starts a load, and ends it once it has sent the given number of datagrams.
func run(t *testing.T, o Options, datagrams uint64, meanwhile ...func(*Generator)) Result {
	t.Helper()
	g, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range meanwhile {
		part := datagrams * uint64(i+1) / uint64(len(meanwhile)+1)
		if err := g.Until("a part is sent", time.Minute, func(r Result) bool { return r.Sent >= part }); err != nil {
			t.Fatal(err)
		}
		f(g)
	}
	if err := g.Until("all is sent", time.Minute, func(r Result) bool { return r.Sent >= datagrams }); err != nil {
		t.Fatal(err)
	}
	r, err := g.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if r.Pending() != 0 || r.Sent < datagrams {
		t.Errorf("account does not add up: %v", r)
	}
	return r
}

// few is a load that even a starved test machine takes without overflowing a socket's queue.
var few = Options{Flows: 20, Pace: 20 * time.Millisecond, Length: 20, Deadline: 2 * time.Second, Seed: 1}

func TestAllAnswered(t *testing.T) {
	for name, addresses := range map[string][]string{"IPv4": {"127.0.0.1:0"}, "IPv6": {"[::1]:0"}, "both": {"127.0.0.1:0", "[::1]:0"}} {
		t.Run(name, func(t *testing.T) {
			o := few
			var servers []testServer
			for _, a := range addresses {
				s := server(t, a, echo("one"))
				servers, o.Targets = append(servers, s), append(o.Targets, s.AddrPort)
			}
			r := run(t, o, uint64(testenv.Scale(1000)))
			clean(t, r, servers...)
			if one := r.Instances["one"]; one.Answers != r.Answered || one.Flows != r.Flows-unanswered(r) || len(r.Instances) != 1 {
				t.Errorf("instances: %v of %v", r.Instances, r)
			}
			if w := r.Windows[0]; w.Worst <= 0 || w.Quantile(0.5) > w.Quantile(0.99) || w.Quantile(1) != w.Worst {
				t.Errorf("latencies: %v, %v, %v", w.Quantile(0.5), w.Quantile(0.99), w.Worst)
			}
		})
	}
}

// unanswered is how many flows were begun but had sent nothing when the load was stopped.
func unanswered(r Result) uint64 {
	n := r.Flows
	for _, in := range r.Instances {
		n -= in.Flows
	}
	return n
}

// TestFaultsAreCounted has a server that swallows and repeats, and counts what it does: the account must be the same.
func TestFaultsAreCounted(t *testing.T) {
	var requests, swallowed, repeated, strange atomic.Uint64
	target := server(t, "127.0.0.1:0", func(request []byte) [][]byte {
		answer := echo("one")(request)
		switch n := requests.Add(1); {
		case n%7 == 0:
			swallowed.Add(1)
			return nil
		case n%11 == 0:
			repeated.Add(2)
			return [][]byte{answer[0], answer[0], answer[0]}
		case n%13 == 0:
			strange.Add(3)
			return append(answer, []byte("nonsense"), []byte("one 99999 0 1"), []byte("one "))
		}
		return answer
	})
	o := few
	o.Targets = []netip.AddrPort{target.AddrPort}
	r := run(t, o, uint64(testenv.Scale(1000)), func(g *Generator) { g.Mark("second") }, func(g *Generator) { g.Mark("third") })
	if r.Sent != requests.Load()+target.overflow(t) || r.Lost != swallowed.Load()+target.overflow(t) || r.Duplicated != repeated.Load() || r.Strange != strange.Load() || r.Moved != 0 {
		t.Errorf("%d requests, %d swallowed, %d repeated, %d strange; but %v", requests.Load(), swallowed.Load(), repeated.Load(), strange.Load(), r)
	}
	if len(r.Missing) != maxMissing || r.Err() == nil {
		t.Errorf("%d missing are named; error %v", len(r.Missing), r.Err())
	}
	var sum Counts
	for i, w := range r.Windows {
		sum.add(w.Counts)
		if w.Sent == 0 || w.Lost == 0 || w.Pending() != 0 || i > 0 && w.Start != r.Windows[i-1].End {
			t.Errorf("window %+v", w.Counts)
		}
	}
	if sum != r.Counts || len(r.Windows) != 3 {
		t.Errorf("%d windows sum up to %+v, not %+v", len(r.Windows), sum, r.Counts)
	}
	if w, ok := r.Window("second"); !ok || w.Name != "second" {
		t.Error("no second window")
	}
	for _, part := range []string{"lost: datagram", fmt.Sprintf("%d lost", swallowed.Load()), `window "second"`} {
		if !strings.Contains(r.String(), part) {
			t.Errorf("the text has no %q: %v", part, r)
		}
	}
}

func TestMoves(t *testing.T) {
	for _, killed := range []bool{false, true} {
		var name atomic.Value
		name.Store("one")
		target := server(t, "127.0.0.1:0", func(request []byte) [][]byte { return echo(name.Load().(string))(request) })
		o := few
		o.Targets, o.Length = []netip.AddrPort{target.AddrPort}, 1_000_000 // no flow ends before the end
		r := run(t, o, uint64(testenv.Scale(1000)), func(g *Generator) {
			if err := g.Until("every flow was answered", time.Minute, func(r Result) bool { return r.Instances["one"].Flows == uint64(o.Flows) }); err != nil {
				t.Fatal(err)
			}
			g.Mark("after")
			if killed {
				g.Gone("one")
			}
			name.Store("two")
		})
		moved, taken := uint64(o.Flows), uint64(0)
		if killed {
			moved, taken = taken, moved
		}
		if r.Moved != moved || r.TakenOver != taken || r.Lost != target.overflow(t) || r.Instances["two"].Flows != 0 {
			t.Errorf("killed %v: %v", killed, r)
		}
	}
}

func TestSingleShots(t *testing.T) {
	o := few
	o.Length = 1
	one, two := server(t, "127.0.0.1:0", echo("one")), server(t, "[::1]:0", echo("two"))
	o.Targets = []netip.AddrPort{one.AddrPort, two.AddrPort}
	r := run(t, o, uint64(testenv.Scale(1000)))
	clean(t, r, one, two)
	if r.Flows < r.Sent || r.Instances["one"].Answers+r.Instances["two"].Answers != r.Answered {
		t.Errorf("not one flow for each datagram: %v", r)
	}
}

func TestDNS(t *testing.T) {
	target := server(t, "127.0.0.1:0", func(request []byte) [][]byte {
		var m dnsmessage.Message
		if err := m.Unpack(request); err != nil {
			t.Errorf("query: %v", err)
			return nil
		}
		m.Response = true
		m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET}, Body: &dnsmessage.TXTResource{TXT: []string{"one"}}}}
		answer, err := m.Pack()
		if err != nil {
			t.Errorf("answer: %v", err)
		}
		return [][]byte{answer}
	})
	o := few
	o.Targets, o.Protocol, o.Length = []netip.AddrPort{target.AddrPort}, DNS{}, 1
	r := run(t, o, uint64(testenv.Scale(1000)))
	clean(t, r, target)
	if r.Instances["one"].Answers != r.Answered {
		t.Error(r)
	}
}

func TestNobodyListens(t *testing.T) {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	o := few
	o.Targets = []netip.AddrPort{c.LocalAddr().(*net.UDPAddr).AddrPort()}
	c.Close()
	o.Deadline = 100 * time.Millisecond
	r := run(t, o, 200)
	if r.Answered != 0 || r.Lost != r.Sent || r.Refused == 0 {
		t.Error(r)
	}
}

func TestEndsByItself(t *testing.T) {
	o := few
	one := server(t, "127.0.0.1:0", echo("one"))
	o.Targets = []netip.AddrPort{one.AddrPort}
	o.Duration = 200 * time.Millisecond
	g, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.Wait()
	if err != nil || r.Sent == 0 {
		t.Errorf("%v, %v", r, err)
	}
	clean(t, r, one)
	g.Mark("after the end") // must not block
	if again := g.Snapshot(); again.Sent != r.Sent || len(again.Windows) != len(r.Windows) {
		t.Errorf("the account changed after the end: %v", again)
	}

	ctx, cancel := context.WithCancel(context.Background())
	o.Duration = 0
	if g, err = Start(ctx, o); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := g.Wait(); err != nil {
		t.Error(err)
	}
}

func TestSeedDecides(t *testing.T) {
	lengths := func(seed uint64) (all []int) {
		o, err := Options{Targets: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9")}, Flows: 50, Seed: seed}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		e, err := newEngine(o)
		if err != nil {
			t.Fatal(err)
		}
		defer e.close()
		for len(e.queue) > 0 {
			f := e.queue.remove(0)
			all = append(all, int(f.number), f.length, int(f.next))
		}
		return all
	}
	one, again, two := fmt.Sprint(lengths(1)), fmt.Sprint(lengths(1)), fmt.Sprint(lengths(2))
	if one != again || one == two {
		t.Errorf("seed 1: %s\nseed 1: %s\nseed 2: %s", one, again, two)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	target := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:9")}
	for _, o := range []Options{{}, {Targets: target, Flows: -1}, {Targets: target, Pace: -1}, {Targets: target, Size: 1 << 20}, {Targets: target, NetNS: "/nonexistent"}} {
		if g, err := Start(context.Background(), o); err == nil {
			g.Stop()
			t.Errorf("%+v: no error", o)
		}
	}
}

func TestSourcesAreUsedOnce(t *testing.T) {
	used := map[string]bool{}
	s := newSources()
	s.v4.left = 3 // the next host's turn comes within this test
	for range 10 {
		fd, err := s.dial(netip.MustParseAddrPort("127.0.0.1:9"))
		if err != nil {
			t.Fatal(err)
		}
		local, err := unix.Getsockname(fd)
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			t.Fatal(err)
		}
		at := fmt.Sprint(*local.(*unix.SockaddrInet4))
		if used[at] {
			t.Errorf("%s is used twice", at)
		}
		used[at] = true
	}
	full := sources{v6: source{port: firstPort}}
	if _, err := full.dial(netip.MustParseAddrPort("[::1]:9")); err == nil || !strings.Contains(err.Error(), "all source ports") {
		t.Errorf("IPv6 ports used up: %v", err)
	}
}

func TestQuantile(t *testing.T) {
	for v := uint64(0); v < 1<<20; v = v*9/8 + 1 {
		b := bucket(v)
		if up := bound(b); up < v || up > v+v/fine+1 || b > 0 && bound(b-1) >= v {
			t.Fatalf("%d is in bucket %d, to %d", v, b, up)
		}
	}
	if b := bucket(1<<63 + 1); b >= len(Window{}.buckets) {
		t.Errorf("bucket %d", b)
	}
	var w Window
	if q := w.Quantile(0.5); q != 0 {
		t.Errorf("median of nothing: %v", q)
	}
	for i := range 100 {
		w.Answered++
		w.latency(time.Duration(i) * time.Millisecond)
	}
	if q := w.Quantile(0.5); q < 49*time.Millisecond || q > 56*time.Millisecond {
		t.Errorf("median of 0 to 99 ms: %v", q)
	}
	if q := w.Quantile(1); q != 99*time.Millisecond {
		t.Errorf("maximum of 0 to 99 ms: %v", q)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte("one 1 2 3"), uint64(1), uint64(2), int64(3), 0)
	f.Add([]byte(""), uint64(0), uint64(1<<40), int64(1<<40), 100)
	f.Fuzz(func(t *testing.T, packet []byte, flow, seq uint64, sent int64, size int) {
		for _, p := range []Protocol{Echo{}, DNS{}} {
			_, _, _ = p.Answer(packet) // whatever it is
			d := Datagram{flow, seq, time.Duration(sent & math.MaxInt64)}
			request := p.Request(nil, d, size%maxDatagram)
			var answer []byte
			switch p.(type) {
			case Echo:
				answer = append([]byte("me "), request...)
			case DNS:
				answer = request
				answer[2] |= 0x80 // the bit that makes it a response
			}
			instance, got, err := p.Answer(answer)
			if err != nil || got != d || instance != "me" && p != (DNS{}) {
				t.Errorf("%T: %q brings back %v from %q: %v", p, answer, got, instance, err)
			}
		}
	})
}
