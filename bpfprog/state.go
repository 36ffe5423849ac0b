package bpfprog

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"sync/atomic"

	"github.com/cilium/ebpf"

	"grm/bpfprog/model"
	"grm/control"
)

// State is what the group's program sees now, for package model to say what it
// does with a packet. It is read piece by piece while the group goes on.
func (g *Group) State() (*model.State, error) {
	s, err := g.state()
	if err != nil {
		return nil, fmt.Errorf("state of group %s: %w", g.Key(), err)
	}
	return s, nil
}

func (g *Group) state() (*model.State, error) {
	s := &model.State{
		Dissector: map[Kind]model.Dissector{Flow: model.Flow, Noop: model.Noop, CBPF: model.CBPF}[g.Spec.Dissector.Kind],
		Program:   g.Spec.Dissector.Program,
		Flows:     map[netip.AddrPort]model.Home{},
	}
	apps := 1
	if g.controls != nil {
		apps = g.Spec.MaxApps
	}
	s.Apps = make([]model.App, apps)
	for app := range s.Apps {
		if err := g.readApp(app, &s.Apps[app]); err != nil {
			return nil, fmt.Errorf("app %d: %w", app, err)
		}
	}
	for i, n := range g.Names() {
		if n.App < apps {
			s.Names[i] = model.Name(n)
		}
	}
	err := g.Flows(func(e FlowEntry) bool {
		if e.App < apps {
			s.Flows[model.FlowKey(e.Remote)] = model.Home{App: e.App, Bank: e.Bank, Slot: e.Slot, Tag: e.Tag}
		}
		return true
	})
	return s, err
}

func (g *Group) readApp(app int, a *model.App) error {
	c, err := g.appControl(app)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil // nobody has joined as this app
	}
	if err != nil {
		return err
	}
	defer c.Close()
	m, err := control.OpenReadOnly(c.FD())
	if err != nil {
		return err
	}
	*a = model.App{Joined: true, Order: m.Order(), Alive: m.AliveBanks(), Closing: m.Closing()}
	if err := m.Close(); err != nil {
		return err
	}
	for bank := range a.Banks {
		slots, err := g.Slots(app, bank)
		if err != nil {
			return err
		}
		r := g.record(app, bank)
		b := model.Bank{Generation: atomic.LoadUint64(r.generation), Sockets: len(slots), Tag: uint16(r.tag()), Dead: map[int]bool{}}
		for slot, cookie := range slots {
			if cookie == 0 {
				b.Dead[slot] = true
			}
		}
		a.Banks[bank] = b
	}
	return nil
}

// appControl is the control map that the program follows for an app.
func (g *Group) appControl(app int) (*ebpf.Map, error) {
	if g.controls == nil {
		return g.loadMap("control")
	}
	var m *ebpf.Map
	if err := g.controls.Lookup(uint32(app), &m); err != nil {
		return nil, fmt.Errorf("controls: %w", err)
	}
	return m, nil
}
