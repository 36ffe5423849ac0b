// Package model is the data plane in plain Go: where a group's steering program
// sends a packet, and why. It follows bpfprog/c (steer.bpf.c, select.h) rule by
// rule. It is what an operator gets explained, and what tests compare the
// kernel with. It changes nothing: the programs also enter new flows into the
// flow table and let known ones become assured.
package model

import (
	"fmt"
	"net/netip"
	"strings"

	"grm/bpfprog/cbpf"
	"grm/control"
)

// Dissector is how a group's packets name their flow.
type Dissector int

const (
	Flow Dissector = iota // by the sender's address and port
	Noop                  // not at all: every packet is a new flow
	CBPF                  // by what a classic program finds
)

// State is what a group's maps say at one moment.
type State struct {
	Dissector Dissector
	Program   cbpf.Program // of dissector CBPF; it must have passed cbpf.Check
	Apps      []App        // by number; a group without apps has one, and only one of dissector CBPF has more
	Names     [Names]Name  // what the names in cookies stand for
	// Flows are the flow table's entries that have not expired, by FlowKey.
	Flows map[netip.AddrPort]Home
}

// App is one service of the group.
type App struct {
	Joined  bool // there is such a service
	Order   control.Order
	Alive   uint32
	Closing bool
	Banks   [control.Banks]Bank
}

// Bank is one generation's sockets in the group.
type Bank struct {
	Generation uint64
	Sockets    int          // 0: no generation has the bank
	Tag        uint16       // moves on each time that the bank is given to a generation
	Dead       map[int]bool // slots whose socket is gone
}

func (b *Bank) lives(slot int) bool { return slot < b.Sockets && !b.Dead[slot] }

// Home is where a flow lives. Its App and Bank must be ones that the State has.
type Home struct {
	App, Bank, Slot int
	Tag             uint16 // the bank's when the flow came
}

// Event is something that a group counts apart from its packets, by the name
// that its counter has.
type Event string

const (
	DroppedClosing  Event = "dropped_closing"
	DroppedNoSocket Event = "dropped_no_socket"
	DeadSlot        Event = "dead_slot"
	StaleFlow       Event = "stale_flow"
	BadCookie       Event = "bad_cookie"
	CBPFError       Event = "cbpf_error"
	BadApp          Event = "bad_app"
	AppGone         Event = "app_gone"
)

// Verdict is what becomes of a packet.
type Verdict struct {
	Home     // unless it is dropped
	Dropped  bool
	NewFlow  bool // it is of no known flow
	FellBack bool // so that it is for the working generation, which has no socket for it
	Events   []Event
	Why      []string // what was decided, in order
	Trace    []string // the classic program's run, an instruction a line
}

// String is the verdict in words, a decision a line.
func (v Verdict) String() string { return strings.Join(v.Why, "\n") }

func (v *Verdict) because(format string, args ...any) {
	v.Why = append(v.Why, fmt.Sprintf(format, args...))
}

// FlowKey is how the sender's address is written in State.Flows: an IPv4 one as
// such, whatever the socket's family, and without a zone.
func FlowKey(remote netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(remote.Addr().Unmap().WithZone(""), remote.Port())
}

// Explain says where the packet goes. Where the kernel's hash chooses among
// sockets, the words leave it open, and Home follows p.Hash.
func Explain(s *State, p Packet) Verdict {
	return explain(s, p, func(b *Bank) (int, bool) { return b.choose(p.Hash) })
}

// Possible is every verdict that some hash leads to. (It may be more: it does
// not look how the choices in several banks hang together.)
func Possible(s *State, p Packet) []Verdict {
	var all []Verdict
	// The option taken at each choice; what follows takes the first one.
	var taken []int
	for {
		var options []int
		all = append(all, explain(s, p, func(b *Bank) (int, bool) {
			slots := b.choices()
			if len(slots) == 0 {
				return 0, false
			}
			depth := len(options)
			options = append(options, len(slots))
			if depth == len(taken) {
				taken = append(taken, 0)
			}
			return slots[taken[depth]], true
		}))
		// Count up: the last choice that has another option takes that.
		taken = taken[:len(options)]
		for len(taken) > 0 && taken[len(taken)-1]+1 == options[len(taken)-1] {
			taken = taken[:len(taken)-1]
		}
		if len(taken) == 0 {
			return all
		}
		taken[len(taken)-1]++
	}
}

// chooser finds a live socket of a bank, if it does.
type chooser func(*Bank) (slot int, ok bool)

// steering is one packet's way through the program.
type steering struct {
	*State
	Verdict
	packet Packet
	choose chooser
}

func (s *steering) count(e Event) { s.Events = append(s.Events, e) }

func explain(state *State, p Packet, choose chooser) Verdict {
	s := &steering{State: state, packet: p, choose: choose}
	switch s.Dissector {
	case Flow:
		s.because("dissector flow: the sender is %s", FlowKey(p.Remote))
		s.byFlow(0)
	case CBPF:
		s.byProgram()
	default:
		s.because("dissector noop: every packet is a new flow")
		s.asNew(0)
	}
	return s.Verdict
}

// byFlow gives the packet to the socket that the flow table has for its sender,
// or treats it as a new flow of that app.
func (s *steering) byFlow(app int) {
	home, known := s.Flows[FlowKey(s.packet.Remote)]
	switch {
	case !known:
		s.because("the flow table has no entry for it")
	case home.App != app:
		s.because("the flow table has an entry for it, but of app %d", home.App)
	default:
		s.because("the flow table has an entry for it: %s", s.name(home))
		if s.toHome(home) {
			return
		}
		s.count(StaleFlow)
	}
	s.asNew(app)
}

// toHome gives the packet to the socket that its flow lives at, or to another
// one of the same generation.
func (s *steering) toHome(h Home) bool {
	bank := &s.Apps[h.App].Banks[h.Bank]
	switch {
	case h.Slot >= bank.Sockets || h.Tag != bank.Tag:
		s.because("the generation that this was of has left bank %d", h.Bank)
		return false
	case s.Apps[h.App].Alive>>h.Bank&1 == 0:
		s.because("generation %d does not serve its flows any more", bank.Generation)
		return false
	case bank.lives(h.Slot):
		s.because("its socket lives, and gets the packet")
		s.Home = h
		return true
	}
	s.count(DeadSlot)
	slot, ok := s.choose(bank)
	if !ok {
		s.because("its socket is gone, and no other of its generation lives")
		return false
	}
	s.because("its socket is gone; another one of its generation gets the packet")
	s.Home = Home{App: h.App, Bank: h.Bank, Slot: slot, Tag: bank.Tag}
	return true
}

// resolve is the app whose new flows these are: app 0 if the one that is asked
// for has no service, or none that has ever served.
func (s *steering) resolve(app int) int {
	if a := &s.Apps[app]; app == 0 || a.Joined && a.Order.Working() >= 0 {
		return app
	}
	s.because("app %d has no service that serves: its new flows go to app 0", app)
	s.count(AppGone)
	return 0
}

// asNew gives the packet to the working generation of an app, or to the next
// newest in the order that has a socket for it, or drops it.
func (s *steering) asNew(number int) {
	app := &s.Apps[number]
	s.NewFlow = true
	drop := func(e Event, why string) {
		s.because("it is dropped: %s", why)
		s.count(e)
		s.Dropped = true
	}
	switch {
	case !app.Joined:
		drop(DroppedNoSocket, "the group has no service")
		return
	case app.Closing:
		drop(DroppedClosing, "the service is being stopped, and takes no new flow")
		return
	}
	for i, b := range app.Order.Banks() {
		bank := &app.Banks[b]
		slot, ok := s.choose(bank)
		if !ok {
			s.because("new flow, but no socket of generation %d in bank %d lives", bank.Generation, b)
			continue
		}
		s.Home = Home{App: number, Bank: b, Slot: slot, Tag: bank.Tag}
		s.FellBack = i > 0
		which := "the working one"
		if s.FellBack {
			which = "the newest before"
		}
		s.because("new flow: generation %d in bank %d, %s, gets the packet; the kernel's hash chooses among %d sockets",
			bank.Generation, b, which, bank.Sockets-len(bank.Dead))
		return
	}
	drop(DroppedNoSocket, "no generation that new flows may go to has a live socket")
}

// name is a home in words.
func (s *steering) name(h Home) string {
	text := fmt.Sprintf("socket %d of generation %d in bank %d", h.Slot, s.Apps[h.App].Banks[h.Bank].Generation, h.Bank)
	if len(s.Apps) > 1 {
		text += fmt.Sprintf(" of app %d", h.App)
	}
	return text
}

const (
	// neighbours is how many slots are tried from the place in a bank that the
	// hash points to, before all are from a second one.
	neighbours = 4
	// secondPlace makes the hash for that.
	secondPlace = 0x9e3779b1
)

// choose is the live socket that a hash leads to; none if none lives.
func (b *Bank) choose(hash uint32) (slot int, ok bool) {
	scale := func(hash uint32) int { return int(uint64(hash) * uint64(b.Sockets) >> 32) }
	if slot, ok = b.near(scale(hash), neighbours); ok {
		return slot, true
	}
	return b.near(scale(hash*secondPlace), b.Sockets)
}

// near is the first live socket from a place on, within so many tries.
func (b *Bank) near(at, tries int) (slot int, ok bool) {
	for i := range min(tries, b.Sockets) {
		if slot = (at + i) % b.Sockets; b.lives(slot) {
			return slot, true
		}
	}
	return 0, false
}

// choices are all sockets that choose can find: those that live, since each is
// what some hash points to.
func (b *Bank) choices() (slots []int) {
	for slot := range b.Sockets {
		if b.lives(slot) {
			slots = append(slots, slot)
		}
	}
	return slots
}
