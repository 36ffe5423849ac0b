package cbpf

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Target says where a type of eBPF program finds what a classic program asks
// for: the first four are offsets in its context.
type Target struct {
	Data, DataEnd, Len, Protocol int16
	Pointer                      asm.Size // of Data and DataEnd
	Payload                      int32    // offset of the payload from Data
}

// The two program types that Splice knows. A socket's program sees a packet
// from the UDP header on; one of tc from the Ethernet header on, and the
// payload is where it is in IPv4 without options.
var (
	SkReuseport = Target{Data: 0, DataEnd: 8, Len: 16, Protocol: 20, Pointer: asm.DWord, Payload: 8}
	SchedCLS    = Target{Len: 0, Protocol: 16, Data: 76, DataEnd: 80, Pointer: asm.Word, Payload: 14 + 20 + 8}
)

// Splice puts p, compiled, in place of the function called symbol that one of
// spec's programs calls. In C that is a stub that the compiler must neither
// inline nor look through, here one of sk_reuseport:
//
//	static __attribute__((noinline)) __u64 cbpf(struct sk_reuseport_md *md)
//	{
//		__u64 result = 0;
//		asm volatile("" : "+r"(result), "+r"(md));
//		return result;
//	}
//
// It returns a Result: the upper 32 bits are 0 unless the program gave up.
func Splice(spec *ebpf.CollectionSpec, program, symbol string, p Program) error {
	prog := spec.Programs[program]
	if prog == nil {
		return fmt.Errorf("splice classic program: there is no program %q", program)
	}
	targets := map[ebpf.ProgramType]Target{ebpf.SkReuseport: SkReuseport, ebpf.SchedCLS: SchedCLS}
	target, ok := targets[prog.Type]
	if !ok {
		return fmt.Errorf("splice classic program: %q is of type %s (want sk_reuseport or tc)", program, prog.Type)
	}
	from, to, err := function(prog.Instructions, symbol)
	if err != nil {
		return fmt.Errorf("splice classic program into %q: %w", program, err)
	}
	body, err := Compile(p, target, symbol)
	if err != nil {
		return err
	}
	// What makes the first instruction a function is in its metadata, which may
	// also say that it refers to something: that belongs to the old body.
	stub := prog.Instructions[from]
	if fn := btf.FuncMetadata(&stub); fn != nil {
		body[0] = btf.WithFuncMetadata(body[0], fn)
	}
	body[0] = body[0].WithSource(stub.Source())
	prog.Instructions = slices.Concat(prog.Instructions[:from], body, prog.Instructions[to:])
	return nil
}

// function is where the function called symbol begins and ends. It must not
// jump: what has a symbol next is taken for the next function.
func function(insns asm.Instructions, symbol string) (from, to int, err error) {
	from = slices.IndexFunc(insns, func(in asm.Instruction) bool { return in.Symbol() == symbol })
	if from < 0 {
		return 0, 0, fmt.Errorf("it calls no function %q", symbol)
	}
	next := slices.IndexFunc(insns[from+1:], func(in asm.Instruction) bool { return in.Symbol() != "" })
	if next < 0 {
		return from, len(insns), nil
	}
	return from, from + 1 + next, nil
}

// How the registers and the stack of the compiled function are used. R1…R5 are
// scratch: no packet pointer lives longer than one load. If one did, what the
// verifier knows of it would differ after every load, depending on which of its
// two ways was taken, and so would the work to do after it: it would grow with
// the square of the program's length.
const (
	ctx     = asm.R6
	dataEnd = asm.R7
	regA    = asm.R8
	regX    = asm.R9

	scratchAt = -4 * scratchWords // M[0]
	bufferAt  = scratchAt - 8     // what bpf_skb_load_bytes fills

	// longestPacket is more than any packet's length, and few enough bytes that
	// no offset up to it wraps.
	longestPacket = 0xffff

	// islandDistance is after how many instructions what is out of line must be
	// written at the latest. Jumps reach 32767; one more classic instruction,
	// and what is pending meanwhile, is a good deal less than the difference.
	islandDistance = 8192
)

// Compile translates p into an eBPF function of that name, which takes the
// context and returns a Result. p is checked. Only what is reachable is
// translated: eBPF refuses the rest.
//
// A load is made directly where the packet is linear, and by
// bpf_skb_load_bytes, out of line, where it is not; that also tells whether the
// packet goes so far at all.
func Compile(p Program, target Target, name string) (asm.Instructions, error) {
	if err := Check(p); err != nil {
		return nil, err
	}
	c := compiler{program: p, target: target, name: name, reachable: make([]bool, len(p)), labelled: make([]bool, len(p))}
	c.findReachable()
	c.emit(asm.Mov.Reg(ctx, asm.R1))
	if c.loads() {
		c.emit(asm.LoadMem(dataEnd, ctx, target.DataEnd, target.Pointer))
	}
	c.emit(asm.Mov.Imm32(regA, 0), asm.Mov.Imm32(regX, 0))
	for pc := range p {
		if !c.reachable[pc] {
			continue
		}
		if len(c.out)-c.firstPending > islandDistance && c.pending() {
			c.jumpTo(pc)
			c.island()
		}
		c.pc = pc
		if c.labelled[pc] {
			c.symbol = c.label(pc)
		}
		c.instruction()
	}
	c.island()
	c.out[0] = c.out[0].WithSymbol(name)
	if err := c.checkJumps(); err != nil {
		return nil, err
	}
	return c.out, nil
}

type compiler struct {
	program   Program
	target    Target
	name      string
	reachable []bool
	labelled  []bool // it is jumped to

	pc     int    // being translated
	symbol string // of the next instruction
	out    asm.Instructions
	origin []int // the classic instruction of each in out

	// What the next island is to hold.
	slow          []int // loads, by the classic instruction
	outside, zero bool
	firstPending  int
	islands       int
}

func (c *compiler) findReachable() {
	c.reachable[0] = true
	for pc := range c.program {
		if c.reachable[pc] {
			c.program.next(pc, func(to int, jump bool) {
				c.reachable[to] = true
				c.labelled[to] = c.labelled[to] || jump
			})
		}
	}
}

// loads says whether a reachable instruction reads the packet.
func (c *compiler) loads() bool {
	for pc, in := range c.program {
		if c.reachable[pc] && in.readsPacket() {
			return true
		}
	}
	return false
}

func (in Instruction) readsPacket() bool {
	if class := in.class(); class != unix.BPF_LD && class != unix.BPF_LDX {
		return false
	}
	switch in.mode() {
	case unix.BPF_ABS:
		return in.K != protocol
	case unix.BPF_IND, unix.BPF_MSH:
		return true
	}
	return false
}

func (c *compiler) emit(insns ...asm.Instruction) {
	for _, in := range insns {
		if c.symbol != "" {
			in = in.WithSymbol(c.symbol)
			c.symbol = ""
		}
		c.out = append(c.out, in)
		c.origin = append(c.origin, c.pc)
	}
}

func (c *compiler) label(pc int) string     { return fmt.Sprintf("%s.%d", c.name, pc) }
func (c *compiler) slowLabel(pc int) string { return fmt.Sprintf("%s.%d.slow", c.name, pc) }
func (c *compiler) exitLabel(r Result) string {
	return fmt.Sprintf("%s.island%d.%d", c.name, c.islands, uint32(r))
}

// jumpTo goes to the code of a classic instruction. To the very next it costs
// nothing: the kernel removes such jumps.
func (c *compiler) jumpTo(pc int) {
	c.labelled[pc] = true
	c.emit(asm.Ja.Label(c.label(pc)))
}

func (c *compiler) pending() bool { return len(c.slow) > 0 || c.outside || c.zero }

// later notes that something out of line is needed.
func (c *compiler) later() {
	if !c.pending() {
		c.firstPending = len(c.out)
	}
}

// addSlowPath promises the instruction being translated a slow path, which will
// come back to the one after it. (There is one: the last is a ret.)
func (c *compiler) addSlowPath() {
	c.later()
	c.slow = append(c.slow, c.pc)
	c.labelled[c.pc+1] = true
}

// exit is the label of code that ends the program with r.
func (c *compiler) exit(r Result) string {
	c.later()
	switch r {
	case Outside:
		c.outside = true
	case ByZero:
		c.zero = true
	}
	return c.exitLabel(r)
}

// island writes what is out of line. Nothing may run into it.
func (c *compiler) island() {
	for _, pc := range c.slow {
		c.slowPath(pc)
	}
	for _, e := range []struct {
		wanted bool
		result Result
	}{{c.outside, Outside}, {c.zero, ByZero}} {
		if e.wanted {
			c.symbol = c.exitLabel(e.result)
			c.emit(asm.LoadImm(asm.R0, int64(e.result), asm.DWord), asm.Return())
		}
	}
	c.slow, c.outside, c.zero = nil, false, false
	c.islands++
}

// instruction translates the classic instruction at c.pc.
func (c *compiler) instruction() {
	in := c.program[c.pc]
	switch in.class() {
	case unix.BPF_LD, unix.BPF_LDX:
		c.load(in)
	case unix.BPF_ST:
		c.emit(asm.StoreMem(asm.RFP, scratch(in.K), regA, asm.Word))
	case unix.BPF_STX:
		c.emit(asm.StoreMem(asm.RFP, scratch(in.K), regX, asm.Word))
	case unix.BPF_ALU:
		c.alu(in)
	case unix.BPF_JMP:
		c.jump(in)
	case unix.BPF_RET:
		if in.Op == unix.BPF_RET|unix.BPF_A {
			c.emit(asm.Mov.Reg32(asm.R0, regA))
		} else {
			c.emit(asm.Mov.Imm32(asm.R0, int32(in.K)))
		}
		c.emit(asm.Return())
	case unix.BPF_MISC:
		if in.Op == unix.BPF_MISC|unix.BPF_TAX {
			c.emit(asm.Mov.Reg32(regX, regA))
		} else {
			c.emit(asm.Mov.Reg32(regA, regX))
		}
	}
}

func scratch(word uint32) int16 { return scratchAt + 4*int16(word) }

func (c *compiler) load(in Instruction) {
	to := regA
	if in.class() == unix.BPF_LDX {
		to = regX
	}
	switch in.mode() {
	case unix.BPF_IMM:
		c.emit(asm.Mov.Imm32(to, int32(in.K)))
	case unix.BPF_MEM:
		c.emit(asm.LoadMem(to, asm.RFP, scratch(in.K), asm.Word))
	case unix.BPF_LEN:
		c.emit(asm.LoadMem(to, ctx, c.target.Len, asm.Word), asm.Sub.Imm32(to, c.target.Payload))
	case unix.BPF_IND:
		c.loadIndirect(in)
	default:
		if in.K == protocol {
			c.emit(asm.LoadMem(regA, ctx, c.target.Protocol, asm.Word), asm.HostTo(asm.BE, regA, asm.Half))
			return
		}
		c.loadAbsolute(in)
	}
}

// loadAbsolute is [k], and 4*([k]&0xf).
func (c *compiler) loadAbsolute(in Instruction) {
	c.addSlowPath()
	at := c.target.Payload + int32(in.K)
	c.emit(
		asm.LoadMem(asm.R1, ctx, c.target.Data, c.target.Pointer),
		asm.Mov.Reg(asm.R2, asm.R1),
		asm.Add.Imm(asm.R2, at+int32(in.size())),
		asm.JGT.Reg(asm.R2, dataEnd, c.slowLabel(c.pc)),
	)
	c.fetch(in, asm.R1, int16(at))
}

// loadIndirect is [x + k]. R1 is the offset in the payload, also for the slow path.
func (c *compiler) loadIndirect(in Instruction) {
	c.addSlowPath()
	c.emit(asm.Mov.Reg32(asm.R1, regX))
	if in.K != 0 {
		c.emit(asm.Add.Imm32(asm.R1, int32(in.K)))
	}
	c.emit(
		asm.JGT.Imm(asm.R1, MaxOffset, c.slowLabel(c.pc)),
		asm.LoadMem(asm.R2, ctx, c.target.Data, c.target.Pointer),
		asm.Add.Reg(asm.R2, asm.R1),
		asm.Mov.Reg(asm.R3, asm.R2),
		asm.Add.Imm(asm.R3, c.target.Payload+int32(in.size())),
		asm.JGT.Reg(asm.R3, dataEnd, c.slowLabel(c.pc)),
	)
	c.fetch(in, asm.R2, int16(c.target.Payload))
}

// fetch reads what in loads from memory that holds it as the packet does.
func (c *compiler) fetch(in Instruction, from asm.Register, at int16) {
	to, size := regA, map[int]asm.Size{1: asm.Byte, 2: asm.Half, 4: asm.Word}[in.size()]
	if in.class() == unix.BPF_LDX {
		to = regX
	}
	c.emit(asm.LoadMem(to, from, at, size))
	if size != asm.Byte {
		c.emit(asm.HostTo(asm.BE, to, size))
	}
	if in.mode() == unix.BPF_MSH {
		c.emit(asm.And.Imm32(to, 0xf), asm.LSh.Imm32(to, 2))
	}
}

// slowPath copies what the load at pc wants onto the stack. An offset that no
// packet has must not get to the helper, which takes 32 bits of it.
func (c *compiler) slowPath(pc int) {
	c.pc = pc
	in := c.program[pc]
	c.symbol = c.slowLabel(pc)
	if in.mode() == unix.BPF_IND {
		c.emit(
			asm.Mov.Reg(asm.R2, asm.R1),
			asm.Add.Imm(asm.R2, c.target.Payload),
			asm.JGT.Imm(asm.R2, longestPacket, c.exit(Outside)),
		)
	} else {
		c.emit(asm.Mov.Imm(asm.R2, c.target.Payload+int32(in.K)))
	}
	c.emit(
		asm.Mov.Reg(asm.R1, ctx),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, bufferAt),
		asm.Mov.Imm(asm.R4, int32(in.size())),
		asm.FnSkbLoadBytes.Call(),
		asm.JNE.Imm(asm.R0, 0, c.exit(Outside)),
	)
	c.fetch(in, asm.RFP, bufferAt)
	c.jumpTo(pc + 1)
}

var aluOps = map[uint16]asm.ALUOp{
	unix.BPF_ADD: asm.Add, unix.BPF_SUB: asm.Sub, unix.BPF_MUL: asm.Mul, unix.BPF_DIV: asm.Div, unix.BPF_MOD: asm.Mod,
	unix.BPF_AND: asm.And, unix.BPF_OR: asm.Or, unix.BPF_XOR: asm.Xor, unix.BPF_LSH: asm.LSh, unix.BPF_RSH: asm.RSh,
	unix.BPF_NEG: asm.Neg,
}

func (c *compiler) alu(in Instruction) {
	op := aluOps[in.op()]
	switch {
	case in.op() == unix.BPF_NEG:
		c.emit(op.Imm32(regA, 0))
	case in.fromX():
		if in.op() == unix.BPF_DIV || in.op() == unix.BPF_MOD {
			c.emit(asm.JEq.Imm32(regX, 0, c.exit(ByZero)))
		}
		c.emit(op.Reg32(regA, regX))
	default:
		c.emit(op.Imm32(regA, int32(in.K)))
	}
}

// jumps are eBPF's jumps for classic ones, and for their opposites. Of jset
// there is none.
var jumps = map[uint16]struct{ taken, not asm.JumpOp }{
	unix.BPF_JEQ:  {asm.JEq, asm.JNE},
	unix.BPF_JGT:  {asm.JGT, asm.JLE},
	unix.BPF_JGE:  {asm.JGE, asm.JLT},
	unix.BPF_JSET: {asm.JSet, asm.InvalidJumpOp},
}

func (c *compiler) jump(in Instruction) {
	var targets []int
	c.program.next(c.pc, func(to int, _ bool) { targets = append(targets, to) })
	then := targets[0]
	if len(targets) == 1 || then == targets[1] {
		c.jumpTo(then)
		return
	}
	otherwise, op := targets[1], jumps[in.op()].taken
	if then == c.pc+1 && jumps[in.op()].not != asm.InvalidJumpOp {
		op, then, otherwise = jumps[in.op()].not, otherwise, then
	}
	if in.fromX() {
		c.emit(op.Reg32(regA, regX, c.label(then)))
	} else {
		c.emit(op.Imm32(regA, int32(in.K), c.label(then)))
	}
	if otherwise != c.pc+1 {
		c.jumpTo(otherwise)
	}
}

// checkJumps refuses jumps that do not fit into 16 bits, of which the assembler
// would cut off the rest.
func (c *compiler) checkJumps() error {
	at, labels := make([]int, len(c.out)), make(map[string]int)
	n := 0
	for i, in := range c.out {
		at[i] = n
		n += int(in.Width())
		if s := in.Symbol(); s != "" {
			labels[s] = at[i]
		}
	}
	for i, in := range c.out {
		to, ok := labels[in.Reference()]
		if distance := to - at[i] - 1; ok && (distance > math.MaxInt16 || distance < math.MinInt16) {
			return c.program.errorAt(c.origin[i], errors.New("jumps too far over instructions that load from the packet (put its target nearer)"))
		}
	}
	return nil
}
