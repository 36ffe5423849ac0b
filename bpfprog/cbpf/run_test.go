package cbpf

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"golang.org/x/net/bpf"
)

const (
	ipv4 = 0x0800
	ipv6 = 0x86dd
)

// newRandom is a source of random numbers; a failed test names its seed, and
// $GRM_SEED makes the next one use it.
func newRandom(t *testing.T) *rand.Rand {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("GRM_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("GRM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func TestRun(t *testing.T) {
	packet := []byte{0xca, 0xfe, 0x45, 0x80, 1, 2, 3, 4}
	for name, test := range map[string]struct {
		program Program
		want    Result
	}{
		"ldh":            {twoBytes, 0xcafe},
		"ldb":            {Program{{Op: ldb, K: 7}, {Op: retA}}, 4},
		"ld":             {Program{{Op: ld, K: 4}, {Op: retA}}, 0x01020304},
		"ldh over end":   {Program{{Op: ldh, K: 7}, {Op: retA}}, Outside},
		"ldb at end":     {Program{{Op: ldb, K: 8}, {Op: retA}}, Outside},
		"[x + 2]":        {Program{{Op: ldxImm, K: 4}, {Op: ldhx, K: 2}, {Op: retA}}, 0x0304},
		"[x + -4]":       {Program{{Op: ldxImm, K: 4}, {Op: ldhx, K: 1<<32 - 4}, {Op: retA}}, 0xcafe},
		"[x + -5]":       {Program{{Op: ldxImm, K: 4}, {Op: ldhx, K: 1<<32 - 5}, {Op: retA}}, Outside},
		"[x] far":        {Program{{Op: ldxImm, K: 1<<32 - 1}, {Op: ldx4}, {Op: retA}}, Outside},
		"msh":            {Program{{Op: ldxMsh, K: 2}, {Op: txa}, {Op: retA}}, 20},
		"msh outside":    {Program{{Op: ldxMsh, K: 8}, {Op: retA}}, Outside},
		"len":            {Program{{Op: ldLen}, {Op: retA}}, 8},
		"lenx":           {Program{{Op: ldxLen}, {Op: txa}, {Op: retA}}, 8},
		"protocol":       {Program{{Op: ldh, K: protocol}, {Op: retA}}, ipv6},
		"ret k":          {Program{{Op: retK, K: 0xffffffff}}, 0xffffffff},
		"M":              {Program{{Op: ldImm, K: 9}, {Op: st, K: 15}, {Op: ldxMem, K: 15}, {Op: ldImm}, {Op: txa}, {Op: retA}}, 9},
		"neg":            {Program{{Op: ldImm, K: 1}, {Op: neg}, {Op: retA}}, 0xffffffff},
		"div x":          {Program{{Op: ldImm, K: 9}, {Op: div | 8}, {Op: retA}}, ByZero},
		"lsh x by 33":    {Program{{Op: ldxImm, K: 33}, {Op: ldImm, K: 1}, {Op: lsh | 8}, {Op: retA}}, 2},
		"jset":           {Program{{Op: ldb, K: 3}, {Op: jset, K: 0x80, JF: 1}, {Op: retK, K: 1}, {Op: retK, K: 2}}, 1},
		"jumps, not all": {Program{{Op: ja, K: 1}, {Op: ldb, K: 99}, {Op: add, K: 3}, {Op: and, K: 2}, {Op: retA}}, 2},
	} {
		if err := Check(test.program); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := test.program.Run(packet, ipv6, nil); got != test.want {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

func TestRunStep(t *testing.T) {
	var got string
	twoBytes.Run([]byte{1, 2}, ipv4, func(pc int, a, x uint32) {
		got += fmt.Sprintf("%d %s a=%d x=%d; ", pc, twoBytes.Text(pc), a, x)
	})
	if want := "0 ldh [0] a=0 x=0; 1 ret a a=258 x=0; "; got != want {
		t.Errorf("got %s", got)
	}
}

func TestVerdict(t *testing.T) {
	for v, want := range map[Verdict]string{
		0: "cookie 0x0000", 0xffff: "cookie 0xffff", 0x10000: "new flow (0x10000)", 0xffffffff: "new flow (0xffffffff)",
		0x80000000: "new flow of app 0", 0x8000000f: "new flow of app 15", 0x80000010: "new flow (0x80000010)",
	} {
		if v.String() != want {
			t.Errorf("0x%x: got %s, want %s", uint32(v), v, want)
		}
	}
	if app, ok := Verdict(0x8000000f).App(); app != 15 || !ok {
		t.Errorf("app 15: %d, %v", app, ok)
	}
	if _, ok := Verdict(0x80000010).App(); ok {
		t.Error("app 16 exists")
	}
	if Result(0xffffffff).Failed() || !Outside.Failed() || !ByZero.Failed() {
		t.Error("Failed is wrong")
	}
	for r, want := range map[Result]string{7: "cookie 0x0007", Outside: "load outside of the packet", ByZero: "division by zero", 9 << 32: "result 0x900000000"} {
		if r.String() != want {
			t.Errorf("got %s, want %s", r, want)
		}
	}
}

// randomProgram passes Check. reference says that golang.org/x/net/bpf does all
// of it as the kernel does: it knows no neg and no protocol, takes ldx #len for
// ld #len, shifts by more than 31 bits give 0 there, and X + K does not wrap.
func randomProgram(random *rand.Rand) (p Program, reference bool) {
	reference = true
	number := func() uint32 {
		if random.UintN(2) == 0 {
			return random.Uint32()
		}
		return random.Uint32N(64)
	}
	// Words that are written at the start may be read everywhere.
	words := random.Uint32N(scratchWords) + 1
	for k := range words {
		p = append(p, Instruction{Op: [2]uint16{st, stx}[random.UintN(2)], K: k})
	}
	for n := 1 + random.IntN(60); n > 0; n-- {
		// Loads are what a filter is for.
		switch random.UintN(14) {
		case 0, 1, 2, 3:
			p = append(p, Instruction{Op: [3]uint16{ldb, ldh, ld}[random.UintN(3)], K: random.Uint32N(48)})
		case 4, 5:
			in := Instruction{Op: [3]uint16{ldbx, ldhx, ldx4}[random.UintN(3)], K: random.Uint32N(24)}
			if random.UintN(4) == 0 {
				in.K, reference = -in.K, false
			}
			p = append(p, Instruction{Op: and, K: 31}, Instruction{Op: tax}, in)
		case 6:
			p = append(p, Instruction{Op: ldxMsh, K: random.Uint32N(48)})
		case 7:
			p = append(p, Instruction{Op: [3]uint16{ldImm, ldxImm, ldLen}[random.UintN(3)], K: number()})
		case 8:
			p = append(p, Instruction{Op: [4]uint16{ldMem, ldxMem, st, stx}[random.UintN(4)], K: random.Uint32N(words)})
		case 9, 10:
			p = append(p, Instruction{Op: [2]uint16{tax, txa}[random.UintN(2)]})
			for op := range aluNames {
				in := Instruction{Op: 0x04 | op | uint16(random.UintN(2))<<3, K: number()}
				shift := op == lsh&0xf0 || op == 0x70
				switch {
				case shift && in.fromX():
					reference = false
				case shift:
					in.K &= 31
				case in.K == 0:
					in.K = 1
				}
				p = append(p, in)
				break
			}
		case 11:
			if random.UintN(3) == 0 {
				p = append(p, [...]Instruction{{Op: neg}, {Op: ldh, K: protocol}, {Op: ldxLen}}[random.UintN(3)])
				reference = false
			}
		default:
			in := Instruction{Op: 0x05 | uint16(random.UintN(5))<<4 | uint16(random.UintN(2))<<3, K: number(), JT: uint8(random.UintN(6)), JF: uint8(random.UintN(6))}
			if in.op() == 0 {
				in = Instruction{Op: ja, K: random.Uint32N(6)}
			}
			p = append(p, in)
		}
		if random.UintN(30) == 0 {
			p = append(p, Instruction{Op: [2]uint16{retA, retK}[random.UintN(2)], K: number()})
		}
	}
	// Wherever the last jumps go.
	for range 8 {
		p = append(p, Instruction{Op: retA})
	}
	return p, reference
}

// randomPacket is mostly of small numbers, so that computed offsets hit it.
func randomPacket(random *rand.Rand) []byte {
	packet := make([]byte, random.IntN(80))
	for i := range packet {
		packet[i] = byte(random.UintN(256))
		if random.UintN(2) == 0 {
			packet[i] &= 31
		}
	}
	return packet
}

// checkReference compares Run with golang.org/x/net/bpf, for which all failures
// are 0. Its X + K does not wrap, as the kernel's does: a run in which that
// counts is left out.
func checkReference(t *testing.T, p Program, packet []byte, got Result) {
	t.Helper()
	wraps := false
	p.Run(packet, ipv4, func(pc int, _, x uint32) {
		in := p[pc]
		indirect := in.Op&0x07 == 0 && in.Op&0xe0 == 0x40
		wraps = wraps || indirect && uint64(x)+uint64(in.K) > math.MaxUint32
	})
	if wraps {
		return
	}
	raw := make([]bpf.RawInstruction, len(p))
	for i, in := range p {
		raw[i] = bpf.RawInstruction{Op: in.Op, Jt: in.JT, Jf: in.JF, K: in.K}
	}
	instructions, all := bpf.Disassemble(raw)
	if !all {
		t.Fatalf("golang.org/x/net/bpf does not know all of\n%s", listing(p))
	}
	vm, err := bpf.NewVM(instructions)
	if err != nil {
		t.Fatal(err)
	}
	want, err := vm.Run(packet)
	if err != nil {
		t.Fatal(err)
	}
	if got.Failed() {
		got = 0
	}
	if got != Result(want) {
		t.Fatalf("Run gave %v, golang.org/x/net/bpf 0x%x\npacket %x\n%s", got, want, packet, listing(p))
	}
}

func TestRunAsReference(t *testing.T) {
	random := newRandom(t)
	for range 500 {
		p, reference := randomProgram(random)
		if err := Check(p); err != nil {
			t.Fatalf("%v\n%s", err, listing(p))
		}
		for range 20 {
			packet := randomPacket(random)
			got := p.Run(packet, ipv4, nil)
			if reference {
				checkReference(t, p, packet, got)
			}
		}
	}
}

// FuzzRun: a checked program ends, whatever it is and whatever the packet, and
// in at most as many steps as it has instructions.
func FuzzRun(f *testing.F) {
	f.Add([]byte{0x28, 0, 0, 0, 0, 0, 0, 0, 0x16, 0, 0, 0, 0, 0, 0, 0}, []byte{1, 2})
	f.Fuzz(func(t *testing.T, code, packet []byte) {
		var p Program
		for len(code) >= 8 {
			p = append(p, Instruction{binary.LittleEndian.Uint16(code), code[2], code[3], binary.LittleEndian.Uint32(code[4:])})
			code = code[8:]
		}
		if Check(p) != nil {
			return
		}
		steps := 0
		p.Run(packet, ipv4, func(int, uint32, uint32) { steps++ })
		if steps > len(p) {
			t.Fatalf("%d steps for %d instructions", steps, len(p))
		}
		if _, err := Compile(p, SkReuseport, "cbpf"); err != nil && len(p) < 1000 {
			t.Fatal(err)
		}
	})
}
