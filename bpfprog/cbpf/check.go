package cbpf

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// known says whether the kernel has an instruction with in's opcode.
func (in Instruction) known() bool {
	switch in.class() {
	case unix.BPF_LD:
		switch in.Op &^ 0x18 {
		case unix.BPF_LD | unix.BPF_ABS, unix.BPF_LD | unix.BPF_IND:
			return in.Op&0x18 != 0x18
		case unix.BPF_LD | unix.BPF_IMM, unix.BPF_LD | unix.BPF_MEM, unix.BPF_LD | unix.BPF_LEN:
			return in.Op&0x18 == unix.BPF_W
		}
	case unix.BPF_LDX:
		switch in.Op {
		case unix.BPF_LDX | unix.BPF_IMM, unix.BPF_LDX | unix.BPF_MEM, unix.BPF_LDX | unix.BPF_LEN,
			unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH:
			return true
		}
	case unix.BPF_ALU:
		_, ok := aluNames[in.Op&^0x0f]
		return ok || in.Op == unix.BPF_ALU|unix.BPF_NEG
	case unix.BPF_JMP:
		_, ok := jumpNames[in.Op&^0x0f]
		return ok || in.Op == unix.BPF_JMP|unix.BPF_JA
	default:
		switch in.Op {
		case unix.BPF_ST, unix.BPF_STX, unix.BPF_RET | unix.BPF_K, unix.BPF_RET | unix.BPF_A,
			unix.BPF_MISC | unix.BPF_TAX, unix.BPF_MISC | unix.BPF_TXA:
			return true
		}
	}
	return false
}

// Check refuses whatever the kernel's own checker of classic programs refuses,
// and the loads that have no meaning here: ancillary ones but the protocol, and
// offsets beyond MaxOffset. The error names the instruction.
func Check(p Program) error {
	switch {
	case len(p) == 0:
		return errors.New("classic program: it has no instructions")
	case len(p) > MaxInstructions:
		return fmt.Errorf("classic program: %d instructions are more than the %d that the kernel takes", len(p), MaxInstructions)
	}
	for pc := range p {
		if err := p.check(pc); err != nil {
			return p.errorAt(pc, err)
		}
	}
	if last := len(p) - 1; !p[last].isReturn() {
		return p.errorAt(last, errors.New("the last instruction must be ret (is the program cut off?)"))
	}
	return p.checkScratch()
}

func (p Program) errorAt(pc int, err error) error {
	return fmt.Errorf("classic program: instruction %d (%s): %w", pc, p.Text(pc), err)
}

// check is everything that can be said of one instruction by itself.
func (p Program) check(pc int) error {
	in := p[pc]
	if !in.known() {
		return errors.New("no such instruction")
	}
	switch in.class() {
	case unix.BPF_ST, unix.BPF_STX:
		return checkWord(in.K)
	case unix.BPF_LD, unix.BPF_LDX:
		switch in.mode() {
		case unix.BPF_MEM:
			return checkWord(in.K)
		case unix.BPF_ABS:
			if in.K == protocol {
				return nil
			}
			if in.K >= ancillary {
				return errors.New("this ancillary load is not supported (only the protocol is)")
			}
			return checkOffset(int64(in.K))
		case unix.BPF_MSH:
			return checkOffset(int64(in.K))
		case unix.BPF_IND:
			// What is added to X may be negative.
			return checkOffset(max(int64(int32(in.K)), -int64(int32(in.K))))
		}
	case unix.BPF_ALU:
		if in.fromX() {
			return nil
		}
		switch in.op() {
		case unix.BPF_DIV, unix.BPF_MOD:
			if in.K == 0 {
				return errors.New("division by zero")
			}
		case unix.BPF_LSH, unix.BPF_RSH:
			if in.K >= 32 {
				return errors.New("shift by more than 31 bits")
			}
		}
	case unix.BPF_JMP:
		to := uint64(pc) + 1 + uint64(in.K)
		if in.isConditional() {
			to = uint64(pc) + 1 + uint64(max(in.JT, in.JF))
		}
		if to >= uint64(len(p)) {
			return fmt.Errorf("jump to %d, behind the last instruction (%d)", to, len(p)-1)
		}
	}
	return nil
}

func checkWord(k uint32) error {
	if k >= scratchWords {
		return fmt.Errorf("there is no M[%d] (the last is M[%d])", k, scratchWords-1)
	}
	return nil
}

func checkOffset(k int64) error {
	if k > MaxOffset {
		return fmt.Errorf("offset %d is not supported (the largest is %d)", k, MaxOffset)
	}
	return nil
}

// checkScratch refuses a read of a scratch word that is not written on every
// way to it, by the kernel's rule: jumps only go forward, so one pass is enough.
func (p Program) checkScratch() error {
	written := make([]uint16, len(p)) // on every jump to the instruction
	for i := range written {
		written[i] = ^uint16(0)
	}
	valid := uint16(0)
	for pc, in := range p {
		valid &= written[pc]
		switch in.class() {
		case unix.BPF_ST, unix.BPF_STX:
			valid |= 1 << in.K
		case unix.BPF_LD, unix.BPF_LDX:
			if in.mode() == unix.BPF_MEM && valid&(1<<in.K) == 0 {
				return p.errorAt(pc, fmt.Errorf("reads M[%d], which is not written on every way to here", in.K))
			}
		case unix.BPF_JMP:
			p.next(pc, func(to int, _ bool) { written[to] &= valid })
			valid = ^uint16(0)
		}
	}
	return nil
}
