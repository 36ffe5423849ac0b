package config

import (
	"fmt"
	"math"
	"path"
	"strconv"
	"strings"

	"golang.org/x/net/bpf"
)

// MaxInstructions is the kernel's own limit for a classic BPF program.
const MaxInstructions = 4096

// Program is the classic BPF program of the cbpf dissector: a file, or the instructions themselves; the zero value is none.
// The text form is the file's absolute path, or the instructions as iptables writes them: "2,48 0 0 9,6 0 0 1".
type Program struct {
	File         string // absolute and clean; in one of the forms that bpf_asm and tcpdump write
	Instructions []bpf.RawInstruction
}

// IsZero tells whether there is no program.
func (p Program) IsZero() bool { return p.File == "" && len(p.Instructions) == 0 }

// UnmarshalText reads an absolute path, instructions in iptables' form, or "" for none.
func (p *Program) UnmarshalText(text []byte) error {
	s := string(text)
	if s == "" {
		*p = Program{}
		return nil
	}
	if s[0] >= '0' && s[0] <= '9' {
		texts := strings.Split(s, ",")
		n, err := strconv.Atoi(texts[0])
		if err != nil || n != len(texts)-1 || n == 0 {
			return problemf("write their number, then each after a comma: 2,48 0 0 9,6 0 0 1", "%s is not a number of instructions, %d of which follow", quote(texts[0]), len(texts)-1)
		}
		insns, err := parseInstructions(texts[1:])
		if err != nil {
			return err
		}
		*p = Program{Instructions: insns}
		return nil
	}
	if err := checkPath(s); err != nil {
		return err
	}
	*p = Program{File: s}
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (p Program) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// String is the text form.
func (p Program) String() string {
	if len(p.Instructions) == 0 {
		return p.File
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d", len(p.Instructions))
	for _, i := range p.Instructions {
		fmt.Fprintf(&b, ",%d %d %d %d", i.Op, i.Jt, i.Jf, i.K)
	}
	return b.String()
}

// parseInstructions reads one instruction from each text. Whether the kernel would take the program is for its
// translator to say, at activation.
func parseInstructions(texts []string) ([]bpf.RawInstruction, error) {
	if len(texts) > MaxInstructions {
		return nil, problemf(fmt.Sprintf("the kernel takes %d at most", MaxInstructions), "the program has %d instructions", len(texts))
	}
	insns := make([]bpf.RawInstruction, len(texts))
	for n, text := range texts {
		var err error
		if insns[n], err = parseInstruction(text); err != nil {
			return nil, problemf(programHint, "instruction %d: %v", n, err)
		}
	}
	return insns, nil
}

const programHint = "write instructions as tcpdump -ddd does, without its first line"

// parseInstruction reads four numbers: code, jt, jf, k.
func parseInstruction(s string) (insn bpf.RawInstruction, err error) {
	fields := strings.Fields(s)
	if len(fields) != 4 {
		return insn, fmt.Errorf("%s is not four numbers: code, jt, jf, k", quote(strings.TrimSpace(s)))
	}
	limits := [4]uint64{math.MaxUint16, math.MaxUint8, math.MaxUint8, math.MaxUint32}
	var v [4]uint64
	for i, f := range fields {
		if v[i], err = strconv.ParseUint(f, 0, 64); err != nil || v[i] > limits[i] {
			return insn, fmt.Errorf("%s is not a number from 0 to %d", quote(f), limits[i])
		}
	}
	return bpf.RawInstruction{Op: uint16(v[0]), Jt: uint8(v[1]), Jf: uint8(v[2]), K: uint32(v[3])}, nil
}

// checkPath tells whether a path is absolute, clean, and fit for a line of a unit.
func checkPath(s string) error {
	switch {
	case !path.IsAbs(s):
		return problemf("write an absolute path: a unit runs in a directory of systemd's choice", "%s is not an absolute path", quote(s))
	case path.Clean(s) != s:
		return problemf("write "+quote(path.Clean(s)), "%s is not a clean path", quote(s))
	}
	return checkLine(s)
}
