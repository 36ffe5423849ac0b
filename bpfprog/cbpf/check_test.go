package cbpf

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The opcodes that the tests write by hand.
const (
	ldb, ldh, ld            = 0x30, 0x28, 0x20
	ldbx, ldhx, ldx4        = 0x50, 0x48, 0x40
	ldImm, ldMem, ldLen     = 0x00, 0x60, 0x80
	ldxImm, ldxMem, ldxMsh  = 0x01, 0x61, 0xb1
	ldxLen, st, stx         = 0x81, 0x02, 0x03
	add, div, lsh, neg, and = 0x04, 0x34, 0x64, 0x84, 0x54
	ja, jeq, jeqX, jset     = 0x05, 0x15, 0x1d, 0x45
	retK, retA, tax, txa    = 0x06, 0x16, 0x07, 0x87
)

func TestCheck(t *testing.T) {
	for name, test := range map[string]struct {
		program Program
		want    string
	}{
		"none":             {Program{}, "it has no instructions"},
		"too many":         {make(Program, MaxInstructions+1), "4097 instructions are more than the 4096"},
		"opcode":           {Program{{Op: 0x99}, {Op: retA}}, "instruction 0 (opcode 0x99): no such instruction"},
		"ret x":            {Program{{Op: 0x0e}}, "instruction 0 (opcode 0x0e): no such instruction"},
		"wide opcode":      {Program{{Op: 0x128}, {Op: retA}}, "instruction 0 (opcode 0x128): no such instruction"},
		"no ret":           {Program{{Op: ldh}}, "instruction 0 (ldh [0]): the last instruction must be ret"},
		"ja":               {Program{{Op: ja, K: 1}, {Op: retA}}, "instruction 0 (ja 2): jump to 2, behind the last instruction (1)"},
		"ja far":           {Program{{Op: ja, K: 1<<32 - 1}, {Op: retA}}, "jump to 4294967296"},
		"jt":               {Program{{Op: jeq, K: 7, JT: 1}, {Op: retA}}, "instruction 0 (jeq #0x7 jt 2 jf 1): jump to 2"},
		"jf":               {Program{{Op: jeqX, JF: 255}, {Op: retA}}, "instruction 0 (jeq x jt 1 jf 256): jump to 256"},
		"div":              {Program{{Op: div}, {Op: retA}}, "instruction 0 (div #0x0): division by zero"},
		"lsh":              {Program{{Op: lsh, K: 32}, {Op: retA}}, "instruction 0 (lsh #0x20): shift by more than 31 bits"},
		"M":                {Program{{Op: st, K: 16}, {Op: retA}}, "instruction 0 (st M[16]): there is no M[16]"},
		"M read":           {Program{{Op: ldMem, K: 3}, {Op: retA}}, "instruction 0 (ld M[3]): reads M[3], which is not written"},
		"M on one way":     {Program{{Op: jeq, JT: 1}, {Op: stx, K: 1}, {Op: ldxMem, K: 1}, {Op: retA}}, "instruction 2 (ldx M[1]): reads M[1]"},
		"offset":           {Program{{Op: ldh, K: 0x7001}, {Op: retA}}, "instruction 0 (ldh [28673]): offset 28673 is not supported (the largest is 28672)"},
		"offset x":         {Program{{Op: ldbx, K: 0x7001}, {Op: retA}}, "instruction 0 (ldb [x + 28673]): offset"},
		"offset x below":   {Program{{Op: ldbx, K: 1 << 31}, {Op: retA}}, "instruction 0 (ldb [x + -2147483648]): offset"},
		"offset msh":       {Program{{Op: ldxMsh, K: 0x7001}, {Op: retA}}, "instruction 0 (ldxb 4*([28673]&0xf)): offset"},
		"network header":   {Program{{Op: ldb, K: 0xfff00000}, {Op: retA}}, "offset 4293918720 is not supported"},
		"ancillary":        {Program{{Op: ld, K: 0xfffff000 + 20}, {Op: retA}}, "instruction 0 (ld #ancillary 20): this ancillary load is not supported"},
		"fine":             {Program{{Op: ldh, K: protocol}, {Op: st, K: 15}, {Op: ldMem, K: 15}, {Op: ldxMsh, K: 0x7000}, {Op: ldbx, K: 1<<32 - 2}, {Op: neg}, {Op: retA}}, ""},
		"not reached, bad": {Program{{Op: retA}, {Op: 0xff}, {Op: retA}}, "instruction 1"},
	} {
		switch err := Check(test.program); {
		case err == nil && test.want != "":
			t.Errorf("%s: accepted, want %q", name, test.want)
		case err != nil && (test.want == "" || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%s:\ngot  %v\nwant %q", name, err, test.want)
		}
	}
}

// attachFilter has the kernel check and take p as a socket's filter.
func attachFilter(fd int, p Program) error {
	prog := unix.SockFprog{Len: uint16(len(p)), Filter: (*unix.SockFilter)(unsafe.Pointer(&p[0]))}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
}

// TestCheckAsKernel gives random, mostly broken programs to Check and to the
// kernel's checker.
func TestCheckAsKernel(t *testing.T) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	random := newRandom(t)
	// The kernel gives up BPF programs slowly: few are to be accepted.
	const tries, mostAccepted = 20_000, 30
	accepted, refused := 0, 0
	for range tries {
		p := brokenProgram(random)
		ours := Check(p)
		if ours == nil && accepted == mostAccepted {
			continue
		}
		if ours != nil && strings.Contains(ours.Error(), "not supported") {
			continue // our own limits
		}
		switch theirs := attachFilter(fd, p); {
		case theirs == nil && ours == nil:
			accepted++
		case errors.Is(theirs, unix.EINVAL) && ours != nil:
			refused++
		default:
			t.Fatalf("kernel: %v, Check: %v\n%s", theirs, ours, listing(p))
		}
	}
	if accepted != mostAccepted || refused < 1000 {
		t.Errorf("only %d programs accepted, %d refused", accepted, refused)
	}
}

// brokenProgram is a program of any instructions that the kernel knows, and a
// few that it does not.
func brokenProgram(random *rand.Rand) Program {
	p := make(Program, 1+random.IntN(8))
	for i := range p {
		in := Instruction{Op: uint16(random.UintN(256)), JT: uint8(random.UintN(5)), JF: uint8(random.UintN(5))}
		for random.UintN(16) != 0 && !in.known() {
			in.Op = uint16(random.UintN(256))
		}
		in.K = [...]uint32{0, 1, 2, 15, 16, 31, 32, 0x7000, 1 << 31, 0xfffff000, 0xffffffff}[random.UintN(11)]
		p[i] = in
	}
	if random.UintN(16) != 0 {
		p[len(p)-1] = Instruction{Op: retA}
	}
	return p
}

func listing(p Program) string {
	var b strings.Builder
	for pc := range p {
		b.WriteString(p.Text(pc) + "\n")
	}
	return b.String()
}
