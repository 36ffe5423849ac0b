// Package cbpf turns a classic BPF program, with which an operator says how a
// packet names its flow, into eBPF that is part of a group's steering program.
//
// A program goes Parse → Check → Splice. Its offsets start at the UDP payload.
// Run is the same machine in Go, for explanations and as a reference.
package cbpf

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// MaxInstructions is the kernel's limit for classic programs.
	MaxInstructions = unix.BPF_MAXINSNS
	// MaxOffset is the largest constant offset of a load. It is bounded so that
	// every direct access fits an eBPF instruction's signed 16-bit offset.
	MaxOffset = 0x7000

	// ancillary is where the offsets begin that mean something else than bytes
	// of the packet (the kernel's SKF_AD_OFF); the first of them is the
	// Ethernet protocol, the only one that is known here.
	ancillary = 0xfffff000
	protocol  = ancillary

	scratchWords = 16 // M[0]…M[15]
)

// Instruction is one classic instruction, in the kernel's encoding.
type Instruction struct {
	Op     uint16
	JT, JF uint8
	K      uint32
}

// Program is a classic program. It is to be checked before it is run or
// compiled.
type Program []Instruction

// String is the program as `bpf_asm -c` and `tcpdump -dd` write it; Parse reads
// it back.
func (p Program) String() string {
	var b strings.Builder
	for _, in := range p {
		fmt.Fprintf(&b, "{ 0x%02x, %d, %d, 0x%08x },\n", in.Op, in.JT, in.JF, in.K)
	}
	return b.String()
}

// The parts of an opcode. Which of them are there depends on the class.
func (in Instruction) class() uint16  { return in.Op & 0x07 }
func (in Instruction) mode() uint16   { return in.Op & 0xe0 }
func (in Instruction) op() uint16     { return in.Op & 0xf0 }
func (in Instruction) fromX() bool    { return in.Op&unix.BPF_X != 0 }
func (in Instruction) isReturn() bool { return in.class() == unix.BPF_RET }

// size is how many bytes a load takes from the packet.
func (in Instruction) size() int {
	switch in.Op & 0x18 {
	case unix.BPF_B:
		return 1
	case unix.BPF_H:
		return 2
	}
	return 4
}

// isConditional says whether in is a jump with two targets.
func (in Instruction) isConditional() bool {
	return in.class() == unix.BPF_JMP && in.op() != unix.BPF_JA
}

// next calls yield with every instruction that can come after the one at pc;
// jump says that it is not the one that follows by itself.
func (p Program) next(pc int, yield func(to int, jump bool)) {
	in := p[pc]
	switch {
	case in.isReturn():
	case in.isConditional():
		yield(pc+1+int(in.JT), true)
		yield(pc+1+int(in.JF), true)
	case in.class() == unix.BPF_JMP:
		yield(pc+1+int(in.K), true)
	default:
		yield(pc+1, false)
	}
}

var aluNames = map[uint16]string{
	unix.BPF_ADD: "add", unix.BPF_SUB: "sub", unix.BPF_MUL: "mul", unix.BPF_DIV: "div", unix.BPF_MOD: "mod",
	unix.BPF_AND: "and", unix.BPF_OR: "or", unix.BPF_XOR: "xor", unix.BPF_LSH: "lsh", unix.BPF_RSH: "rsh",
}

var jumpNames = map[uint16]string{
	unix.BPF_JEQ: "jeq", unix.BPF_JGT: "jgt", unix.BPF_JGE: "jge", unix.BPF_JSET: "jset",
}

// Text is the instruction at pc in assembler, as `tcpdump -d` writes it: jumps
// name the instructions that they go to. An instruction that the kernel does
// not know is shown by its number.
func (p Program) Text(pc int) string {
	in := p[pc]
	if !in.known() {
		return fmt.Sprintf("opcode 0x%02x", in.Op)
	}
	operand := fmt.Sprintf("#0x%x", in.K)
	if in.fromX() {
		operand = "x"
	}
	switch in.class() {
	case unix.BPF_LD, unix.BPF_LDX:
		name := "ld"
		if in.class() == unix.BPF_LDX {
			name = "ldx"
		}
		switch in.mode() {
		case unix.BPF_IMM:
			return fmt.Sprintf("%s #0x%x", name, in.K)
		case unix.BPF_MEM:
			return fmt.Sprintf("%s M[%d]", name, in.K)
		case unix.BPF_LEN:
			return name + " #len"
		case unix.BPF_MSH:
			return fmt.Sprintf("ldxb 4*([%d]&0xf)", in.K)
		}
		name += map[int]string{1: "b", 2: "h", 4: ""}[in.size()]
		switch {
		case in.mode() == unix.BPF_IND:
			return fmt.Sprintf("%s [x + %d]", name, int32(in.K))
		case in.K == protocol:
			return name + " #proto"
		case in.K > ancillary:
			return fmt.Sprintf("%s #ancillary %d", name, in.K-ancillary)
		}
		return fmt.Sprintf("%s [%d]", name, in.K)
	case unix.BPF_ST:
		return fmt.Sprintf("st M[%d]", in.K)
	case unix.BPF_STX:
		return fmt.Sprintf("stx M[%d]", in.K)
	case unix.BPF_ALU:
		if in.op() == unix.BPF_NEG {
			return "neg"
		}
		return aluNames[in.op()] + " " + operand
	case unix.BPF_JMP:
		if in.op() == unix.BPF_JA {
			return fmt.Sprintf("ja %d", uint64(pc)+1+uint64(in.K))
		}
		return fmt.Sprintf("%s %s jt %d jf %d", jumpNames[in.op()], operand, pc+1+int(in.JT), pc+1+int(in.JF))
	case unix.BPF_RET:
		if in.Op == unix.BPF_RET|unix.BPF_A {
			return "ret a"
		}
		return fmt.Sprintf("ret #0x%x", in.K)
	}
	if in.Op == unix.BPF_MISC|unix.BPF_TAX {
		return "tax"
	}
	return "txa"
}
