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
	File         string // absolute and clean
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
		insns, err := ParseProgram(text)
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

// ParseProgram reads classic BPF in the forms that people have it in: tcpdump -ddd (a count, then "code jt jf k", on
// lines of their own or parted by commas), tcpdump -dd and bpf_asm -c ("{ 0x28, 0, 0, 0x0000000c },"). Text after
// # or // and C comments are left out. It checks the form and the count; whether the kernel would take the program is
// for its translator to say.
func ParseProgram(text []byte) ([]bpf.RawInstruction, error) {
	const hint = "write the output of tcpdump -ddd, tcpdump -dd or bpf_asm -c"
	s, err := withoutComments(string(text))
	if err != nil {
		return nil, err
	}
	braces := strings.Contains(s, "{")
	var items []string // one per instruction, "code jt jf k"
	if braces {
		for part := range strings.SplitSeq(s, "}") {
			before, inside, ok := strings.Cut(part, "{")
			if strings.Trim(before, ", \t\r\n") != "" {
				return nil, problemf(hint, "%s stands outside of the instructions", quote(strings.TrimSpace(before)))
			}
			if ok {
				items = append(items, strings.ReplaceAll(inside, ",", " "))
			}
		}
		if strings.Count(s, "{") != strings.Count(s, "}") {
			return nil, problemf(hint, "the braces of the program do not match")
		}
	} else {
		for item := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == '\n' || r == '\r' }) {
			if strings.TrimSpace(item) != "" {
				items = append(items, item)
			}
		}
	}
	if len(items) > 0 && !braces {
		if fields := strings.Fields(items[0]); len(fields) == 1 {
			n, err := strconv.ParseUint(fields[0], 10, 16)
			if err != nil {
				return nil, problemf(hint, "%s is not a number of instructions", quote(fields[0]))
			}
			items = items[1:]
			if int(n) != len(items) {
				return nil, problemf(hint, "the program says that it has %d instructions and has %d", n, len(items))
			}
		}
	}
	if len(items) == 0 {
		return nil, problemf(hint, "the program has no instructions")
	}
	if len(items) > MaxInstructions {
		return nil, problemf(fmt.Sprintf("the kernel takes %d at most", MaxInstructions), "the program has %d instructions", len(items))
	}
	insns := make([]bpf.RawInstruction, len(items))
	for n, item := range items {
		if insns[n], err = parseInstruction(item); err != nil {
			return nil, problemf(hint, "instruction %d: %v", n, err)
		}
	}
	return insns, nil
}

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

// withoutComments puts a space in the place of a C comment and ends lines at # and //.
func withoutComments(s string) (string, error) {
	var b strings.Builder
	for {
		before, rest, ok := strings.Cut(s, "/*")
		b.WriteString(before)
		if !ok {
			break
		}
		if _, s, ok = strings.Cut(rest, "*/"); !ok {
			return "", problemf("end it with */", "the program has a comment without an end")
		}
		b.WriteByte(' ')
	}
	lines := strings.Split(b.String(), "\n")
	for i, line := range lines {
		line, _, _ = strings.Cut(line, "#")
		lines[i], _, _ = strings.Cut(line, "//")
	}
	return strings.Join(lines, "\n"), nil
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
