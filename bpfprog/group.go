package bpfprog

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"grm/bpfprog/cbpf"
	"grm/control"
	"grm/internal/flowtable"
)

const (
	groupMagic  = 0x474d5247 // "GRMG"
	groupLayout = 1          // GRM_GROUP_LAYOUT in c/group.h
)

// Group is one reuseport group of the kernel: an address, its maps, and its
// steering program. Its methods may not be called from several goroutines at
// once.
type Group struct {
	Spec GroupSpec

	name                     string
	dir                      string
	meta, slots, counters    *ebpf.Map
	sockets, flows, controls *ebpf.Map // flows, controls: nil if the group has none
	mem                      []byte    // meta, mapped
}

// Key names the group.
func (g *Group) Key() GroupKey { return g.Spec.key() }

func (g *Group) header() *steerGrmMeta { return (*steerGrmMeta)(unsafe.Pointer(&g.mem[0])) }

// several says whether the program looks its control map up by app.
func (s GroupSpec) several() bool { return s.Dissector.Kind == CBPF && s.MaxApps > 1 }

// Groups lists the groups of the caller's network namespace.
func Groups() ([]GroupKey, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	names, err := entries(filepath.Join(dir, "groups"))
	if err != nil {
		return nil, fmt.Errorf("list groups: %w", err)
	}
	var keys []GroupKey
	for _, name := range names {
		if k, ok := parseKey(name); ok {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// CreateGroup makes a group's maps and pins them, as the last step and by one
// rename. It fails with fs.ErrExist if there is such a group already. The group
// has no program before a service joins it.
func CreateGroup(spec GroupSpec) (g *Group, err error) {
	spec = spec.normal()
	if err := spec.check(); err != nil {
		return nil, fmt.Errorf("group %s: %w", spec.key(), err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("create group %s: %w", spec.key(), err)
		}
	}()
	if err := Mount(); err != nil {
		return nil, err
	}
	name, err := spec.key().name()
	if err != nil {
		return nil, err
	}
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	parent := filepath.Join(dir, "groups")
	unlock, err := enter(parent)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := publish(parent, name, func(dir string) error { return makeGroup(spec, dir) }); err != nil {
		return nil, err
	}
	return OpenGroup(spec.Network, spec.Address)
}

// makeGroup makes and fills a group's maps and pins them in dir.
func makeGroup(spec GroupSpec, dir string) error {
	steer, hooks, err := loadSpecs()
	if err != nil {
		return err
	}
	pin := func(name string, spec *ebpf.MapSpec, fill func(*ebpf.Map) error) error {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			return fmt.Errorf("map %s: %w", name, err)
		}
		defer m.Close()
		if fill != nil {
			if err := fill(m); err != nil {
				return fmt.Errorf("map %s: %w", name, err)
			}
		}
		return m.Pin(filepath.Join(dir, name))
	}
	size(steer, spec)
	err = errors.Join(
		pin("meta", steer.Maps["meta"], func(m *ebpf.Map) error { return fillMeta(m, spec) }),
		pin("slots", steer.Maps["slots"], nil),
		pin("counters", steer.Maps["counters"], nil),
		pin("sockets", hooks.Maps["sockets"], nil),
	)
	d := spec.Dissector
	if d.Kind != Noop {
		err = errors.Join(err, pin("flows", steer.Maps["flows"], func(m *ebpf.Map) error {
			return m.Put(flowtable.Buckets(d.Flows), flowtable.MarshalHeader(flowtable.Header{
				Magic: flowtable.Magic, Layout: flowtable.Layout, Timeout: flowtable.Stamps(d.Timeout),
			}))
		}))
	}
	if spec.several() {
		err = errors.Join(err, pin("controls", steer.Maps["controls"], nil))
	}
	if d.Kind == CBPF {
		text := encodeFilter(d.Program)
		err = errors.Join(err, pin("filter", &ebpf.MapSpec{
			Name: "filter", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(text)), MaxEntries: 1,
		}, func(m *ebpf.Map) error { return m.Put(uint32(0), text) }))
	}
	return err
}

// encodeFilter is a classic program as the kernel's struct sock_filter.
func encodeFilter(p cbpf.Program) []byte {
	var b []byte
	for _, in := range p {
		b = binary.NativeEndian.AppendUint16(b, in.Op)
		b = append(b, in.JT, in.JF)
		b = binary.NativeEndian.AppendUint32(b, in.K)
	}
	return b
}

func decodeFilter(b []byte) cbpf.Program {
	var p cbpf.Program
	for ; len(b) >= 8; b = b[8:] {
		p = append(p, cbpf.Instruction{
			Op: binary.NativeEndian.Uint16(b), JT: b[2], JF: b[3], K: binary.NativeEndian.Uint32(b[4:]),
		})
	}
	return p
}

func fillMeta(m *ebpf.Map, spec GroupSpec) error {
	d := spec.Dissector
	scope, err := scopeOf(spec.Address.Addr())
	if err != nil {
		return err
	}
	h := steerGrmMeta{
		Magic:     groupMagic,
		Layout:    groupLayout,
		Dissector: uint32(d.Kind),
		Assure:    uint32(d.Assure),
		MaxApps:   uint32(spec.MaxApps),
		Flows:     d.Flows,
		Timeout:   uint64(d.Timeout),
		Address:   spec.Address.Addr().As16(),
		Port:      spec.Address.Port(),
		Ipv4:      flag(spec.Address.Addr().Is4()),
		Tcp:       flag(spec.Network == "tcp"),
		DualStack: flag(spec.DualStack),
		Scope:     scope,
	}
	if h.Tick, h.Zero, err = clock(); err != nil {
		return err
	}
	var seed [16]byte
	if _, err := rand.Read(seed[:]); err != nil {
		return err
	}
	h.Seed = [2]uint64{binary.NativeEndian.Uint64(seed[:8]), binary.NativeEndian.Uint64(seed[8:])}
	return m.Put(uint32(0), unsafe.Slice((*byte)(unsafe.Pointer(&h)), unsafe.Sizeof(h)))
}

func flag(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// OpenGroup opens a group by its pins. It fails with fs.ErrNotExist if there
// is none, and with ErrLayout if it was made by a grm of another layout.
func OpenGroup(network string, addr netip.AddrPort) (*Group, error) {
	key := GroupKey{network, addr}
	g := &Group{}
	if err := g.open(key); err != nil {
		return nil, errors.Join(fmt.Errorf("open group %s: %w", key, err), g.Close())
	}
	return g, nil
}

func (g *Group) open(key GroupKey) error {
	var err error
	if g.name, err = key.name(); err != nil {
		return err
	}
	dir, err := Dir()
	if err != nil {
		return err
	}
	g.dir = filepath.Join(dir, "groups", g.name)
	if g.meta, err = g.loadMap("meta"); err != nil {
		return err
	}
	if g.meta.ValueSize() != uint32(unsafe.Sizeof(steerGrmMeta{})) {
		return fmt.Errorf("%w: %d bytes", ErrLayout, g.meta.ValueSize())
	}
	page := os.Getpagesize()
	size := (int(g.meta.ValueSize()) + page - 1) &^ (page - 1)
	if g.mem, err = unix.Mmap(g.meta.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("map meta: %w", err)
	}
	h := g.header()
	if h.Magic != groupMagic || h.Layout != groupLayout {
		return fmt.Errorf("%w: layout %d, this grm has %d", ErrLayout, h.Layout, groupLayout)
	}
	g.Spec = GroupSpec{
		Network:   key.Network,
		Address:   key.Address,
		DualStack: h.DualStack != 0,
		MaxApps:   int(h.MaxApps),
		Dissector: Dissector{
			Kind:    Kind(h.Dissector),
			Timeout: time.Duration(h.Timeout),
			Flows:   h.Flows,
			Assure:  Assure(h.Assure),
		},
	}
	for name, m := range map[string]**ebpf.Map{"slots": &g.slots, "counters": &g.counters, "sockets": &g.sockets} {
		if *m, err = g.loadMap(name); err != nil {
			return err
		}
	}
	if g.Spec.Dissector.Kind != Noop {
		if g.flows, err = g.loadMap("flows"); err != nil {
			return err
		}
	}
	if g.Spec.several() {
		if g.controls, err = g.loadMap("controls"); err != nil {
			return err
		}
	}
	if g.Spec.Dissector.Kind == CBPF {
		m, err := g.loadMap("filter")
		if err != nil {
			return err
		}
		text, err := m.LookupBytes(uint32(0))
		if err := errors.Join(err, m.Close()); err != nil {
			return fmt.Errorf("filter: %w", err)
		}
		g.Spec.Dissector.Program = decodeFilter(text)
	}
	return nil
}

func (g *Group) loadMap(name string) (*ebpf.Map, error) {
	return ebpf.LoadPinnedMap(filepath.Join(g.dir, name), nil)
}

// Close lets go of the group, which goes on working.
func (g *Group) Close() error {
	var err error
	if g.mem != nil {
		err = unix.Munmap(g.mem)
		g.mem = nil
	}
	for _, m := range []*ebpf.Map{g.meta, g.slots, g.counters, g.sockets, g.flows, g.controls} {
		if m != nil {
			err = errors.Join(err, m.Close())
		}
	}
	return err
}

// Remove unpins the group. Its program and maps live on as long as its sockets
// and hooks do.
func (g *Group) Remove() error {
	if err := os.RemoveAll(g.dir); err != nil {
		return fmt.Errorf("remove group %s: %w", g.Key(), err)
	}
	tidy(filepath.Dir(g.dir))
	return nil
}

// RemoveEmptyGroup unpins a group that cannot be opened, as its layout is
// another one, if no socket is in its slots.
func RemoveEmptyGroup(network string, addr netip.AddrPort) error {
	g := &Group{Spec: GroupSpec{Network: network, Address: addr}}
	if err := g.removeEmpty(); err != nil {
		return fmt.Errorf("remove group %s: %w", g.Key(), err)
	}
	return nil
}

func (g *Group) removeEmpty() (err error) {
	name, err := g.Key().name()
	if err != nil {
		return err
	}
	dir, err := Dir()
	if err != nil {
		return err
	}
	g.dir = filepath.Join(dir, "groups", name)
	if g.slots, err = g.loadMap("slots"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	for at := range g.slots.MaxEntries() {
		if cookie, err := g.slot(at); err != nil {
			return err
		} else if cookie != 0 {
			return fmt.Errorf("%w, and there are sockets in it (stop the services that have them)", ErrLayout)
		}
	}
	return g.Remove()
}

// Matches is nil if the group is what spec asks for, else it says in words
// what differs.
func (g *Group) Matches(spec GroupSpec) error {
	if err := g.Spec.differs(spec.normal()); err != nil {
		return fmt.Errorf("group %s: %w", g.Key(), err)
	}
	return nil
}

// Join makes s the service whose control map app follows. What the app's banks
// held for a service of another epoch is forgotten.
func (g *Group) Join(app int, s *Service) error {
	if err := g.join(app, s); err != nil {
		return fmt.Errorf("service %s joins group %s as app %d: %w", s.Name, g.Key(), app, err)
	}
	return nil
}

func (g *Group) join(app int, s *Service) error {
	if app < 0 || app >= g.Spec.MaxApps {
		return fmt.Errorf("no such app (the group has max_apps %d)", g.Spec.MaxApps)
	}
	unlock, err := lock(g.dir)
	if err != nil {
		return err
	}
	defer unlock()
	epoch := &g.header().Epoch[app]
	if old, now := atomic.LoadUint64(epoch), s.Control().Epoch(); old != now {
		for bank := range control.Banks {
			if err := g.clear(app, bank); err != nil {
				return err
			}
		}
		atomic.StoreUint64(epoch, now)
	}
	if g.controls != nil {
		if err := g.controls.Put(uint32(app), s.control); err != nil {
			return fmt.Errorf("controls: %w", err)
		}
		_, err = g.load(nil)
	} else if app == 0 {
		/* The program first: whoever is interrupted in between does both again. */
		if _, err = g.load(s.control); err == nil {
			err = repin(s.control, g.dir, "control")
		}
	}
	return err
}

// Joined says whether app follows s's control map already: whether what is in
// its banks is of that service.
func (g *Group) Joined(app int, s *Service) bool {
	return app >= 0 && app < g.Spec.MaxApps && atomic.LoadUint64(&g.header().Epoch[app]) == s.Control().Epoch()
}

// repin pins m as name in dir, in place of what was pinned there.
func repin(m *ebpf.Map, dir, name string) error {
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
	if err == nil {
		same, err := sameMap(pinned, m)
		if err := errors.Join(err, pinned.Close()); err != nil || same {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fresh := filepath.Join(dir, building+name)
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	/* A map knows one pin in this process: the one in dir is that of a descriptor of its own. */
	clone, err := m.Clone()
	if err != nil {
		return err
	}
	defer clone.Close()
	if err := clone.Pin(fresh); err != nil {
		return err
	}
	return os.Rename(fresh, filepath.Join(dir, name))
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	ia, err := a.Info()
	if err != nil {
		return false, err
	}
	ib, err := b.Info()
	if err != nil {
		return false, err
	}
	x, _ := ia.ID()
	y, _ := ib.ID()
	return x == y, nil
}

// Refresh replaces the group's program if the pinned one is of another build
// of grm, and says whether it did. The new one runs over the same maps, from
// the next Attach on.
func (g *Group) Refresh() (bool, error) {
	loaded, err := g.refresh()
	if err != nil {
		return false, fmt.Errorf("refresh group %s: %w", g.Key(), err)
	}
	return loaded, nil
}

func (g *Group) refresh() (bool, error) {
	unlock, err := lock(g.dir)
	if err != nil {
		return false, err
	}
	defer unlock()
	if g.controls != nil {
		return g.load(nil)
	}
	c, err := g.loadMap("control")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // no service has joined yet
	}
	if err != nil {
		return false, err
	}
	defer c.Close()
	return g.load(c)
}

// Attach makes the group's program that of sock's reuseport group. sock is
// borrowed. It is atomic, and may be repeated.
func (g *Group) Attach(sock int) error {
	if err := g.attach(sock); err != nil {
		return fmt.Errorf("attach program of group %s: %w", g.Key(), err)
	}
	return nil
}

func (g *Group) attach(sock int) error {
	p, err := g.program()
	if err != nil {
		return err
	}
	defer p.Close()
	return asActivation(func() error {
		if err := unix.SetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, p.FD()); err != nil {
			return fmt.Errorf("setsockopt SO_ATTACH_REUSEPORT_EBPF: %w", err)
		}
		return nil
	})
}

// asActivation calls do on a thread of the name that the guard lets pass.
func asActivation(do func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var old, name [16]byte
	copy(name[:], "grm:attach")
	if err := unix.Prctl(unix.PR_GET_NAME, uintptr(unsafe.Pointer(&old)), 0, 0, 0); err != nil {
		return fmt.Errorf("prctl PR_GET_NAME: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0); err != nil {
		return fmt.Errorf("prctl PR_SET_NAME: %w", err)
	}
	err := do()
	return errors.Join(err, unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&old)), 0, 0, 0))
}

func (g *Group) program() (*ebpf.Program, error) {
	names, err := entries(g.dir)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if len(name) > len(programPrefix) && name[:len(programPrefix)] == programPrefix {
			return ebpf.LoadPinnedProgram(filepath.Join(g.dir, name), nil)
		}
	}
	return nil, errors.New("no program (a service has to join first)")
}

// FlowsFD is the flow table's descriptor, for package flowtable to count with.
// It stays the group's. False if the group has no table, or not one service's
// alone.
//
// The kernel maps no descriptor that is read-only (it drops VM_SHARED, which
// BPF maps insist on), so whoever gets this one could write. What that can
// spoil is where the service's own flows go; the programs bound all they read.
func (g *Group) FlowsFD() (int, bool) {
	if g.Spec.Dissector.Kind != Flow || g.Spec.MaxApps > 1 {
		return -1, false
	}
	return g.flows.FD(), true
}

// FlowEntry is one live flow.
type FlowEntry = flowtable.Entry

// Flows calls yield with each live flow, of all apps, until it returns false.
func (g *Group) Flows(yield func(FlowEntry) bool) error {
	if g.flows == nil {
		return nil
	}
	current := func(e FlowEntry) bool {
		// What the table itself says of banks is about app 0's.
		return e.App == 0 || g.Generation(e.App, e.Bank) != 0 && g.record(e.App, e.Bank).tag() == uint32(e.Tag)
	}
	if err := flowtable.Each(g.flows.FD(), func(e FlowEntry) bool { return !current(e) || yield(e) }); err != nil {
		return fmt.Errorf("flows of group %s: %w", g.Key(), err)
	}
	return nil
}
