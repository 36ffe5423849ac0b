package cbpf

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Parse reads a program in one of two forms, found out by the first
// instruction: C initialisers, as `bpf_asm -c` and `tcpdump -dd` write them
//
//	{ 0x28, 0, 0, 0x0000000c },
//
// or decimal numbers, one instruction a line (`tcpdump -ddd`) or after a comma
// (`bpf_asm`), with an optional first line that says how many there are
//
//	2
//	40 0 0 12
//	22 0 0 0
//
// Comments are #, // and /* */. The program is not checked, only bounded.
func Parse(text []byte) (Program, error) {
	clean, err := stripComments(string(text))
	if err != nil {
		return nil, err
	}
	var p Program
	if strings.Contains(clean, "{") {
		p, err = parseC(clean)
	} else {
		p, err = parseDecimal(clean)
	}
	if err == nil && len(p) == 0 {
		err = errors.New("classic program: no instruction found (want the output of bpf_asm -c or tcpdump -ddd)")
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// stripComments replaces comments by blanks and keeps the line breaks, so that
// errors can name lines.
func stripComments(text string) (string, error) {
	var b strings.Builder
	for line := 1; text != ""; {
		switch {
		case strings.HasPrefix(text, "/*"):
			end := strings.Index(text, "*/")
			if end < 0 {
				return "", lineError(line, errors.New("comment has no end (write */)"))
			}
			breaks := strings.Count(text[:end], "\n")
			b.WriteString(" " + strings.Repeat("\n", breaks))
			line += breaks
			text = text[end+2:]
		case text[0] == '#', strings.HasPrefix(text, "//"):
			end := strings.IndexByte(text, '\n')
			if end < 0 {
				end = len(text)
			}
			text = text[end:]
		default:
			if text[0] == '\n' {
				line++
			}
			b.WriteByte(text[0])
			text = text[1:]
		}
	}
	return b.String(), nil
}

// parseC reads { code, jt, jf, k }, with or without a comma between two.
func parseC(text string) (Program, error) {
	var p Program
	errorAt := func(rest string, format string, args ...any) error {
		rest = strings.TrimLeft(rest, " \t\r\n")
		return lineError(1+strings.Count(text[:len(text)-len(rest)], "\n"), fmt.Errorf(format, args...))
	}
	for rest := text; ; {
		between, inside, ok := strings.Cut(rest, "{")
		if b := strings.TrimSpace(between); b != "" && (b != "," || len(p) == 0) {
			return nil, errorAt(rest, "%s is not an instruction (want { code, jt, jf, k },)", quote(b))
		}
		if !ok {
			return p, nil
		}
		inside, rest, ok = strings.Cut(inside, "}")
		if !ok {
			return nil, errorAt(inside, "{ without }")
		}
		if err := p.add(strings.Split(strings.TrimSuffix(strings.TrimSpace(inside), ","), ","), 0); err != nil {
			return nil, errorAt(inside+"}"+rest, "%w", err)
		}
	}
}

// parseDecimal reads "code jt jf k", separated by line breaks or commas.
func parseDecimal(text string) (Program, error) {
	var p Program
	count, counted := uint64(0), false
	for i, row := range strings.Split(text, "\n") {
		for record := range strings.SplitSeq(row, ",") {
			fields := strings.Fields(record)
			if len(fields) == 0 {
				continue
			}
			if len(fields) == 1 && len(p) == 0 && !counted {
				var err error
				if count, err = strconv.ParseUint(fields[0], 10, 16); err != nil {
					return nil, lineError(i+1, fmt.Errorf("%s is not a number of instructions", quote(fields[0])))
				}
				counted = true
				continue
			}
			if err := p.add(fields, 10); err != nil {
				return nil, lineError(i+1, err)
			}
		}
	}
	if counted && uint64(len(p)) != count {
		return nil, fmt.Errorf("classic program: %d instructions announced, %d found (is the file cut off?)", count, len(p))
	}
	return p, nil
}

func lineError(line int, err error) error {
	return fmt.Errorf("classic program: line %d: %w", line, err)
}

// add appends the instruction whose four numbers are fields.
func (p *Program) add(fields []string, base int) error {
	if len(*p) == MaxInstructions {
		return fmt.Errorf("more than the %d instructions that the kernel takes", MaxInstructions)
	}
	if len(fields) != 4 {
		return fmt.Errorf("instruction %d has %d fields (want 4: code, jt, jf, k)", len(*p), len(fields))
	}
	var n [4]uint64
	for i, name := range [4]string{"code", "jt", "jf", "k"} {
		field := strings.TrimSpace(fields[i])
		v, err := strconv.ParseUint(field, base, [4]int{16, 8, 8, 32}[i])
		if err != nil {
			return fmt.Errorf("instruction %d: %s %s: %w", len(*p), name, quote(field), errors.Unwrap(err))
		}
		n[i] = v
	}
	*p = append(*p, Instruction{Op: uint16(n[0]), JT: uint8(n[1]), JF: uint8(n[2]), K: uint32(n[3])})
	return nil
}

// quote keeps what an error repeats of a foreign text short and printable.
func quote(s string) string {
	const longest = 24
	if len(s) > longest {
		return strconv.Quote(s[:longest]) + "…"
	}
	return strconv.Quote(s)
}
