package bpfprog

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/testenv"
)

// twoGenerations is a group whose bank 0 drains, with one flow that lives
// there, and whose bank 1 works.
type twoGenerations struct {
	*rig
	*wire
	old, working []*net.UDPConn
	to           netip.AddrPort
	known        netip.AddrPort // the flow's client
	before       tally
}

// tally is what a group has counted: packets of either bank, and dropped ones.
type tally struct{ old, working, dropped uint64 }

func (a tally) minus(b tally) tally {
	return tally{a.old - b.old, a.working - b.working, a.dropped - b.dropped}
}

// newTwoGenerations has its known flow send to that address. Its client's
// address is another one than that of everybody else.
func newTwoGenerations(t *testing.T, spec GroupSpec, to netip.AddrPort) *twoGenerations {
	g := &twoGenerations{rig: newRig(t, spec), wire: newWire(t), to: to}
	g.known = netip.AddrPortFrom(to.Addr(), 4444)
	if to.Addr().Is4() {
		g.known = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 9, 9, 9}), 4444)
	}
	g.old, g.working = g.generation(0, 1, 2), g.generation(1, 2, 2)
	g.ctl.Flip(0)
	for range 3 { // of a grown flow, which does not expire within the test
		g.deliver(datagram(g.known, g.to, []byte("hello")))
	}
	want(g.rig.t, "packets of the known flow", len(mailbox(g.rig.t, g.old)), 3)
	g.ctl.SetState(0, control.Draining)
	g.ctl.Flip(1)
	g.ctl.SetState(1, control.Serving)
	g.before = g.tally()
	return g
}

// strangerTo is a client of no known flow, with that port.
func strangerTo(to netip.AddrPort, port uint16) netip.AddrPort {
	if to.Addr().Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 2}), port)
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), port)
}

func (g *twoGenerations) tally() tally {
	g.rig.t.Helper()
	c := must(g.Counters())(g.rig.t)
	return tally{g.ctl.Stats(0).Packets, g.ctl.Stats(1).Packets, c[DroppedClosing] + c[DroppedNoSocket]}
}

// counted is what was counted since it was asked last.
func (g *twoGenerations) counted() tally {
	now := g.tally()
	defer func() { g.before = now }()
	return now.minus(g.before)
}

// arrives sends packets, and asserts that they are one datagram with that
// payload for the old or for the working generation.
func (g *twoGenerations) arrives(what string, from netip.AddrPort, payload []byte, packets ...[]byte) {
	t := g.rig.t
	t.Helper()
	g.deliver(packets...)
	got, other, expected := mailbox(t, g.working), mailbox(t, g.old), tally{working: 1}
	if from == g.known {
		got, other, expected = other, got, tally{old: 1}
	}
	want(t, what+": counted", g.counted(), expected)
	if len(other) != 0 || len(got) != 1 || got[0] != (mail{from, string(payload)}) {
		t.Fatalf("%s: wanted %d bytes of %s, not %d datagrams there and %d elsewhere", what, len(payload), from, len(got), len(other))
	}
}

// isLost sends packets that the kernel is to throw away before a group sees them.
func (g *twoGenerations) isLost(what string, packets ...[]byte) {
	t := g.rig.t
	t.Helper()
	g.deliver(packets...)
	want(t, what+": counted", g.counted(), tally{})
	want(t, what+": arrived", len(mailbox(t, g.old))+len(mailbox(t, g.working)), 0)
}

// overBoth runs a test with a known flow and a stranger of either family.
func overBoth(t *testing.T, test func(t *testing.T, g *twoGenerations, from netip.AddrPort)) {
	for _, address := range []string{"127.0.0.1:5001", "[::1]:5001"} {
		t.Run(address, func(t *testing.T) {
			g := newTwoGenerations(t, flowSpec(address), addr(address))
			t.Run("known", func(t *testing.T) { g.rig.t, g.wire.t = t, t; test(t, g, g.known) })
			t.Run("new", func(t *testing.T) { g.rig.t, g.wire.t = t, t; test(t, g, strangerTo(g.to, 5555)) })
		})
	}
}

func payloadOf(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>8 + i*7)
	}
	return p
}

// TestLengths: datagrams of any length, none included, and ones whose IP packet
// is longer than they say.
func TestLengths(t *testing.T) {
	overBoth(t, func(t *testing.T, g *twoGenerations, from netip.AddrPort) {
		for _, n := range []int{0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 1471, 1472, 1473, 9001, 32767, 65000} {
			payload := payloadOf(n)
			g.arrives(fmt.Sprintf("%d bytes", n), from, payload, datagram(from, g.to, payload))
			if n < 2000 {
				whole := ip(from.Addr(), g.to.Addr(), unix.IPPROTO_UDP, append(udp(from, g.to, payload), "not of the datagram"...))
				g.arrives(fmt.Sprintf("%d bytes and padding", n), from, payload, whole)
				g.arrives(fmt.Sprintf("%d bytes in a long frame", n), from, payload, append(datagram(from, g.to, payload), payload...))
			}
		}
	})
}

// TestTruncated: a packet that lacks its end never reaches a group.
func TestTruncated(t *testing.T) {
	overBoth(t, func(t *testing.T, g *twoGenerations, from netip.AddrPort) {
		whole := datagram(from, g.to, payloadOf(40))
		for n := 1; n < len(whole); n++ {
			g.isLost(fmt.Sprintf("%d of %d bytes", n, len(whole)), whole[:n])
		}
		header := len(whole) - 48
		for n := range 48 { // with an IP header that says so
			g.isLost(fmt.Sprintf("%d bytes of a datagram", n), ip(from.Addr(), g.to.Addr(), unix.IPPROTO_UDP, whole[header:][:n]))
		}
		for _, length := range []uint16{1, 7, 49, 0x7fff, 0xffff} { // of UDP, and lies
			lie := bytes.Clone(whole)
			binary.BigEndian.PutUint16(lie[header+4:], length)
			g.isLost(fmt.Sprintf("UDP length %d", length), lie)
		}
	})
}

// lastFragmented is the identification of the last fragmented datagram. None is used again: the kernel keeps parts that lack others for a minute.
var lastFragmented uint32

// TestFragments: a fragmented datagram is one packet, of the flow that it is of,
// in whatever order its parts come. Parts that overlap are no datagram, and
// spoil nothing for the next one.
func TestFragments(t *testing.T) {
	overBoth(t, func(t *testing.T, g *twoGenerations, from netip.AddrPort) {
		for _, n := range []int{32, 1400, 5000, 60_000} {
			payload := payloadOf(n)
			whole := datagram(from, g.to, payload)
			size := n + 8
			a, b, c := piece{0, 8}, piece{8, 16}, piece{16, size}
			for what, pieces := range map[string][]piece{
				"one":              {{0, size}},
				"in order":         {a, b, c},
				"backwards":        {c, b, a},
				"middle last":      {a, c, b},
				"middle first":     {b, c, a},
				"uneven":           {{0, 24}, {24, size}},
				"twice the same":   {a, a, b, c},
				"the end first":    {{size - size%8 - 8, size}, {0, size - size%8 - 8}},
				"one in the other": {{0, 16}, b, c},
			} {
				lastFragmented++
				g.arrives(fmt.Sprintf("%d bytes, %s", n, what), from, payload, fragments(whole, lastFragmented, pieces...)...)
			}
			for what, pieces := range map[string][]piece{
				"first overlaps":  {{0, 16}, {8, 24}, {24, size}},
				"second overlaps": {a, {8, 24}, c},
				"last overlaps":   {{0, 16}, {16, 24}, {8, size}},
				"around another":  {a, b, {0, 24}, {24, size}},
				"middle missing":  {a, c},
				"first missing":   {b, c},
			} {
				lastFragmented++
				g.isLost(fmt.Sprintf("%d bytes, %s", n, what), fragments(whole, lastFragmented, pieces...)...)
			}
		}
	})
}

// extension is a hop-by-hop or destination options header of that many octets,
// in front of what follows.
func extension(next byte, octets int, body []byte) []byte {
	h := make([]byte, octets)
	h[0], h[1] = next, byte(octets/8-1)
	h[2], h[3] = 0x1e, byte(octets-4) // an option that may be skipped
	return append(h, body...)
}

// TestExtensionHeaders: whatever stands between the IPv6 header and the
// datagram, the flow is the same.
func TestExtensionHeaders(t *testing.T) {
	const hopByHop, destination = unix.IPPROTO_HOPOPTS, unix.IPPROTO_DSTOPTS
	for _, spec := range []GroupSpec{flowSpec("[::1]:5001"), flowSpec("[::]:5001")} {
		t.Run(spec.Address.String(), func(t *testing.T) {
			g := newTwoGenerations(t, spec, addr("[::1]:5001"))
			for _, from := range []netip.AddrPort{g.known, strangerTo(g.to, 5555)} {
				for _, n := range []int{0, 1, 100, 1300} {
					payload := payloadOf(n)
					body := udp(from, g.to, payload)
					packet := func(first byte, body []byte) []byte { return ip(from.Addr(), g.to.Addr(), first, body) }
					for what, p := range map[string][]byte{
						"hop-by-hop":           packet(hopByHop, extension(unix.IPPROTO_UDP, 8, body)),
						"destination":          packet(destination, extension(unix.IPPROTO_UDP, 16, body)),
						"both":                 packet(hopByHop, extension(destination, 16, extension(unix.IPPROTO_UDP, 8, body))),
						"two of destination":   packet(destination, extension(destination, 8, extension(unix.IPPROTO_UDP, 24, body))),
						"a long one":           packet(destination, extension(unix.IPPROTO_UDP, 256, body)),
						"fragment in one part": packet(unix.IPPROTO_FRAGMENT, append([]byte{unix.IPPROTO_UDP, 0, 0, 0, 1, 2, 3, byte(n)}, body...)),
						"options and a fragment": packet(hopByHop, extension(unix.IPPROTO_FRAGMENT, 8,
							append([]byte{destination, 0, 0, 0, 1, 2, 4, byte(n)}, extension(unix.IPPROTO_UDP, 8, body)...))),
					} {
						g.arrives(fmt.Sprintf("%s, %d bytes from %s", what, n, from), from, payload, p)
					}
					for what, p := range map[string][]byte{
						"cut off":                packet(destination, extension(unix.IPPROTO_UDP, 16, nil)[:8]),
						"hop-by-hop in between":  packet(destination, extension(hopByHop, 8, extension(unix.IPPROTO_UDP, 8, body))),
						"nothing follows":        packet(destination, extension(unix.IPPROTO_NONE, 8, body)),
						"an option nobody knows": packet(destination, append([]byte{unix.IPPROTO_UDP, 0, 0xc2, 4, 0, 0, 0, 0}, body...)),
					} {
						g.isLost(fmt.Sprintf("%s, %d bytes from %s", what, n, from), p)
					}
				}
			}
		})
	}
}

// TestIPv4Options: the datagram does not begin where it mostly does.
func TestIPv4Options(t *testing.T) {
	g := newTwoGenerations(t, flowSpec("127.0.0.1:5001"), addr("127.0.0.1:5001"))
	for _, from := range []netip.AddrPort{g.known, strangerTo(g.to, 5555)} {
		for what, options := range map[string][]byte{
			"nothing": {1, 1, 1, 1}, "end": {0, 0, 0, 0}, "record route": {7, 7, 4, 0, 0, 0, 0, 1},
			"router alert": {148, 4, 0, 0}, "as many as there can be": bytes.Repeat([]byte{1}, 40),
		} {
			payload := payloadOf(30)
			g.arrives(what+" from "+from.String(), from, payload, ip(from.Addr(), g.to.Addr(), unix.IPPROTO_UDP, udp(from, g.to, payload), options...))
		}
		g.isLost("source route of "+from.String(), ip(from.Addr(), g.to.Addr(), unix.IPPROTO_UDP, udp(from, g.to, nil), 131, 7, 4, 127, 0, 0, 3, 0))
	}
}

// TestCookieBehindTheFirstPart: a cookie is read wherever it stands in the
// packet: not in the linear part of its buffer, in another fragment, behind
// extension headers; but never from behind the datagram's end.
func TestCookieBehindTheFirstPart(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5001", "[::1]:5001"} {
		for _, at := range []int{0, 2, 7, 1200, 3000} {
			t.Run(fmt.Sprintf("%s, at %d", address, at), func(t *testing.T) {
				spec := cbpfSpec(address, 1)
				spec.Dissector.Program = slices.Clone(firstWord)
				spec.Dissector.Program[0].K = uint32(at)
				g := newTwoGenerations(t, spec, addr(address))
				from := strangerTo(g.to, 5555)
				cookie := g.cookie(0, 0, 1)
				payload := binary.BigEndian.AppendUint32(payloadOf(at), cookie)
				size := len(payload) + 8
				whole := datagram(from, g.to, payload)
				packets := map[string][][]byte{"whole": {whole}}
				if at > 8 {
					packets["two parts"] = fragments(whole, 1, piece{0, 8}, piece{8, size})
					packets["two parts, backwards"] = fragments(whole, 2, piece{8, size}, piece{0, 8})
					border := (8 + at + 2) &^ 7 // through the cookie, if it can be
					packets["cut through"] = fragments(whole, 3, piece{0, border}, piece{border, size})
				}
				if from.Addr().Is6() {
					packets["extension"] = [][]byte{ip(from.Addr(), g.to.Addr(), unix.IPPROTO_DSTOPTS, extension(unix.IPPROTO_UDP, 24, udp(from, g.to, payload)))}
				}
				for what, p := range packets {
					g.deliver(p...)
					want(t, fmt.Sprintf("%s, cookie at %d: counted", what, at), g.counted(), tally{old: 1})
					want(t, "arrived", fmt.Sprint(mailbox(t, g.old[1:])), fmt.Sprint([]mail{{from, string(payload)}}))
				}
				errors := must(g.Counters())(t)[CBPFError]
				short := ip(from.Addr(), g.to.Addr(), unix.IPPROTO_UDP, append(udp(from, g.to, payload[:at+3]), payload[at+3:]...))
				g.deliver(short)
				want(t, fmt.Sprintf("cookie at %d, but for its last byte: counted", at), g.counted(), tally{working: 1})
				want(t, "read past the end", must(g.Counters())(t)[CBPFError]-errors, 1)
			})
		}
	}
}

// TestMutatedPackets: whatever is wrong with a packet, the kernel throws it away
// before a group sees it, or it goes to its flow's home, or else to the working
// generation; and each one is counted once, where it went.
func TestMutatedPackets(t *testing.T) {
	random := newRandom(t)
	dual := flowSpec("[::]:5001")
	dual.DualStack = true
	for name, c := range map[string]struct {
		spec GroupSpec
		to   string
	}{
		"IPv4":                   {flowSpec("127.0.0.1:5001"), "127.0.0.1:5001"},
		"IPv6":                   {flowSpec("[::1]:5001"), "[::1]:5001"},
		"IPv4 to any address":    {flowSpec("0.0.0.0:5001"), "127.0.0.1:5001"},
		"IPv4 to both, mapped":   {dual, "127.0.0.1:5001"},
		"IPv6 to both":           {dual, "[::1]:5001"},
		"IPv6, nothing is known": {noopSpec("[::1]:5001"), "[::1]:5001"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newTwoGenerations(t, c.spec, addr(c.to))
			var sum tally
			rejected, broken := 0, 0
			for i := range testenv.Scale(10_000) {
				from := g.known
				if random.IntN(2) == 0 {
					from = strangerTo(g.to, uint16(1024+random.UintN(1<<16-1024)))
				}
				packet := mutate(random, datagram(from, g.to, payloadOf(random.IntN(200))))
				errors := 0
				if i%64 == 0 {
					errors = checksumErrors(t)
				}
				etherType := uint16(unix.ETH_P_IP)
				if g.to.Addr().Is6() {
					etherType = unix.ETH_P_IPV6
				}
				g.send(etherType, packet)
				g.settle()
				old, working, counted := mailbox(t, g.old), mailbox(t, g.working), g.counted()
				if toMany(packet) {
					continue // each socket of the address gets a copy, without a program being asked
				}
				sum.old, sum.working, sum.dropped = sum.old+counted.old, sum.working+counted.working, sum.dropped+counted.dropped
				fail := func(why string) {
					t.Fatalf("packet %d, %x: %s; counted %+v, arrived at the old one %v, at the working one %v", i, packet, why, counted, old, working)
				}
				switch total := counted.old + counted.working + counted.dropped; {
				case total > 1:
					fail("it was counted more than once")
				case counted.dropped != 0:
					fail("it was dropped although the working generation lives")
				case uint64(len(old)) > counted.old || uint64(len(working)) > counted.working:
					fail("it arrived where it was not counted")
				case total == 0:
					rejected++
				case len(old)+len(working) == 0:
					broken++
					if i%64 == 0 && checksumErrors(t) != errors+1 {
						fail("it was counted, but neither arrived nor had a wrong checksum")
					}
				case len(old) == 1 && (old[0].from != g.known || c.spec.Dissector.Kind == Noop):
					fail("one of no known flow went to the draining generation")
				case len(working) == 1 && working[0].from == g.known && c.spec.Dissector.Kind != Noop:
					fail("one of a known flow went elsewhere")
				}
			}
			t.Logf("%d rejected, %d to the draining generation, %d to the working one, of them %d with a wrong checksum", rejected, sum.old, sum.working, broken)
			from := strangerTo(g.to, 1000)
			g.arrives("a packet afterwards", from, nil, datagram(from, g.to, nil))
		})
	}
}

// mutate changes a packet a little, and mostly makes its checksums good again,
// so that the kernel has another reason to look at it.
func mutate(random *rand.Rand, p []byte) []byte {
	header, address := 20, 4
	if p[0]>>4 == 6 {
		header, address = 40, 16
	}
	short := func(at int) {
		if at+2 <= len(p) {
			binary.BigEndian.PutUint16(p[at:], uint16(random.UintN(uint(2*len(p)))))
		}
	}
	for range 1 + random.IntN(2) {
		switch random.IntN(8) {
		case 0:
			p[random.IntN(min(len(p), header+8))] ^= 1 << random.IntN(8)
		case 1:
			p[random.IntN(min(len(p), header+8))] = byte(random.UintN(256))
		case 2:
			p[random.IntN(len(p))] = byte(random.UintN(256))
		case 3:
			p = p[:1+random.IntN(len(p))]
		case 4:
			p = append(p, payloadOf(random.IntN(100))...)
		case 5: // length of the datagram
			short(header + 4)
		case 6: // of the packet
			short(map[int]int{20: 2, 40: 4}[header])
		case 7: // flags and offset of a fragment, or something that comes first
			if header == 20 {
				short(6)
			} else if len(p) > 6 {
				p[6] = []byte{0, 6, 17, 43, 44, 50, 51, 58, 59, 60, 135}[random.IntN(11)]
			}
		}
	}
	if len(p) >= header+8 && random.IntN(4) != 0 {
		d := p[header:]
		if n := int(binary.BigEndian.Uint16(d[4:])); n >= 8 && n < len(d) {
			d = d[:n]
		}
		udpChecksum(d, p[header-2*address:header-address], p[header-address:header])
	}
	if header == 20 && len(p) >= 20 && random.IntN(8) != 0 {
		fixHeader(p)
	}
	return p
}

// TestToMany: of a packet to a multicast or broadcast address the kernel gives a
// copy to each socket of the port, and asks no program.
func TestToMany(t *testing.T) {
	g := newTwoGenerations(t, flowSpec("0.0.0.0:5001"), addr("127.0.0.1:5001"))
	for _, to := range []string{"127.255.255.255:5001", "224.0.0.1:5001"} {
		g.deliver(datagram(strangerTo(g.to, 5555), addr(to), []byte("all")))
		want(t, to+": at the old generation", len(mailbox(t, g.old)), len(g.old))
		want(t, to+": at the working one", len(mailbox(t, g.working)), len(g.working))
		want(t, to+": counted", g.counted(), tally{})
	}
}

// toMany says whether a packet is to more than one host, or socket.
func toMany(p []byte) bool {
	switch {
	case len(p) >= 40 && p[0]>>4 == 6:
		return p[24] == 0xff
	case len(p) >= 20 && p[0]>>4 == 4:
		to := netip.AddrFrom4([4]byte(p[16:20]))
		return to.IsMulticast() || strings.HasSuffix(to.String(), ".255.255.255") || to.IsUnspecified() || to == netip.AddrFrom4([4]byte{127, 0, 0, 0})
	}
	return false
}
