package cbpf

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Result is what a run of a program gives, here and in the kernel: the 32 bits
// that it returned, or, with any of the upper bits set, why it gave up.
type Result uint64

const (
	// Outside: a load was (partly) outside of the packet.
	Outside Result = 1<<32 | 1
	// ByZero: a division by an X that was 0.
	ByZero Result = 1<<32 | 2
)

// Failed says whether the program gave up. The packet is a new flow then.
func (r Result) Failed() bool { return r>>32 != 0 }

func (r Result) String() string {
	switch {
	case r == Outside:
		return "load outside of the packet"
	case r == ByZero:
		return "division by zero"
	case r.Failed():
		return fmt.Sprintf("result 0x%x", uint64(r))
	}
	return Verdict(r).String()
}

// Verdict is what a program's 32 bits mean: 0…0xffff is a socket's cookie,
// 0x80000000+N says that the packet starts a flow of app N, and everything else
// that it starts a flow.
type Verdict uint32

const (
	// MaxApps is how many apps a group can have.
	MaxApps = 16

	firstApp Verdict = 1 << 31
)

// Cookie is the cookie that v is, if it is one.
func (v Verdict) Cookie() (cookie uint16, ok bool) { return uint16(v), v <= 0xffff }

// App is the app that v names, if it does. The group need not have it.
func (v Verdict) App() (app int, ok bool) {
	if v >= firstApp && v-firstApp < MaxApps {
		return int(v - firstApp), true
	}
	return 0, false
}

func (v Verdict) String() string {
	if cookie, ok := v.Cookie(); ok {
		return fmt.Sprintf("cookie 0x%04x", cookie)
	}
	if app, ok := v.App(); ok {
		return fmt.Sprintf("new flow of app %d", app)
	}
	return fmt.Sprintf("new flow (0x%x)", uint32(v))
}

// Step is told of every instruction before it runs, with the registers.
type Step func(pc int, a, x uint32)

// Run runs p, which must have passed Check, over a payload that came in an
// Ethernet frame of the given protocol (0x0800 or 0x86dd). step may be nil.
//
// X is unsigned and X + K wraps at 32 bits, as in the kernel. What comes out
// negative is outside of the packet: to a socket's filter it may mean the
// network header, to a dissector it means nothing.
func (p Program) Run(payload []byte, ethProtocol uint16, step Step) Result {
	var a, x uint32
	var m [scratchWords]uint32
	load := func(offset uint32, size int) (uint32, bool) {
		if uint64(offset)+uint64(size) > uint64(len(payload)) {
			return 0, false
		}
		switch bytes := payload[offset:]; size {
		case 1:
			return uint32(bytes[0]), true
		case 2:
			return uint32(binary.BigEndian.Uint16(bytes)), true
		default:
			return binary.BigEndian.Uint32(bytes), true
		}
	}
	for pc := 0; ; pc++ {
		in := p[pc]
		if step != nil {
			step(pc, a, x)
		}
		switch in.class() {
		case unix.BPF_LD, unix.BPF_LDX:
			var value uint32
			ok := true
			switch in.mode() {
			case unix.BPF_IMM:
				value = in.K
			case unix.BPF_MEM:
				value = m[in.K]
			case unix.BPF_LEN:
				value = uint32(len(payload))
			case unix.BPF_IND:
				value, ok = load(x+in.K, in.size())
			case unix.BPF_MSH:
				value, ok = load(in.K, 1)
				value = value & 0xf << 2
			case unix.BPF_ABS:
				if in.K == protocol {
					value = uint32(ethProtocol)
				} else {
					value, ok = load(in.K, in.size())
				}
			}
			if !ok {
				return Outside
			}
			if in.class() == unix.BPF_LD {
				a = value
			} else {
				x = value
			}
		case unix.BPF_ST:
			m[in.K] = a
		case unix.BPF_STX:
			m[in.K] = x
		case unix.BPF_ALU:
			operand := in.K
			if in.fromX() {
				operand = x
			}
			switch in.op() {
			case unix.BPF_ADD:
				a += operand
			case unix.BPF_SUB:
				a -= operand
			case unix.BPF_MUL:
				a *= operand
			case unix.BPF_DIV, unix.BPF_MOD:
				if operand == 0 {
					return ByZero
				}
				if in.op() == unix.BPF_DIV {
					a /= operand
				} else {
					a %= operand
				}
			case unix.BPF_AND:
				a &= operand
			case unix.BPF_OR:
				a |= operand
			case unix.BPF_XOR:
				a ^= operand
			case unix.BPF_LSH: // the machine looks at five bits
				a <<= operand & 31
			case unix.BPF_RSH:
				a >>= operand & 31
			case unix.BPF_NEG:
				a = -a
			}
		case unix.BPF_JMP:
			if !in.isConditional() {
				pc += int(in.K)
				break
			}
			operand := in.K
			if in.fromX() {
				operand = x
			}
			taken := false
			switch in.op() {
			case unix.BPF_JEQ:
				taken = a == operand
			case unix.BPF_JGT:
				taken = a > operand
			case unix.BPF_JGE:
				taken = a >= operand
			case unix.BPF_JSET:
				taken = a&operand != 0
			}
			if taken {
				pc += int(in.JT)
			} else {
				pc += int(in.JF)
			}
		case unix.BPF_RET:
			if in.Op == unix.BPF_RET|unix.BPF_A {
				return Result(a)
			}
			return Result(in.K)
		case unix.BPF_MISC:
			if in.Op == unix.BPF_MISC|unix.BPF_TAX {
				x = a
			} else {
				a = x
			}
		}
	}
}
