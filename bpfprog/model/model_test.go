package model

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"grm/bpfprog/cbpf"
	"grm/control"
)

// newRandom is a source of random numbers; a failed test names its seed, and
// $GRM_SEED makes the next one use it.
func newRandom(t *testing.T) *rand.Rand {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("GRM_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("GRM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

var (
	client  = netip.MustParseAddrPort("192.0.2.1:4000")
	another = netip.MustParseAddrPort("[2001:db8::1]:4000")

	// firstWord is a program that returns the payload's first four bytes.
	firstWord = cbpf.Program{{Op: 0x20}, {Op: 0x16}}
)

// twoGenerations is a service that has flipped from generation 6, bank 5, to
// generation 7, bank 3; client has a flow at the old one.
func twoGenerations() *State {
	app := App{Joined: true, Order: control.MakeOrder([]int{3, 5}), Alive: 1<<3 | 1<<5}
	app.Banks[3] = Bank{Generation: 7, Sockets: 2, Tag: 1}
	app.Banks[5] = Bank{Generation: 6, Sockets: 2, Tag: 4}
	return &State{
		Apps:  []App{app},
		Names: [Names]Name{8: {Used: true, Bank: 3, Serial: 2}, 9: {Used: true, Bank: 5, Serial: 1}},
		Flows: map[netip.AddrPort]Home{client: {Bank: 5, Slot: 1, Tag: 4}},
	}
}

func dead(slots ...int) map[int]bool {
	m := map[int]bool{}
	for _, s := range slots {
		m[s] = true
	}
	return m
}

func word(v uint32) []byte { return []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)} }

func TestExplain(t *testing.T) {
	const lowHash, highHash = 0, 1<<32 - 1
	withApps := func(s *State) {
		s.Dissector, s.Program = CBPF, firstWord
		s.Apps = append(s.Apps, App{}, App{Joined: true, Order: control.MakeOrder([]int{1}), Alive: 1 << 1})
		s.Apps[2].Banks[1] = Bank{Generation: 3, Sockets: 1}
		s.Flows[another] = Home{App: 2, Bank: 1}
	}
	for name, test := range map[string]struct {
		change func(*State)
		packet Packet
		want   Verdict
		why    string // part of the last line
	}{
		"noop, low hash": {
			func(s *State) { s.Dissector = Noop }, Packet{Remote: client, Hash: lowHash},
			Verdict{Home: Home{Bank: 3, Slot: 0, Tag: 1}, NewFlow: true},
			"new flow: generation 7 in bank 3, the working one, gets the packet; the kernel's hash chooses among 2 sockets",
		},
		"noop, high hash": {
			func(s *State) { s.Dissector = Noop }, Packet{Remote: client, Hash: highHash},
			Verdict{Home: Home{Bank: 3, Slot: 1, Tag: 1}, NewFlow: true}, "new flow",
		},
		"flow, known, IPv4-mapped": {
			func(s *State) {}, Packet{Remote: netip.MustParseAddrPort("[::ffff:192.0.2.1]:4000")},
			Verdict{Home: Home{Bank: 5, Slot: 1, Tag: 4}}, "its socket lives",
		},
		"flow, another port": {
			func(s *State) {}, Packet{Remote: netip.MustParseAddrPort("192.0.2.1:4001")},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true}, "new flow",
		},
		"flow, known, socket dead": {
			func(s *State) { s.Apps[0].Banks[5].Dead = dead(1) }, Packet{Remote: client, Hash: highHash},
			Verdict{Home: Home{Bank: 5, Slot: 0, Tag: 4}, Events: []Event{DeadSlot}}, "another one of its generation",
		},
		"flow, known, bank dead": {
			func(s *State) { s.Apps[0].Banks[5].Dead = dead(0, 1) }, Packet{Remote: client},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{DeadSlot, StaleFlow}}, "new flow",
		},
		"flow, known, not alive": {
			func(s *State) { s.Apps[0].Alive = 1 << 3 }, Packet{Remote: client},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{StaleFlow}}, "new flow",
		},
		"flow, known, bank given to another": {
			func(s *State) { s.Apps[0].Banks[5].Tag++ }, Packet{Remote: client},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{StaleFlow}}, "new flow",
		},
		"flow, known, closing": {
			func(s *State) { s.Apps[0].Closing = true }, Packet{Remote: client},
			Verdict{Home: Home{Bank: 5, Slot: 1, Tag: 4}}, "its socket lives",
		},
		"flow, new, closing": {
			func(s *State) { s.Apps[0].Closing = true }, Packet{Remote: another},
			Verdict{Dropped: true, NewFlow: true, Events: []Event{DroppedClosing}}, "it is dropped: the service is being stopped",
		},
		"flow, new, one dead": {
			func(s *State) { s.Apps[0].Banks[3].Dead = dead(1) }, Packet{Remote: another, Hash: highHash},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true}, "among 1 sockets",
		},
		"flow, new, working dead": {
			func(s *State) { s.Apps[0].Banks[3].Dead = dead(0, 1) }, Packet{Remote: another},
			Verdict{Home: Home{Bank: 5, Tag: 4}, NewFlow: true, FellBack: true}, "generation 6 in bank 5, the newest before",
		},
		"flow, new, all dead": {
			func(s *State) { s.Apps[0].Order = control.MakeOrder([]int{7, 8}) }, Packet{Remote: another},
			Verdict{Dropped: true, NewFlow: true, Events: []Event{DroppedNoSocket}}, "it is dropped: no generation",
		},
		"flow, no service": {
			func(s *State) { s.Apps[0].Joined = false }, Packet{Remote: another},
			Verdict{Dropped: true, NewFlow: true, Events: []Event{DroppedNoSocket}}, "it is dropped: the group has no service",
		},
		"cookie of the old one": {
			withApps, Packet{Remote: another, Payload: word(uint32(MakeCookie(9, 1, 1)))},
			Verdict{Home: Home{Bank: 5, Slot: 1, Tag: 4}}, "its socket lives",
		},
		"cookie before": {
			withApps, Packet{Remote: client, Payload: word(uint32(MakeCookie(9, 0, 1)))},
			Verdict{Home: Home{Bank: 5, Slot: 1, Tag: 4}, Events: []Event{BadCookie}}, "its socket lives",
		},
		"cookie without a name": {
			withApps, Packet{Payload: word(0x20)},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{BadCookie}}, "new flow",
		},
		"cookie of no socket": {
			withApps, Packet{Payload: word(uint32(MakeCookie(9, 1, 2)))},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{BadCookie}}, "new flow",
		},
		"too short": {
			withApps, Packet{Remote: client, Payload: []byte{0, 0, 9}},
			Verdict{Home: Home{Bank: 5, Slot: 1, Tag: 4}, Events: []Event{CBPFError}}, "its socket lives",
		},
		"new flow": {
			withApps, Packet{Payload: word(1<<32 - 1)},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true}, "new flow",
		},
		"new flow of app 2": {
			withApps, Packet{Payload: word(0x80000002)},
			Verdict{Home: Home{App: 2, Bank: 1}, NewFlow: true}, "generation 3 in bank 1",
		},
		"embryo of app 2, as app 0": {
			withApps, Packet{Remote: another, Payload: word(0x80000000)},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true}, "generation 7",
		},
		"embryo of app 2": {
			withApps, Packet{Remote: another, Payload: word(0x80000002)},
			Verdict{Home: Home{App: 2, Bank: 1}}, "its socket lives",
		},
		"app without a service": {
			withApps, Packet{Payload: word(0x80000001)},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{AppGone}}, "generation 7",
		},
		"no such app": {
			withApps, Packet{Payload: word(0x80000003)},
			Verdict{Home: Home{Bank: 3, Tag: 1}, NewFlow: true, Events: []Event{BadApp}}, "generation 7",
		},
	} {
		s := twoGenerations()
		test.change(s)
		got := Explain(s, test.packet)
		if got.Home != test.want.Home || got.Dropped != test.want.Dropped || got.NewFlow != test.want.NewFlow ||
			got.FellBack != test.want.FellBack || !slices.Equal(got.Events, test.want.Events) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", name, got, test.want)
		} else if last := got.Why[len(got.Why)-1]; !strings.Contains(last, test.why) {
			t.Errorf("%s:\ngot  %s\nwant %s", name, last, test.why)
		}
	}
}

func TestExplainInWords(t *testing.T) {
	s := twoGenerations()
	s.Dissector, s.Program = CBPF, firstWord
	v := Explain(s, Packet{Remote: client, EtherType: etherIPv4, Payload: word(uint32(MakeCookie(9, 2, 1)))})
	const want = `dissector cbpf: 4 bytes, 2 instructions: cookie 0x0189
the cookie's check is 4 and not 3: it is made up, or of another generation that had the name 9
the flow table has an entry for it: socket 1 of generation 6 in bank 5
its socket lives, and gets the packet`
	if v.String() != want {
		t.Errorf("got\n%s", v)
	}
	const trace = "   0  ld [0]                       a=0x00000000 x=0x00000000\n   1  ret a                        a=0x00000189 x=0x00000000"
	if got := strings.Join(v.Trace, "\n"); got != trace {
		t.Errorf("got\n%s", got)
	}
}

// TestFarFallback: a live socket is found wherever the hash points to, however
// many are dead.
func TestFarFallback(t *testing.T) {
	random := newRandom(t)
	for range 2000 {
		b := Bank{Sockets: 1 + random.IntN(control.Slots), Dead: map[int]bool{}}
		for slot := range b.Sockets {
			b.Dead[slot] = true
		}
		hash := random.Uint32()
		if slot, ok := b.choose(hash); ok {
			t.Fatalf("found %d of %d dead ones", slot, b.Sockets)
		}
		alive := random.IntN(b.Sockets)
		delete(b.Dead, alive)
		if slot, ok := b.choose(hash); !ok || slot != alive {
			t.Fatalf("hash %d: found %d (%v), not %d of %d", hash, slot, ok, alive, b.Sockets)
		}
	}
	b := Bank{Sockets: 20, Dead: dead(0, 1, 2)}
	if slot, ok := b.choose(0); !ok || slot != 3 { // a neighbour
		t.Errorf("got %d, %v", slot, ok)
	}
}

// randomState is a group in any state, however it may have got there.
func randomState(random *rand.Rand) *State {
	s := &State{Dissector: Dissector(random.IntN(3)), Program: firstWord, Flows: map[netip.AddrPort]Home{}}
	apps := 1
	if s.Dissector == CBPF {
		apps += random.IntN(3)
	}
	home := func() Home {
		h := Home{App: random.IntN(apps), Bank: random.IntN(control.Banks), Slot: random.IntN(12)}
		h.Tag = s.Apps[h.App].Banks[h.Bank].Tag + uint16(random.IntN(8)/7)
		return h
	}
	for range apps {
		a := App{Joined: random.IntN(8) != 0, Alive: random.Uint32() | random.Uint32(), Closing: random.IntN(8) == 0}
		for b := range a.Banks {
			if random.IntN(3) == 0 {
				continue
			}
			a.Banks[b] = Bank{Generation: random.Uint64N(1000), Sockets: 1 + random.IntN(12), Tag: uint16(random.UintN(3)), Dead: map[int]bool{}}
			for slot := range a.Banks[b].Sockets {
				if random.IntN(2) == 0 {
					a.Banks[b].Dead[slot] = true
				}
			}
		}
		a.Order = control.MakeOrder(random.Perm(control.Banks)[:random.IntN(6)])
		s.Apps = append(s.Apps, a)
	}
	for _, remote := range []netip.AddrPort{client, another} {
		if random.IntN(2) == 0 {
			s.Flows[remote] = home()
		}
	}
	for i := range s.Names {
		h := home()
		s.Names[i] = Name{Used: random.IntN(4) != 0, App: h.App, Bank: h.Bank, Serial: uint16(random.UintN(20))}
	}
	return s
}

func randomPacket(random *rand.Rand) Packet {
	p := Packet{Remote: client, Hash: random.Uint32(), Payload: make([]byte, random.IntN(8))}
	if random.IntN(2) == 0 {
		p.Remote = another
	}
	for i := range p.Payload {
		p.Payload[i] = byte(random.UintN(256))
	}
	if len(p.Payload) > 4 {
		switch random.IntN(4) {
		case 0, 1:
			copy(p.Payload, word(random.Uint32N(1<<12)))
		case 2:
			copy(p.Payload, word(1<<31|random.Uint32N(4)))
		}
	}
	return p
}

// TestInvariants: every packet has a destination or a counted reason for none;
// a socket that gets one lives; what is of no known flow goes to a generation in
// the order, and never to an older one while a newer one has a socket for it.
func TestInvariants(t *testing.T) {
	random := newRandom(t)
	known := 0
	for range 20_000 {
		s, p := randomState(random), randomPacket(random)
		v := Explain(s, p)
		if !v.NewFlow {
			known++
		}
		dropCounted := slices.Contains(v.Events, DroppedClosing) || slices.Contains(v.Events, DroppedNoSocket)
		if len(v.Why) == 0 || v.Dropped != dropCounted {
			t.Fatalf("%+v", v)
		}
		app := &s.Apps[v.App]
		position := slices.Index(app.Order.Banks(), v.Bank)
		switch {
		case v.Dropped && !v.NewFlow:
			t.Fatalf("a known flow is dropped:\n%s", v)
		case v.Dropped:
		case !app.Joined && v.NewFlow, !app.Banks[v.Bank].lives(v.Slot), v.Tag != app.Banks[v.Bank].Tag:
			t.Fatalf("%+v", v)
		case v.NewFlow && (position < 0 || app.Closing || v.FellBack != (position > 0)):
			t.Fatalf("bank %d in %v: %+v", v.Bank, app.Order.Banks(), v)
		case v.NewFlow:
			for _, newer := range app.Order.Banks()[:position] {
				for slot := range app.Banks[newer].Sockets {
					if app.Banks[newer].lives(slot) {
						t.Fatalf("socket %d of bank %d lives: %+v", slot, newer, v)
					}
				}
			}
		case app.Alive>>v.Bank&1 == 0:
			t.Fatalf("bank %d does not serve its flows: %+v", v.Bank, v)
		}
		possible := Possible(s, p)
		if !slices.ContainsFunc(possible, func(other Verdict) bool {
			return other.Home == v.Home && other.Dropped == v.Dropped && other.NewFlow == v.NewFlow && slices.Equal(other.Events, v.Events)
		}) {
			t.Fatalf("%+v\nis none of the %d that are possible", v, len(possible))
		}
	}
	if known < 1000 {
		t.Errorf("only %d packets were of known flows", known)
	}
}

// TestPossible: what no hash leads to is not possible.
func TestPossible(t *testing.T) {
	s := twoGenerations()
	slots := func(p Packet) (found []int) {
		for _, v := range Possible(s, p) {
			if v.Dropped {
				found = append(found, -1)
			} else {
				found = append(found, v.Bank*1000+v.Slot)
			}
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	check := func(name string, p Packet, want ...int) {
		t.Helper()
		if got := slots(p); !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	check("known", Packet{Remote: client}, 5001)
	check("new", Packet{Remote: another}, 3000, 3001)
	s.Apps[0].Banks[3].Dead = dead(0)
	check("one dead", Packet{Remote: another}, 3001)
	s.Apps[0].Banks[3] = Bank{Sockets: 30, Dead: dead(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)}
	s.Apps[0].Banks[5] = Bank{}
	var want []int
	for slot := 10; slot < 30; slot++ {
		want = append(want, 3000+slot)
	}
	check("many dead", Packet{Remote: another}, want...)
}

func TestCookies(t *testing.T) {
	for _, index := range []int{0, 1, 100, 255} {
		seen := map[uint16]uint16{}
		for serial := range uint16(7) {
			cookie := MakeCookie(31, serial, index)
			if before, ok := seen[cookie]; ok || cookie == 0 {
				t.Errorf("index %d: serials %d and %d have cookie 0x%04x", index, before, serial, cookie)
			}
			seen[cookie] = serial
		}
	}
	// Of all values, an eighth passes for a cookie where all names are in use.
	s := steering{State: twoGenerations()}
	for i := range s.Names {
		s.Names[i] = Name{Used: true, Bank: i, Serial: uint16(3 * i)}
	}
	passed := 0
	for cookie := range 1 << 16 {
		if h, ok := s.readCookie(uint16(cookie)); ok {
			passed++
			if MakeCookie(cookie%Names, s.Names[cookie%Names].Serial, h.Slot) != uint16(cookie) {
				t.Fatalf("cookie 0x%04x read as %+v", cookie, h)
			}
		}
	}
	if passed != 1<<16/8 {
		t.Errorf("%d values passed", passed)
	}
}
