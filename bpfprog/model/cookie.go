package model

import (
	"fmt"

	"grm/bpfprog/cbpf"
)

// Names is how many generations of a group, of all apps, can be told apart by
// their cookies.
const Names = 32

// Name is what one of the names in a cookie stands for. Its serial number grows
// each time that it is given to a generation.
type Name struct {
	Used      bool
	App, Bank int
	Serial    uint16
}

// MakeCookie is the cookie of a generation's socket: 8 bits of index, 3 of
// check, 5 of name. No cookie is 0.
//
// The check is 1 to 7 and moves on with the serial number. So the cookie of an
// ended generation is recognised as such by the six generations that have its
// name next, and again by all but every seventh; and one value in eight of
// those that nobody has made passes for the cookie of a name in use. What a
// server wants to rely on must be longer: the generation's key, by getsockopt.
func MakeCookie(name int, serial uint16, index int) uint16 {
	return uint16(index)<<8 | check(serial, index)<<5 | uint16(name)
}

func check(serial uint16, index int) uint16 {
	return uint16(1 + (uint32(serial)+uint32(index))%7)
}

// byProgram asks the group's classic program: a cookie's socket gets the
// packet, and everything else is a new flow of some app. The first packets of
// one have no cookie yet; the flow table keeps them together.
func (s *steering) byProgram() {
	result := s.Program.Run(s.packet.Payload, s.packet.EtherType, func(pc int, a, x uint32) {
		s.Trace = append(s.Trace, fmt.Sprintf("%4d  %-28s a=0x%08x x=0x%08x", pc, s.Program.Text(pc), a, x))
	})
	s.because("dissector cbpf: %d bytes, %d instructions: %s", len(s.packet.Payload), len(s.Trace), result)
	app := 0
	if result.Failed() {
		s.count(CBPFError)
	} else if cookie, ok := cbpf.Verdict(result).Cookie(); ok {
		if home, known := s.readCookie(cookie); known && s.toHome(home) {
			return
		}
		s.count(BadCookie)
	} else if app, ok = cbpf.Verdict(result).App(); ok && app >= len(s.Apps) {
		s.because("the group has no app %d: app 0 instead", app)
		s.count(BadApp)
		app = 0
	}
	s.byFlow(s.resolve(app))
}

// readCookie finds the home that a cookie means.
func (s *steering) readCookie(cookie uint16) (Home, bool) {
	index, name := int(cookie>>8), s.Names[cookie%Names]
	switch got, want := cookie>>5&7, check(name.Serial, index); {
	case !name.Used:
		s.because("no generation has the name %d in its cookies", cookie%Names)
		return Home{}, false
	case got != want:
		s.because("the cookie's check is %d and not %d: it is made up, or of another generation that had the name %d", got, want, cookie%Names)
		return Home{}, false
	}
	home := Home{App: name.App, Bank: name.Bank, Slot: index, Tag: s.Apps[name.App].Banks[name.Bank].Tag}
	s.because("the cookie is of %s", s.name(home))
	return home, true
}
