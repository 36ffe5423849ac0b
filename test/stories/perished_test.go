package stories

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
)

// What waits in a socket perishes with the last process that holds it, if nobody of grm's does. The kernel has no counter for that, but a tracepoint.

// lastPort counts the ports that standAlone took. The tracepoint does not tell in which box a datagram perished, but for which port it was.
var lastPort atomic.Uint32

// standAlone gives the story's echo server a port that no other story's has, nor most likely one of tests that somebody else runs at the same
// time, and begins to count what perishes there.
func (s *story) standAlone() {
	s.Helper()
	_, err := perishing()
	s.must(err)
	s.alone = []string{"udp://0.0.0.0:5201", fmt.Sprintf("udp://0.0.0.0:%d", 6000+50*(uint32(os.Getpid())%400)+lastPort.Add(1))}
}

// perished is how many datagrams perished with a socket of the service's since the story stands alone.
func (v *service) perished() uint64 {
	v.s.Helper()
	w, err := perishing()
	v.s.must(err)
	port := v.Listen[0].Address.Port()
	var n uint64
	err = w.perished.Lookup([8]byte{byte(port >> 8), byte(port)}, &n)
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		v.s.must(err)
	}
	return n
}

// watcher counts what perishes, for each port, which is a key as packets have it. Its program goes with its link.
type watcher struct {
	perished *ebpf.Map
	link     link.Link
}

// perishing counts from the first call on until the tests end.
var perishing = sync.OnceValues(func() (*watcher, error) {
	first, end, err := function("udp_destruct_common")
	if err != nil {
		return nil, err
	}
	head, transport, err := headerOffsets()
	if err != nil {
		return nil, err
	}
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1 << 16})
	if err != nil {
		return nil, err
	}
	// The stack: the key, a 0, and what is read of the packet.
	const key, zero, place, offset = -8, -16, -24, -32
	read := func(to int16, size int32) asm.Instructions {
		return asm.Instructions{asm.Mov.Reg(asm.R1, asm.RFP), asm.Add.Imm(asm.R1, int32(to)), asm.Mov.Imm(asm.R2, size), asm.FnProbeReadKernel.Call()}
	}
	p := asm.Instructions{
		// (skb, location, reason, …)
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord),
		asm.LoadMem(asm.R7, asm.R1, 8, asm.DWord),
		asm.LoadImm(asm.R0, int64(first), asm.DWord),
		asm.JLT.Reg(asm.R7, asm.R0, "out"),
		asm.LoadImm(asm.R0, int64(end), asm.DWord),
		asm.JGE.Reg(asm.R7, asm.R0, "out"),
		asm.Mov.Imm(asm.R0, 0),
		asm.StoreMem(asm.RFP, key, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, zero, asm.R0, asm.DWord),
		asm.StoreMem(asm.RFP, offset, asm.R0, asm.DWord),
		asm.Mov.Reg(asm.R3, asm.R6),
		asm.Add.Imm(asm.R3, head),
	}
	p = append(p, read(place, 8)...)
	p = append(p, asm.Mov.Reg(asm.R3, asm.R6), asm.Add.Imm(asm.R3, transport))
	p = append(p, read(offset, 2)...)
	p = append(p,
		asm.LoadMem(asm.R3, asm.RFP, place, asm.DWord),
		asm.LoadMem(asm.R1, asm.RFP, offset, asm.DWord),
		asm.Add.Reg(asm.R3, asm.R1),
		asm.Add.Imm(asm.R3, 2), // RFP 768: after the source port
	)
	p = append(p, read(key, 2)...)
	at := func(r asm.Register, to int32) asm.Instructions {
		return asm.Instructions{asm.Mov.Reg(r, asm.RFP), asm.Add.Imm(r, to)}
	}
	p = append(p, asm.LoadMapPtr(asm.R1, counts.FD()))
	p = append(p, at(asm.R2, key)...)
	p = append(p, at(asm.R3, zero)...)
	p = append(p, asm.Mov.Imm(asm.R4, int32(ebpf.UpdateNoExist)), asm.FnMapUpdateElem.Call(), asm.LoadMapPtr(asm.R1, counts.FD()))
	p = append(p, at(asm.R2, key)...)
	p = append(p,
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	)
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.RawTracepoint, License: "Dual MIT/GPL", Instructions: p})
	if err != nil {
		return nil, err
	}
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "kfree_skb", Program: program})
	return &watcher{counts, l}, err
})

// function is where a function of the kernel begins, and where it ends.
func function(name string) (first, end uint64, err error) {
	f, err := os.Open("/proc/kallsyms")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	var all []uint64
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		address, err := strconv.ParseUint(fields[0], 16, 64)
		if err != nil {
			return 0, 0, err
		}
		all = append(all, address)
		if fields[2] == name {
			first = address
		}
	}
	end = math.MaxUint64
	for _, address := range all {
		if address > first {
			end = min(end, address)
		}
	}
	if first == 0 {
		return 0, 0, fmt.Errorf("/proc/kallsyms has no address of %s", name)
	}
	return first, end, nil
}

// headerOffsets are where a struct sk_buff has the place of its data, and in it that of the UDP header.
func headerOffsets() (head, transport int32, err error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, 0, err
	}
	var skb *btf.Struct
	if err := kernel.TypeByName("sk_buff", &skb); err != nil {
		return 0, 0, err
	}
	h, found := memberOffset(skb.Members, "head")
	t, found2 := memberOffset(skb.Members, "transport_header")
	if !found || !found2 {
		return 0, 0, errors.New("struct sk_buff of this kernel has no head, or no transport_header")
	}
	return int32(h), int32(t), nil
}

// memberOffset finds a member, in nameless structs and unions as well, and its offset in bytes.
func memberOffset(members []btf.Member, name string) (uint32, bool) {
	for _, m := range members {
		if m.Name == name {
			return m.Offset.Bytes(), true
		}
		if m.Name != "" {
			continue
		}
		var inner []btf.Member
		switch t := m.Type.(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if at, found := memberOffset(inner, name); found {
			return m.Offset.Bytes() + at, true
		}
	}
	return 0, false
}
