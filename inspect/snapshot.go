package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"grm/bpfprog"
	"grm/bpfprog/model"
	"grm/config"
	"grm/control"
)

// ErrNone says that there is no such service or group.
var ErrNone = errors.New("there is nothing of that name in this network namespace (grm list shows what there is)")

// OpenGroup opens a group by its name, such as udp://0.0.0.0:5201. It fails
// with ErrNone if there is no such group.
func OpenGroup(name string) (*bpfprog.Group, error) {
	var address config.Address
	if err := address.UnmarshalText([]byte(name)); err != nil {
		return nil, fmt.Errorf("group %s: %w", name, err)
	}
	g, err := bpfprog.OpenGroup(string(address.Proto), address.AddrPort)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("group %s: %w", name, ErrNone)
	}
	return g, err
}

// Snapshot is a group's state at this moment, for the model of its program.
// Which life of a bank a flow belongs to is left out: a flow that the table
// still knows counts as one of the generation that its bank has now.
func Snapshot(name string) (*model.State, error) {
	g, err := OpenGroup(name)
	if err != nil {
		return nil, err
	}
	s, err := snapshot(g)
	return s, errors.Join(err, g.Close())
}

func snapshot(g *bpfprog.Group) (*model.State, error) {
	name := g.Key().String()
	s := &model.State{
		Program: g.Spec.Dissector.Program,
		Apps:    make([]model.App, max(1, g.Spec.MaxApps)),
		Flows:   map[netip.AddrPort]model.Home{},
	}
	for i, n := range g.Names() {
		s.Names[i] = model.Name{Used: n.Used, App: n.App, Bank: n.Bank, Serial: n.Serial}
	}
	switch g.Spec.Dissector.Kind {
	case bpfprog.Flow:
		s.Dissector = model.Flow
	case bpfprog.Noop:
		s.Dissector = model.Noop
	case bpfprog.CBPF:
		s.Dissector = model.CBPF
	}
	pinned, err := bpfprog.Services()
	if err != nil {
		return nil, err
	}
	var r reader
	r.report.Complete = true
	for _, service := range pinned {
		f := r.service(service, true)
		at := slices.IndexFunc(f.listeners, func(l Listener) bool { return l.Group == name })
		if at < 0 || f.control == nil || f.listeners[at].App >= len(s.Apps) {
			continue
		}
		if err := f.readSlots(g, f.listeners[at]); err != nil {
			return nil, err
		}
		s.Apps[f.listeners[at].App] = f.app(f.listeners[at].Name)
	}
	err = g.Flows(func(e bpfprog.FlowEntry) bool {
		if e.App < len(s.Apps) && e.Bank < control.Banks {
			s.Flows[model.FlowKey(e.Remote)] = model.Home{App: e.App, Bank: e.Bank, Slot: e.Slot}
		}
		return true
	})
	return s, err
}

// app is a service as the programs of a group see it.
func (f *facts) app(listener string) model.App {
	a := model.App{Joined: true, Order: control.MakeOrder(f.control.order), Alive: f.control.alive, Closing: f.control.closing}
	slots := f.slots[listener]
	for b := range control.Banks {
		bank := model.Bank{Generation: f.control.banks[b].Generation, Sockets: len(slots[b]), Dead: map[int]bool{}}
		for i, cookie := range slots[b] {
			if cookie == 0 {
				bank.Dead[i] = true
			}
		}
		a.Banks[b] = bank
	}
	return a
}
