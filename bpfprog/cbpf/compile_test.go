package cbpf

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"grm/internal/testenv"
)

func mustBeRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading BPF programs needs root")
	}
}

const (
	frame     = 14 + 20    // Ethernet and IPv4 headers
	udpHeader = 8          // the tests' programs see it, as sockets' filters do
	markAt    = 8          // in struct __sk_buff
	neverFits = 30_000     // longer than the tests' packets
	sentinel  = 0x5e47e1   // the mark of the packet after the one that counts
	markLoad  = 0xfffff014 // ld #mark
)

// behindIPv4 makes programs see what a UDP socket's filter sees.
var behindIPv4 = Target{Len: SchedCLS.Len, Protocol: SchedCLS.Protocol, Data: SchedCLS.Data, DataEnd: SchedCLS.DataEnd, Pointer: SchedCLS.Pointer, Payload: frame}

// onlySlow makes every load of a compiled program take the way for paged
// packets: none has as many bytes as it asks for.
func onlySlow(insns asm.Instructions) {
	for i := range insns {
		if insns[i].OpCode == asm.JGT.Op(asm.RegSource) {
			insns[i-1].Constant += neverFits
		}
	}
}

// tcProgram calls that one of the functions called f0, f1, … whose number is in
// the packet's mark. It returns the lower half of the result and leaves the
// upper one in the mark.
func tcProgram(functions ...asm.Instructions) *ebpf.ProgramSpec {
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R7, asm.R1, markAt, asm.Word),
		asm.Mov.Imm(asm.R0, -1),
	}
	for i := range functions {
		insns = append(insns,
			asm.JNE.Imm(asm.R7, int32(i), fmt.Sprint("after", i)),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Call.Label(fmt.Sprint("f", i)),
			asm.Ja.Label("done"),
			asm.Mov.Reg(asm.R1, asm.R6).WithSymbol(fmt.Sprint("after", i)),
		)
	}
	insns = append(insns,
		asm.Mov.Reg(asm.R1, asm.R0).WithSymbol("done"),
		asm.RSh.Imm(asm.R1, 32),
		asm.StoreMem(asm.R6, markAt, asm.R1, asm.Word),
		asm.Mov.Reg32(asm.R0, asm.R0),
		asm.Return(),
	)
	for _, f := range functions {
		insns = append(insns, f...)
	}
	return &ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual MIT/GPL", Instructions: insns}
}

// runTC has function number f of a tcProgram look at a packet.
func runTC(t *testing.T, prog *ebpf.Program, f int, packet []byte) Result {
	t.Helper()
	data := make([]byte, frame, frame+len(packet))
	binary.BigEndian.PutUint16(data[12:], ipv4)
	data[14] = 0x45
	type skBuff [48]uint32
	in, out := skBuff{markAt / 4: uint32(f)}, skBuff{}
	low, err := prog.Run(&ebpf.RunOptions{Data: append(data, packet...), Context: in, ContextOut: &out})
	if err != nil {
		t.Fatal(err)
	}
	return Result(out[markAt/4])<<32 | Result(low)
}

// TestCompileAsKernel has random programs look at random packets: compiled, by
// both ways of loading; in Go; by golang.org/x/net/bpf as far as it goes; and
// by the kernel's own machine for classic programs, as the filter of a socket.
// A filter's result is invisible but for how much it leaves of the packet, so
// the result to expect travels as the packet's mark, and a tail that every
// program gets compares it.
func TestCompileAsKernel(t *testing.T) {
	mustBeRoot(t)
	random := newRandom(t)
	pair := newFilteredPair(t)
	const together = 4 // programs in one of tc
	for range testenv.Scale(16) {
		var programs [together]Program
		var reference [together]bool
		var functions []asm.Instructions
		for i := range programs {
			programs[i], reference[i] = randomProgram(random)
			for slow := range 2 {
				f, err := Compile(programs[i], behindIPv4, fmt.Sprint("f", 2*i+slow))
				if err != nil {
					t.Fatal(err)
				}
				if slow == 1 {
					onlySlow(f)
				}
				functions = append(functions, f)
			}
		}
		prog, err := ebpf.NewProgram(tcProgram(functions...))
		if err != nil {
			t.Fatalf("%v\n%s%s%s%s", err, listing(programs[0]), listing(programs[1]), listing(programs[2]), listing(programs[3]))
		}
		for i, p := range programs {
			pair.attach(t, p)
			for range testenv.Scale(100) {
				packet := pair.packet(randomPacket(random))
				want := p.Run(packet, ipv4, nil)
				for slow := range 2 {
					if got := runTC(t, prog, 2*i+slow, packet); got != want {
						t.Fatalf("compiled (slow: %d): %v, Run: %v\npacket %x\n%s", slow, got, want, packet, listing(p))
					}
				}
				if reference[i] {
					checkReference(t, p, packet, want)
				}
				if err := pair.check(packet, want); err != nil {
					t.Fatalf("%v\npacket %x\n%s", err, packet, listing(p))
				}
				if random.UintN(8) != 0 || want.Failed() {
					continue
				}
				if err := pair.check(packet, want^1<<random.UintN(32)); len(packet) > udpHeader && err == nil {
					t.Fatalf("the kernel does not tell %v from another result\npacket %x\n%s", want, packet, listing(p))
				}
			}
		}
		prog.Close()
	}
}

// filteredPair are two UDP sockets, the second of which has a classic program
// as its filter. All of it happens on one CPU, so that packets stay in order.
type filteredPair struct {
	from, to int
	fromPort uint16
	address  *unix.SockaddrInet4
}

func newFilteredPair(t *testing.T) *filteredPair {
	t.Helper()
	t.Cleanup(testenv.OneCPU(t))
	p := &filteredPair{}
	for _, fd := range []*int{&p.from, &p.to} {
		*fd, p.address = mustUDP(t)
		if fd == &p.from {
			p.fromPort = uint16(p.address.Port)
		}
	}
	// Without a checksum the UDP header is known in advance.
	if err := unix.SetsockoptInt(p.from, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
		t.Fatal(err)
	}
	return p
}

// mustUDP is a UDP socket with a port of its own on the loopback address, and a
// limit to how long it waits.
func mustUDP(t *testing.T, options ...int) (int, *unix.SockaddrInet4) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	for _, option := range options {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fd, address.(*unix.SockaddrInet4)
}

// packet is a payload behind the UDP header that it will have.
func (p *filteredPair) packet(payload []byte) []byte {
	header := make([]byte, udpHeader, udpHeader+len(payload))
	binary.BigEndian.PutUint16(header, p.fromPort)
	binary.BigEndian.PutUint16(header[2:], uint16(p.address.Port))
	binary.BigEndian.PutUint16(header[4:], uint16(udpHeader+len(payload)))
	return append(header, payload...)
}

// attach makes program the filter, with a head that lets the sentinel through
// and a tail that takes the place of every ret: it keeps the whole packet if A
// is the packet's mark, and only the header if not. A program that fails drops
// the packet.
func (p *filteredPair) attach(t *testing.T, program Program) {
	t.Helper()
	filter := Program{
		{Op: ld, K: markLoad},
		{Op: jeq, K: sentinel, JF: 1},
		{Op: retK, K: 1<<32 - 1},
		{Op: ldImm},
	}
	compare := Program{
		{Op: tax},
		{Op: ld, K: markLoad},
		{Op: jeqX, JF: 1},
		{Op: retK, K: 1<<32 - 1},
		{Op: retK, K: udpHeader},
	}
	tail := append(Program(nil), compare...)
	body := len(filter)
	for _, in := range program {
		behind := body + len(program) - len(filter) - 1 // from here to the tail
		switch in.Op {
		case retA:
			in = Instruction{Op: ja, K: uint32(behind)}
		case retK:
			// Jumps only go forward: a constant has a copy of the tail.
			tail = append(append(tail, Instruction{Op: ldImm, K: in.K}), compare...)
			in = Instruction{Op: ja, K: uint32(behind + len(tail) - len(compare) - 1)}
		}
		filter = append(filter, in)
	}
	filter = append(filter, tail...)
	if err := attachFilter(p.to, filter); err != nil {
		t.Fatalf("%v\n%s", err, listing(filter))
	}
}

// check sends a packet and says whether the filter agrees with want.
func (p *filteredPair) check(packet []byte, want Result) error {
	payload := packet[udpHeader:]
	for _, send := range []struct {
		mark    uint32
		payload []byte
	}{{uint32(want), payload}, {sentinel, make([]byte, 1000)}} {
		mark := make([]byte, unix.CmsgSpace(4))
		h := (*unix.Cmsghdr)(unsafe.Pointer(&mark[0]))
		h.Level, h.Type = unix.SOL_SOCKET, unix.SO_MARK
		h.SetLen(unix.CmsgLen(4))
		binary.NativeEndian.PutUint32(mark[unix.CmsgLen(0):], send.mark)
		if err := unix.Sendmsg(p.from, send.payload, mark, p.address, 0); err != nil {
			return err
		}
	}
	got, buffer := "dropped", make([]byte, 2000)
	for {
		n, _, err := unix.Recvfrom(p.to, buffer, 0)
		if err != nil {
			return err
		}
		if n == 1000 {
			break
		}
		got = "another result"
		if n == len(payload) {
			got = "the same result"
		}
	}
	expected := "the same result"
	if want.Failed() {
		expected = "dropped"
	}
	if got != expected {
		return fmt.Errorf("the kernel's machine: %s, Run: %v", got, want)
	}
	return nil
}

// TestCompileLong loads the longest programs that there can be.
func TestCompileLong(t *testing.T) {
	mustBeRoot(t)
	long := func(ins ...Instruction) Program {
		var p Program
		for len(p)+len(ins) <= MaxInstructions {
			p = append(p, ins...)
		}
		for i := 1; i <= 8; i++ { // wherever the last jumps go
			p[len(p)-i] = Instruction{Op: retA}
		}
		return p
	}
	for name, p := range map[string]Program{
		"loads":           long(Instruction{Op: ldh, K: 60}, Instruction{Op: ldb, K: 3}, Instruction{Op: ld, K: 20}),
		"loads and jumps": long(Instruction{Op: ldb, K: 3}, Instruction{Op: jset, K: 8, JT: 1, JF: 1}, Instruction{Op: ldxMsh, K: 4}, Instruction{Op: jeqX, JT: 2}, Instruction{Op: st}),
		"indirect":        long(Instruction{Op: ldhx, K: 60}, Instruction{Op: and, K: 15}, Instruction{Op: tax}),
		"arithmetic":      long(Instruction{Op: add, K: 1}),
	} {
		f, err := Compile(p, behindIPv4, "f0")
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		prog, err := ebpf.NewProgram(tcProgram(f))
		if err != nil {
			t.Errorf("%s: %.1000v", name, err)
			continue
		}
		for _, length := range []int{0, 4, 50, 61, 62, 100} {
			packet := make([]byte, length)
			for i := range packet {
				packet[i] = byte(i)
			}
			if got, want := runTC(t, prog, 0, packet), p.Run(packet, ipv4, nil); got != want {
				t.Errorf("%s: %d bytes: got %v, want %v", name, length, got, want)
			}
		}
		if info, err := prog.Info(); err == nil {
			n, _ := info.VerifiedInstructions()
			t.Logf("%s: %d eBPF instructions, verified in %d", name, len(f), n)
		}
		prog.Close()
	}
}

func TestCompileErrors(t *testing.T) {
	far := Program{{Op: ja, K: 4000}}
	far = append(Program{{Op: jeq, JT: 1}}, far...)
	for len(far) < 4010 {
		far = append(far, Instruction{Op: ldh, K: 60})
	}
	far = append(far, Instruction{Op: retA})
	for _, test := range []struct {
		program Program
		want    string
	}{
		{far, "instruction 1 (ja 4002): jumps too far"},
		{Program{{Op: ldh}}, "the last instruction must be ret"},
	} {
		if _, err := Compile(test.program, SkReuseport, "cbpf"); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %v, want %s", err, test.want)
		}
	}
}

// steering is a collection like a group's: a program of sk_reuseport that asks
// the function cbpf, here a stub, and leaves its result in the map results; and
// next to it how much of the packet is not linear.
func steering(typed bool) *ebpf.CollectionSpec {
	store := func(index int32, value asm.Register) asm.Instructions {
		return asm.Instructions{
			asm.StoreMem(asm.RFP, -8, value, asm.DWord),
			asm.StoreImm(asm.RFP, -12, int64(index), asm.Word),
			asm.LoadMapPtr(asm.R1, 0).WithReference("results"),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -12),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "out"),
			asm.LoadMem(asm.R1, asm.RFP, -8, asm.DWord),
			asm.StoreMem(asm.R0, 0, asm.R1, asm.DWord),
		}
	}
	t := SkReuseport
	insns := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Call.Label("cbpf"),
		asm.Mov.Reg(asm.R7, asm.R0),
	}
	insns = append(insns, store(0, asm.R7)...)
	insns = append(insns,
		asm.LoadMem(asm.R1, asm.R6, t.Data, asm.DWord),
		asm.LoadMem(asm.R2, asm.R6, t.DataEnd, asm.DWord),
		asm.LoadMem(asm.R7, asm.R6, t.Len, asm.Word),
		asm.Sub.Reg(asm.R2, asm.R1),
		asm.Sub.Reg(asm.R7, asm.R2),
	)
	insns = append(insns, store(1, asm.R7)...)
	insns = append(insns, asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
	stub := asm.Instructions{
		asm.Mov.Imm(asm.R0, 0).WithSymbol("cbpf"),
		asm.Mov.Reg(asm.R0, asm.R0),
		asm.Return(),
	}
	if typed {
		number := &btf.Int{Name: "unsigned long long", Size: 8}
		pointer := &btf.Pointer{Target: &btf.Fwd{Name: "sk_reuseport_md"}}
		function := func(name string, linkage btf.FuncLinkage, result btf.Type) *btf.Func {
			return &btf.Func{Name: name, Linkage: linkage, Type: &btf.FuncProto{Return: result, Params: []btf.FuncParam{{Name: "md", Type: pointer}}}}
		}
		insns[0] = btf.WithFuncMetadata(insns[0], function("steer", btf.GlobalFunc, &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}))
		stub[0] = btf.WithFuncMetadata(stub[0], function("cbpf", btf.StaticFunc, number))
	}
	return &ebpf.CollectionSpec{
		Maps: map[string]*ebpf.MapSpec{"results": {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 2}},
		Programs: map[string]*ebpf.ProgramSpec{"steer": {
			Name: "steer", Type: ebpf.SkReuseport, AttachType: ebpf.AttachSkReuseportSelect, License: "Dual MIT/GPL",
			Instructions: append(insns, stub...),
		}},
	}
}

// TestSplice asks a real group's program about real packets, linear and paged.
func TestSplice(t *testing.T) {
	mustBeRoot(t)
	random := newRandom(t)
	for i := range 6 {
		p, _ := randomProgram(random)
		switch i {
		case 0:
			p = twoBytes
		case 1:
			p = Program{{Op: ldb, K: 70}, {Op: st}, {Op: ldh, K: protocol}, {Op: tax}, {Op: ldMem}, {Op: 0x0c}, {Op: retA}}
		}
		spec := steering(i%2 == 0)
		if err := Splice(spec, "steer", "cbpf", p); err != nil {
			t.Fatal(err)
		}
		coll, err := ebpf.NewCollection(spec)
		if err != nil {
			t.Fatalf("%+v\n%s", err, listing(p))
		}
		askGroup(t, random, p, coll)
		coll.Close()
	}
}

func askGroup(t *testing.T, random *rand.Rand, p Program, coll *ebpf.Collection) {
	t.Helper()
	to, address := mustUDP(t, unix.SO_REUSEPORT)
	if err := unix.SetsockoptInt(to, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, coll.Programs["steer"].FD()); err != nil {
		t.Fatal(err)
	}
	paged := 0
	for _, segment := range []int{0, 1400} {
		from, _ := mustUDP(t)
		// A datagram that could have been cut into segments has its payload in pages.
		if err := unix.SetsockoptInt(from, unix.IPPROTO_UDP, unix.UDP_SEGMENT, segment); err != nil {
			t.Fatal(err)
		}
		for range testenv.Scale(200) {
			payload := randomPacket(random)
			if err := unix.Sendto(from, payload, 0, address); err != nil {
				t.Fatal(err)
			}
			n, _, err := unix.Recvfrom(to, make([]byte, 100), 0)
			if err != nil || n != len(payload) {
				t.Fatalf("got %d bytes of %d: %v", n, len(payload), err)
			}
			var result, notLinear uint64
			if err := coll.Maps["results"].Lookup(uint32(0), &result); err != nil {
				t.Fatal(err)
			}
			if err := coll.Maps["results"].Lookup(uint32(1), &notLinear); err != nil {
				t.Fatal(err)
			}
			if notLinear > 0 {
				paged++
			}
			if want := p.Run(payload, ipv4, nil); Result(result) != want {
				t.Fatalf("got %v, want %v (%d bytes not linear)\npacket %x\n%s", Result(result), want, notLinear, payload, listing(p))
			}
		}
	}
	if paged == 0 {
		t.Error("no packet was paged")
	}
}

func TestSpliceErrors(t *testing.T) {
	for _, test := range []struct {
		program, symbol string
		code            Program
		want            string
	}{
		{"steer2", "cbpf", twoBytes, `there is no program "steer2"`},
		{"steer", "cbpf2", twoBytes, `into "steer": it calls no function "cbpf2"`},
		{"steer", "cbpf", Program{{Op: 0xff}}, "instruction 0 (opcode 0xff): no such instruction"},
		{"xdp", "cbpf", twoBytes, `"xdp" is of type XDP`},
	} {
		spec := steering(false)
		spec.Programs["xdp"] = &ebpf.ProgramSpec{Type: ebpf.XDP}
		if err := Splice(spec, test.program, test.symbol, test.code); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %v, want %s", err, test.want)
		}
	}
}
