// Package operate does what an operator does by hand: give new flows back to
// an older generation, end waiting, remove what was left behind. It works on
// the control map that decoys and keepers watch; they do the rest.
package operate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"grm/bpfprog"
	"grm/control"
	"grm/internal/state"
)

var (
	// ErrNone says that there is no such service or group.
	ErrNone = errors.New("there is nothing of that name in this network namespace (grm list shows what there is)")
	// ErrLive says that what lives does not allow it.
	ErrLive = errors.New("refused")
)

// patience is how long a start or stop that is under way is waited for.
const patience = 30 * time.Second

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
		from, to := choose(c.m)
		switch {
		case from < 0:
			return fmt.Errorf("roll back %s: %w: no generation takes new flows (systemctl start it)", service, ErrLive)
		case to < 0:
			return fmt.Errorf("roll back %s: %w: no older generation lives that is not yet draining (install the older version and systemctl restart)", service, ErrLive)
		}
		r = Rolled{Working: c.m.Bank(to).Generation, Withdrawn: c.m.Bank(from).Generation}
		// Before the order, so that nobody sees it in a watch that is not its own.
		c.m.SetWatchUntil(from, control.Now())
		c.m.SetOrder(without(c.m.Order().Banks(), from, to))
		return c.recordFailure(r.Withdrawn, "rolled back by hand")
	})
	return r, err
}

// choose finds the bank that takes new flows, and the newest older one that can; -1 if there is none.
func choose(m *control.Map) (from, to int) {
	from = m.Working()
	for _, b := range m.Order().Banks() {
		if b != from && m.Alive(b) && m.Bank(b).State == control.Serving {
			return from, b
		}
	}
	return from, -1
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
		at := control.Now()
		for b := range control.Banks {
			bank := c.m.Bank(b)
			if b == working || (bank.State != control.Serving && bank.State != control.Draining) {
				continue
			}
			generations = append(generations, bank.Generation)
			if now {
				c.m.SetDrainUntil(b, at)
			}
		}
		c.m.SetWatchUntil(working, at)
		return nil
	})
	return generations, err
}

// change is a service that is locked and open.
type change struct {
	name string
	dir  *state.Dir
	s    *bpfprog.Service
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
		return fmt.Errorf("service %s: %w", service, ErrNone)
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
	return f(change{name: service, dir: dir, s: s, m: s.Control()})
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
