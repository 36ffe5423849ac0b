package bpfprog

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"grm/bpfprog/cbpf"
	"grm/control"
	"grm/internal/flowtable"
)

const programPrefix = "program-"

func loadSpecs() (steer, hooks *ebpf.CollectionSpec, err error) {
	if steer, err = loadSteer(); err != nil {
		return nil, nil, fmt.Errorf("parse steering programs: %w", err)
	}
	if hooks, err = loadHooks(); err != nil {
		return nil, nil, fmt.Errorf("parse hooks: %w", err)
	}
	return steer, hooks, nil
}

// size gives the maps of spec the sizes that the group's have.
func size(spec *ebpf.CollectionSpec, group GroupSpec) {
	spec.Maps["slots"].MaxEntries = uint32(group.MaxApps * control.Banks * control.Slots)
	if group.Dissector.Kind != Noop {
		spec.Maps["flows"].MaxEntries = flowtable.Buckets(group.Dissector.Flows) + 1
	}
	controlSize := uint32(control.Size(ebpf.MustPossibleCPU()))
	spec.Maps["control"].ValueSize = controlSize
	spec.Maps["controls"].InnerMap.ValueSize = controlSize
}

// variables are the constants of a program.
type variables map[string]any

// build names what goes into a program: everything that could make two of them
// differ, but for the maps, which are the group's own and share its seed.
func build(object []byte, program string, v variables, rest ...any) string {
	names := make([]string, 0, len(v))
	for name := range v {
		names = append(names, name)
	}
	slices.Sort(names)
	h := sha256.New()
	h.Write(object)
	fmt.Fprintln(h, program, rest)
	for _, name := range names {
		fmt.Fprintln(h, name, v[name])
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// loadProgram loads one program of spec with those constants, over those maps.
func loadProgram(spec *ebpf.CollectionSpec, program string, v variables, maps map[string]*ebpf.Map) (*ebpf.Program, error) {
	for name, value := range v {
		variable := spec.Variables[name]
		if variable == nil {
			return nil, fmt.Errorf("program %s: no constant %s", program, name)
		}
		if err := variable.Set(value); err != nil {
			return nil, fmt.Errorf("program %s: constant %s: %w", program, name, err)
		}
	}
	p := spec.Programs[program]
	spec.Programs = map[string]*ebpf.ProgramSpec{program: p}
	used := map[string]bool{}
	for i := range p.Instructions {
		if in := &p.Instructions[i]; in.IsLoadFromMap() {
			used[in.Reference()] = true
		}
	}
	replacements := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if !used[name] {
			delete(spec.Maps, name)
		} else if m := maps[name]; m != nil {
			replacements[name] = m
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", program, err)
	}
	defer c.Close()
	return c.DetachProgram(program), nil
}

// constants are those that both objects have.
func (g *Group) constants(v variables) variables {
	d := g.Spec.Dissector
	v["cpus"] = uint32(ebpf.MustPossibleCPU())
	v["max_apps"] = uint32(g.Spec.MaxApps)
	if d.Kind != Noop {
		v["flow_mask"] = flowtable.Buckets(d.Flows) - 1
		v["flow_timeout"] = flowtable.Stamps(d.Timeout)
	}
	h := g.header()
	v["flow_ipv4"] = uint32(h.Ipv4)
	v["clock_tick"], v["clock_zero"] = h.Tick, h.Zero
	v["flow_seed"] = h.Seed
	return v
}

// load makes sure that the group's program is this build's, over the control
// map c, or over controls if c is nil.
func (g *Group) load(c *ebpf.Map) (loaded bool, err error) {
	d := g.Spec.Dissector
	name := "steer_" + d.Kind.String()
	var epoch uint64
	if c != nil {
		if epoch, err = epochOf(c); err != nil {
			return false, err
		}
	} else {
		name += "_apps"
	}
	v := g.constants(variables{"flow_assure": uint32(d.Assure)})
	var compiled asm.Instructions
	if d.Kind == CBPF {
		if compiled, err = cbpf.Compile(d.Program, cbpf.SkReuseport, "cbpf"); err != nil {
			return false, err
		}
	}
	id := build(_SteerBytes, name, v, epoch, compiled)
	p, loaded, err := ensureProgram(g.dir, "program", id, func() (*ebpf.Program, error) {
		steer, err := loadSteer()
		if err != nil {
			return nil, err
		}
		size(steer, g.Spec)
		if d.Kind == CBPF {
			if err := cbpf.Splice(steer, name, "cbpf", d.Program); err != nil {
				return nil, err
			}
		}
		maps := map[string]*ebpf.Map{"meta": g.meta, "slots": g.slots, "counters": g.counters,
			"flows": g.flows, "control": c, "controls": g.controls}
		return loadProgram(steer, name, v, maps)
	})
	if err != nil {
		return false, err
	}
	return loaded, p.Close()
}

// epochOf names a control map.
func epochOf(c *ebpf.Map) (uint64, error) {
	m, err := control.OpenReadOnly(c.FD())
	if err != nil {
		return 0, err
	}
	epoch := m.Epoch()
	return epoch, m.Close()
}

// A hook is one program on a service's cgroup.
type hook struct {
	program string
	kind    ebpf.AttachType
}

// hooks are those that the group needs.
func (g *Group) hooks() []hook {
	set := []hook{{"set_option", ebpf.AttachCGroupSetsockopt}}
	if g.Spec.Network != "udp" {
		return set
	}
	answers := g.Spec.Dissector.Kind == Flow && g.Spec.Dissector.Assure == Reply
	set = append(set, hook{"get_option", ebpf.AttachCGroupGetsockopt})
	v4 := g.Spec.Address.Addr().Is4()
	if v4 || g.Spec.DualStack {
		set = append(set, hook{"connect4", ebpf.AttachCGroupInet4Connect})
		if answers {
			set = append(set, hook{"send4", ebpf.AttachCGroupUDP4Sendmsg})
		}
	}
	if !v4 {
		set = append(set, hook{"connect6", ebpf.AttachCGroupInet6Connect})
		if answers {
			set = append(set, hook{"send6", ebpf.AttachCGroupUDP6Sendmsg})
		}
	}
	return set
}

// The dissectors' numbers in UDP_GRM_DISSECTOR.
var abiType = map[Kind]uint32{Flow: 0, CBPF: 1, Noop: 4}

// hookProgram is this build's program of h for service s, pinned in dir.
func (g *Group) hookProgram(h hook, s *Service, dir string) (*ebpf.Program, error) {
	d := g.Spec.Dissector
	netns, err := netnsCookie()
	if err != nil {
		return nil, err
	}
	v := g.constants(variables{
		"group_netns":    netns,
		"group_port":     uint32(g.Spec.Address.Port()),
		"group_protocol": protocol(g.Spec.Network),
		"abi_type":       abiType[d.Kind],
		"abi_timeout":    uint32(d.Timeout.Seconds()),
		"abi_apps":       uint32(g.Spec.MaxApps),
	})
	if a := g.Spec.Address.Addr(); !a.IsUnspecified() {
		var words [4]uint32
		v["group_bound"] = uint32(unix.AF_INET6)
		raw := a.As16()
		if a.Is4() {
			v["group_bound"] = uint32(unix.AF_INET)
			four := a.As4()
			raw = [16]byte(append(four[:], make([]byte, 12)...))
		}
		for i := range words {
			words[i] = *(*uint32)(unsafe.Pointer(&raw[4*i]))
		}
		v["group_address"] = words
	}
	var filter [64]uint64
	if len(d.Program) <= len(filter) {
		for i := range d.Program {
			filter[i] = *(*uint64)(unsafe.Pointer(unsafe.SliceData(encodeFilter(d.Program[i : i+1]))))
		}
		v["abi_length"] = uint32(len(d.Program))
		v["abi_filter"] = filter
	}
	id := build(_HooksBytes, h.program, v, s.Control().Epoch())
	p, _, err := ensureProgram(dir, g.name+"-"+h.program, id, func() (*ebpf.Program, error) {
		hooks, err := loadHooks()
		if err != nil {
			return nil, err
		}
		size(hooks, g.Spec)
		return loadProgram(hooks, h.program, v, map[string]*ebpf.Map{"meta": g.meta, "counters": g.counters,
			"flows": g.flows, "sockets": g.sockets, "control": s.control})
	})
	return p, err
}
