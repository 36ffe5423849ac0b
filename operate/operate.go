// Package operate does what an operator does by hand: give new flows back to
// an older generation, end waiting, remove what was left behind. It works on
// the control map that decoys and keepers watch; they do the rest.
package operate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"grm/bpfprog"
	"grm/control"
	"grm/inspect"
	"grm/internal/state"
)

// ErrLive says that what lives does not allow it.
var ErrLive = errors.New("refused")

// patience is how long a start or stop that is under way is waited for.
const patience = 30 * time.Second

// keepers is how long keepers have to see what was written into the control map.
const keepers = 3 * time.Second

// Rolled says what a rollback did.
type Rolled struct {
	Working   uint64 // takes new flows from now on
	Withdrawn uint64 // keeps its own flows, and drains
}

// Rollback gives new flows to the newest older generation that lives. The one
// that had them keeps the flows that it has: its alive bit stays, and its
// keeper, which sees another bank at the head, drains it as any older one.
func Rollback(service string) (Rolled, error) {
	var r Rolled
	err := with(service, func(c change) error {
		order := c.m.Order()
		from, to := c.choose(order)
		switch {
		case from < 0:
			return fmt.Errorf("roll back %s: %w: no generation takes new flows (systemctl start it)", service, ErrLive)
		case to < 0:
			return fmt.Errorf("roll back %s: %w: no older generation lives that could take new flows (install the older version and systemctl restart)", service, ErrLive)
		}
		r = Rolled{Working: c.m.Bank(to).Generation, Withdrawn: c.m.Bank(from).Generation}
		if !c.m.SwapOrder(order, without(order.Banks(), from, to)) {
			return fmt.Errorf("roll back %s: %w: another generation has become ready, or ended, at this moment (grm status %s)", service, ErrLive, service)
		}
		// Neither is watched any more: the one that goes drains at once.
		c.m.SetWatchUntil(from, 0)
		c.m.SetWatchUntil(to, 0)
		return c.recordFailure(r.Withdrawn, "rolled back by hand")
	})
	return r, err
}

// choose finds the bank that takes new flows, and the newest older one whose
// server can; -1 if there is none.
func (c change) choose(order control.Order) (from, to int) {
	from = order.Working()
	for _, b := range order.Banks() {
		bank := c.m.Bank(b)
		if b == from || !c.m.Alive(b) || !inspect.Runs(bank.Server, c.unit) {
			continue
		}
		// One that drains is as good as before, unless it was told so.
		if bank.State == control.Serving || (bank.State == control.Draining && !told(bank.Keeper)) {
			return from, b
		}
	}
	return from, -1
}

// told says whether the keeper with that pid signals its server when a drain
// begins; one that cannot be asked may have.
func told(keeper int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", keeper))
	if err != nil || len(line) == 0 {
		return true
	}
	for word := range bytes.SplitSeq(line, []byte{0}) {
		switch name, _, _ := strings.Cut(strings.TrimLeft(string(word), "-"), "="); {
		case string(word) == "--":
			return false // from here on it is the server's
		case name == "drain-signal" && word[0] == '-':
			return true
		}
	}
	return false
}

// without is the order with from left out and to at its head: what lies
// between them cannot serve.
func without(banks []int, from, to int) []int {
	order := []int{to}
	for _, b := range banks {
		if b != from && b != to {
			order = append(order, b)
		}
	}
	return order
}

// Drain ends the watch of the working generation, so that older ones drain;
// with now it ends all their waiting as well. It returns the older generations
// that live.
func Drain(service string, now bool) ([]uint64, error) {
	var generations []uint64
	err := with(service, func(c change) error {
		working := c.m.Working()
		if working < 0 {
			return fmt.Errorf("drain %s: %w: no generation takes new flows, so that no other may end", service, ErrLive)
		}
		older := c.older(working)
		for _, b := range older {
			generations = append(generations, c.m.Bank(b).Generation)
		}
		c.m.SetWatchUntil(working, 0)
		if !now {
			return nil
		}
		return c.hurry(older)
	})
	return generations, err
}

// older lists the banks of the other generations that live.
func (c change) older(working int) []int {
	var older []int
	for b := range control.Banks {
		if s := c.m.Bank(b).State; b != working && (s == control.Serving || s == control.Draining) {
			older = append(older, b)
		}
	}
	return older
}

// hurry moves the end of each drain to now. Only the keeper can begin one, which
// it does as soon as it has seen that the watch is over.
func (c change) hurry(banks []int) error {
	deadline := time.Now().Add(keepers)
	for {
		var idle []uint64
		for _, b := range banks {
			switch bank := c.m.Bank(b); bank.State {
			case control.Serving:
				idle = append(idle, bank.Generation)
			case control.Draining:
				c.m.SetDrainUntil(b, min(bank.DrainUntil, control.Now()))
			}
		}
		if len(idle) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("drain %s: generations %v did not begin to drain within %v (are their keepers gone? grm status %s)", c.name, idle, keepers, c.name)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// change is a service that is locked and open.
type change struct {
	name string
	unit string // of systemd's; "" if there is no record or no unit
	dir  *state.Dir
	m    *control.Map
}

// with runs f on a service while no start or stop of it is under way.
func with(service string, f func(change) error) (err error) {
	dir, err := state.Open(state.Root)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	s, err := bpfprog.OpenService(service)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("service %s: %w", service, inspect.ErrNone)
	}
	if err != nil {
		return fmt.Errorf("service %s: %w", service, err)
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	lock, err := dir.Lock(ctx, service)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	c := change{name: service, dir: dir, m: s.Control()}
	if st, err := dir.Read(service); err == nil { // who changes the record will tell if not
		c.unit = st.Unit
	}
	return f(c)
}

// recordFailure lets root's record say why a generation does not work any more.
func (c change) recordFailure(generation uint64, reason string) error {
	s, err := c.dir.Read(c.name)
	if err != nil {
		return fmt.Errorf("done, but not recorded: %w", err)
	}
	s.Failed = &state.Failed{Generation: generation, Reason: reason, At: time.Now()}
	if err := c.dir.Write(s); err != nil {
		return fmt.Errorf("done, but not recorded: %w", err)
	}
	return nil
}
