// Package state is what root knows of a service and keeps under /run/grm: which
// generation is in which bank, with which sockets, and what the last start was
// and came to. Only root writes it; everybody may read it, and a decoy and
// unprivileged grm do. Unlike the control map it can be believed.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"
)

const (
	// Root is where the files are: Root/SERVICE/state.json and Root/SERVICE.lock.
	Root = "/run/grm"
	// Version grows when a field changes its meaning.
	Version = 1

	banks    = 32
	slots    = 256
	fileName = "state.json"
	maxSize  = 8 << 20
)

// ErrInvalid says that a state file is not what this grm writes.
var ErrInvalid = errors.New("invalid state file")

// State is what is known of one service.
type State struct {
	Version    int     `json:"version"`
	Service    string  `json:"service"`
	Unit       string  `json:"unit,omitempty"` // systemd's; "" without systemd
	User       string  `json:"user"`           // whose the sockets are
	UID        uint32  `json:"uid"`
	Generation uint64  `json:"generation"`         // the highest one that was given out
	Restarts   uint32  `json:"restarts,omitempty"` // systemd's NRestarts when an instance last ran well
	Plan       *Plan   `json:"plan,omitempty"`     // the last start
	Failed     *Failed `json:"failed,omitempty"`   // the last start that came to nothing
	// Pending is a start that has begun and was not finished. Whoever finds it while holding the lock undoes it.
	Pending *Bank        `json:"pending,omitempty"`
	Banks   map[int]Bank `json:"banks"`
	Groups  []Group      `json:"groups,omitempty"` // that the service has had a bank in, and not unpinned since
}

// Plan is one start: what was decided, and for which run of the unit.
type Plan struct {
	Verb       string        `json:"verb"` // as control.Verb prints it
	Bank       int           `json:"bank"`
	Generation uint64        `json:"generation"`
	Invocation string        `json:"invocation,omitempty"` // systemd's INVOCATION_ID
	At         time.Duration `json:"at"`                   // on CLOCK_BOOTTIME, as the times in the control map
}

// Failed is a start that came to nothing.
type Failed struct {
	Generation uint64    `json:"generation"`
	Reason     string    `json:"reason"`
	At         time.Time `json:"at"`
	Invocation string    `json:"invocation,omitempty"` // systemd's INVOCATION_ID
}

// Bank is a generation's place and its sockets.
type Bank struct {
	Bank       int        `json:"bank"`
	Generation uint64     `json:"generation"`
	Created    time.Time  `json:"created"`
	Cgroups    []uint64   `json:"cgroups,omitempty"` // ids of the cgroups in which its sockets were made: their hooks are those
	Listeners  []Listener `json:"listeners"`
}

// Listener is one listener of a generation.
type Listener struct {
	Name    string   `json:"name"`
	Address string   `json:"address"` // with its settings, as on grm-activate's command line
	Inodes  []uint64 `json:"inodes"`  // of its sockets, by index
}

// Group is a reuseport group, and the service's number in it.
type Group struct {
	Address string `json:"address"` // without settings
	App     int    `json:"app,omitempty"`
}

// Inodes are the inodes of all the bank's sockets.
func (b Bank) Inodes() []uint64 {
	var all []uint64
	for _, l := range b.Listeners {
		all = append(all, l.Inodes...)
	}
	return all
}

// Sockets is how many sockets the bank has.
func (b Bank) Sockets() int {
	n := 0
	for _, l := range b.Listeners {
		n += len(l.Inodes)
	}
	return n
}

// New is the state of a service of which nothing is known.
func New(service string) *State {
	return &State{Version: Version, Service: service, Banks: map[int]Bank{}}
}

// Find is the bank of a generation.
func (s *State) Find(generation uint64) (Bank, bool) {
	for _, b := range s.Banks {
		if b.Generation == generation {
			return b, true
		}
	}
	return Bank{}, false
}

// parse reads a state file of a service, and believes no number in it that
// would be used as an index or grow beyond its type.
func parse(text []byte, service string) (*State, error) {
	var s State
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := s.check(service); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if s.Banks == nil {
		s.Banks = map[int]Bank{}
	}
	return &s, nil
}

func (s *State) check(service string) error {
	switch {
	case s.Version != Version:
		return fmt.Errorf("version %d, this grm knows %d", s.Version, Version)
	case s.Service != service:
		return fmt.Errorf("it is of service %q", s.Service)
	case s.Generation > math.MaxInt64:
		return fmt.Errorf("generation %d", s.Generation)
	case s.Plan != nil && (s.Plan.Bank < 0 || s.Plan.Bank >= banks):
		return fmt.Errorf("plan for bank %d", s.Plan.Bank)
	}
	for n, b := range s.Banks {
		if n != b.Bank {
			return fmt.Errorf("bank %d under number %d", b.Bank, n)
		}
		if err := b.check(s.Generation); err != nil {
			return err
		}
	}
	if s.Pending != nil {
		return s.Pending.check(math.MaxInt64)
	}
	return nil
}

func (b Bank) check(newest uint64) error {
	if b.Bank < 0 || b.Bank >= banks {
		return fmt.Errorf("bank %d", b.Bank)
	}
	if b.Generation == 0 || b.Generation > newest {
		return fmt.Errorf("bank %d: generation %d, the highest is %d", b.Bank, b.Generation, newest)
	}
	for _, l := range b.Listeners {
		if len(l.Inodes) > slots {
			return fmt.Errorf("bank %d: listener %q has %d sockets", b.Bank, l.Name, len(l.Inodes))
		}
	}
	return nil
}
