package activate

import (
	"fmt"

	"grm/bpfprog"
	"grm/bpfprog/cbpf"
	"grm/config"
)

// spec is the group that a listener needs.
func spec(l config.Listener) (bpfprog.GroupSpec, error) {
	kinds := map[config.Dissector]bpfprog.Kind{config.DissectorFlow: bpfprog.Flow, config.DissectorNoop: bpfprog.Noop, config.DissectorCBPF: bpfprog.CBPF}
	assures := map[config.Assure]bpfprog.Assure{config.AssureReply: bpfprog.Reply, config.AssurePacket: bpfprog.Packet, config.AssureExplicit: bpfprog.Explicit}
	kind, known := kinds[l.Dissector]
	assure, known2 := assures[l.Assure]
	if !known || !known2 {
		return bpfprog.GroupSpec{}, fmt.Errorf("%s: dissector %q, assure %q", l.Address, l.Dissector, l.Assure)
	}
	var program cbpf.Program
	for _, in := range l.Program.Instructions {
		program = append(program, cbpf.Instruction{Op: in.Op, JT: in.Jt, JF: in.Jf, K: in.K})
	}
	return bpfprog.GroupSpec{
		Network:   string(l.Address.Proto),
		Address:   l.Address.AddrPort,
		DualStack: l.DualStack,
		MaxApps:   l.MaxApps,
		Dissector: bpfprog.Dissector{Kind: kind, Timeout: l.FlowTimeout.Duration, Flows: uint32(l.Flows), Assure: assure, Program: program},
	}, nil
}
