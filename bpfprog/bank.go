package bpfprog

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/flowtable"
)

const (
	tagMask  = 0x7fff
	nameUsed = 1 << 31
)

// record is what root knows of one bank; see struct grm_record.
type record struct {
	generation, word *uint64
}

func (g *Group) record(app, bank int) record {
	r := &g.header().Bank[app][bank]
	return record{&r.Generation, &r.Word}
}

func (r record) sockets() int { return int(atomic.LoadUint64(r.word) & 0xffff) }
func (r record) tag() uint32  { return uint32(atomic.LoadUint64(r.word)>>16) & tagMask }

func (r record) set(sockets int, tag uint32) {
	atomic.StoreUint64(r.word, uint64(sockets)|uint64(tag)<<16)
}

// Generation is what SetBank recorded for a bank, 0 if it holds none. It is
// root's own word, unlike what the control map says.
func (g *Group) Generation(app, bank int) uint64 {
	if g.checkBank(app, bank) != nil {
		return 0
	}
	return atomic.LoadUint64(g.record(app, bank).generation)
}

func (g *Group) checkBank(app, bank int) error {
	if app < 0 || app >= g.Spec.MaxApps || bank < 0 || bank >= control.Banks {
		return fmt.Errorf("no such bank (the group has %d apps of %d banks)", g.Spec.MaxApps, control.Banks)
	}
	return nil
}

// SetBank records that a bank of app holds a generation with that many
// sockets: the programs believe this and nothing else. It comes before the
// slots are filled, and may be repeated.
func (g *Group) SetBank(app, bank int, generation uint64, sockets int) error {
	if err := g.setBank(app, bank, generation, sockets); err != nil {
		return fmt.Errorf("group %s, app %d, bank %d: %w", g.Key(), app, bank, err)
	}
	return nil
}

func (g *Group) setBank(app, bank int, generation uint64, sockets int) error {
	if err := g.checkBank(app, bank); err != nil {
		return err
	}
	if generation == 0 || sockets < 1 || sockets > control.Slots {
		return fmt.Errorf("generation %d with %d sockets (want a generation, and 1 to %d sockets)", generation, sockets, control.Slots)
	}
	unlock, err := lock(g.dir)
	if err != nil {
		return err
	}
	defer unlock()
	r := g.record(app, bank)
	if old := atomic.LoadUint64(r.generation); old == generation {
		r.set(sockets, r.tag())
		return nil
	} else if old != 0 {
		return fmt.Errorf("holds generation %d, not %d (clear it first)", old, generation)
	}
	/* A flow or cookie of an earlier generation of this bank must never fit: the tag moves on, and it does so before
	   the generation is there, which says that it has. */
	tag := (r.tag() + 1) & tagMask
	r.set(0, tag)
	if err := g.takeName(app, bank); err != nil {
		return err
	}
	if err := g.showTag(app, bank, tag); err != nil {
		return err
	}
	atomic.StoreUint64(r.generation, generation)
	r.set(sockets, tag)
	return nil
}

// showTag tells readers of the flow table which flows of the bank count.
func (g *Group) showTag(app, bank int, tag uint32) error {
	if g.flows == nil || app != 0 {
		return nil
	}
	return flowtable.SetTag(g.flows.FD(), bank, uint16(tag))
}

// takeName gives (app, bank) a name for cookies. Where all are taken, only a
// group that needs cookies minds.
func (g *Group) takeName(app, bank int) error {
	names := &g.header().Names
	mine := g.findName(app, bank) // of a SetBank that was killed
	for i := range names {
		at := (bank + i) % len(names)
		old := atomic.LoadUint32(&names[at])
		if mine >= 0 && at != mine || mine < 0 && old&nameUsed != 0 {
			continue
		}
		serial := (old>>16 + 1) & tagMask
		atomic.StoreUint32(&names[at], nameUsed|serial<<16|uint32(app)<<8|uint32(bank))
		return nil
	}
	if g.Spec.Dissector.Kind == CBPF {
		return fmt.Errorf("all %d cookie names are taken by other generations (wait until some of them have ended)", len(names))
	}
	return nil
}

// Name is what one of the names in a group's cookies stands for.
type Name struct {
	Used      bool
	App, Bank int
	Serial    uint16 // how often it was given away
}

// Names are the names that cookies can have.
func (g *Group) Names() []Name {
	words := &g.header().Names
	names := make([]Name, len(words))
	for i := range words {
		n := atomic.LoadUint32(&words[i])
		names[i] = Name{Used: n&nameUsed != 0, App: int(n >> 8 & 15), Bank: int(n & 31), Serial: uint16(n >> 16 & tagMask)}
	}
	return names
}

// findName is the name of (app, bank), or -1.
func (g *Group) findName(app, bank int) int {
	return slices.IndexFunc(g.Names(), func(n Name) bool { return n.Used && n.App == app && n.Bank == bank })
}

// cookie is what servers put into their packets to get them at that socket; 0
// if there is none.
func (g *Group) cookie(app, bank, index int) uint32 {
	name := g.findName(app, bank)
	if name < 0 {
		return 0
	}
	serial := atomic.LoadUint32(&g.header().Names[name]) >> 16 & tagMask
	check := 1 + (serial+uint32(index))%7
	return uint32(index)<<8 | check<<5 | uint32(name)
}

func slot(app, bank, index int) uint32 {
	return uint32((app*control.Banks+bank)*control.Slots + index)
}

// Put makes sock, which is borrowed, the socket of one slot, and tells the
// hooks what it is. It may be repeated.
func (g *Group) Put(app, bank, index, sock int) error {
	if err := g.put(app, bank, index, sock); err != nil {
		return fmt.Errorf("group %s, app %d, bank %d, socket %d: %w", g.Key(), app, bank, index, err)
	}
	return nil
}

func (g *Group) put(app, bank, index, sock int) error {
	if err := g.checkBank(app, bank); err != nil {
		return err
	}
	r := g.record(app, bank)
	if index < 0 || index >= r.sockets() {
		return fmt.Errorf("the bank has %d sockets", r.sockets())
	}
	s := hooksGrmSocket{
		Epoch:      atomic.LoadUint64(&g.header().Epoch[app]),
		Generation: atomic.LoadUint64(r.generation),
		App:        uint32(app),
		Bank:       uint32(bank),
		Index:      uint32(index),
		Tag:        r.tag(),
		Cookie:     g.cookie(app, bank, index),
	}
	if err := g.sockets.Put(uint32(sock), &s); err != nil {
		return fmt.Errorf("socket storage: %w", err)
	}
	mine, err := unix.GetsockoptUint64(sock, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("getsockopt SO_COOKIE: %w", err)
	}
	there, err := g.slot(slot(app, bank, index))
	if err != nil || there == mine {
		return err
	}
	if err := g.slots.Put(slot(app, bank, index), uint64(sock)); err != nil {
		return fmt.Errorf("fill slot: %w%s", err, putHint(err))
	}
	return nil
}

func putHint(err error) string {
	switch {
	case errors.Is(err, unix.EINVAL):
		return " (the socket must be bound with SO_REUSEPORT, and for TCP listen; connect(2) takes it out for good)"
	case errors.Is(err, ebpf.ErrNotSupported):
		return " (only plain UDP and TCP sockets can be in one, not those of MPTCP)"
	case errors.Is(err, unix.EBUSY):
		return " (the socket is in another slot)"
	}
	return ""
}

// slot reads the cookie of a slot's socket, or 0.
func (g *Group) slot(at uint32) (uint64, error) {
	var cookie uint64
	err := g.slots.Lookup(at, &cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("slot %d: %w", at, err)
	}
	return cookie, nil
}

// Slots tells the cookies of the sockets in a bank's slots, 0 where one is
// empty; there are as many as SetBank said.
func (g *Group) Slots(app, bank int) ([]uint64, error) {
	if err := g.checkBank(app, bank); err != nil {
		return nil, fmt.Errorf("group %s, app %d, bank %d: %w", g.Key(), app, bank, err)
	}
	cookies := make([]uint64, g.record(app, bank).sockets())
	for i := range cookies {
		var err error
		if cookies[i], err = g.slot(slot(app, bank, i)); err != nil {
			return nil, fmt.Errorf("group %s, app %d, bank %d: %w", g.Key(), app, bank, err)
		}
	}
	return cookies, nil
}

// HasSockets says whether an app has sockets in the group.
func (g *Group) HasSockets(app int) (bool, error) {
	for bank := range control.Banks {
		cookies, err := g.Slots(app, bank)
		if err != nil {
			return false, err
		}
		if slices.ContainsFunc(cookies, func(cookie uint64) bool { return cookie != 0 }) {
			return true, nil
		}
	}
	return false, nil
}

// Clear forgets what a bank held and empties its slots. The sockets live on;
// they just get nothing.
func (g *Group) Clear(app, bank int) error {
	if err := g.checkBank(app, bank); err != nil {
		return fmt.Errorf("group %s, app %d, bank %d: %w", g.Key(), app, bank, err)
	}
	unlock, err := lock(g.dir)
	if err == nil {
		err = g.clear(app, bank)
		unlock()
	}
	if err != nil {
		return fmt.Errorf("clear group %s, app %d, bank %d: %w", g.Key(), app, bank, err)
	}
	return nil
}

func (g *Group) clear(app, bank int) error {
	r := g.record(app, bank)
	sockets := r.sockets()
	if sockets == 0 && atomic.LoadUint64(r.generation) == 0 {
		return nil
	}
	r.set(0, r.tag())
	if name := g.findName(app, bank); name >= 0 {
		word := &g.header().Names[name]
		atomic.StoreUint32(word, atomic.LoadUint32(word)&^nameUsed)
	}
	err := g.showTag(app, bank, (r.tag()+1)&tagMask) // no flow has it yet
	for i := range control.Slots {
		if e := g.slots.Delete(slot(app, bank, i)); e != nil && !errors.Is(e, ebpf.ErrKeyNotExist) {
			err = errors.Join(err, fmt.Errorf("slot %d: %w", i, e))
		}
	}
	atomic.StoreUint64(r.generation, 0)
	return err
}
