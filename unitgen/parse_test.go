package unitgen

import (
	"fmt"
	"strconv"
	"strings"
)

// parsed is a unit as systemd reads it: values by "section.key", in order.
type parsed map[string][]string

// parseUnit reads a unit by systemd's rules: comments, continued lines, sections.
func parseUnit(text string) (parsed, error) {
	p := parsed{}
	section, continued := "", ""
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimLeft(line, " \t")
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		line = continued + line
		// A backslash that is not itself escaped joins the next line.
		if i := len(line) - len(strings.TrimRight(line, `\`)); i%2 == 1 {
			continued = line[:len(line)-1] + " "
			continue
		}
		continued = ""
		line = strings.TrimSpace(line)
		if line[0] == '[' && line[len(line)-1] == ']' {
			section = line[1 : len(line)-1]
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || section == "" {
			return nil, fmt.Errorf("line %d is neither a section nor an assignment: %q", n+1, line)
		}
		k := section + "." + strings.TrimSpace(key)
		p[k] = append(p[k], strings.TrimSpace(value))
	}
	return p, nil
}

// splitWords takes white space, quotes and escapes away.
func splitWords(s string) ([]string, error) {
	var words []string
	for {
		s = strings.TrimLeft(s, " \t\n\r")
		if s == "" {
			return words, nil
		}
		var w strings.Builder
		quote := byte(0)
		for ; s != "" && (quote != 0 || !strings.ContainsRune(" \t\n\r", rune(s[0]))); s = s[1:] {
			switch c := s[0]; {
			case c == quote:
				quote = 0
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
			case c == '\\':
				if len(s) < 2 {
					return nil, fmt.Errorf("backslash at the end")
				}
				s = s[1:]
				switch s[0] {
				case 'n':
					w.WriteByte('\n')
				case 't':
					w.WriteByte('\t')
				case '\\', '"', '\'':
					w.WriteByte(s[0])
				case 'x':
					if len(s) < 3 {
						return nil, fmt.Errorf("short escape %q", s)
					}
					b, err := strconv.ParseUint(s[1:3], 16, 8)
					if err != nil || b == 0 {
						return nil, fmt.Errorf("bad escape %q", s[:3])
					}
					w.WriteByte(byte(b))
					s = s[2:]
				default:
					return nil, fmt.Errorf("unknown escape %q", s[:1])
				}
			default:
				w.WriteByte(c)
			}
		}
		if quote != 0 {
			return nil, fmt.Errorf("quote without an end")
		}
		words = append(words, w.String())
	}
}

// single makes one of each doubled character, and refuses those that are not doubled.
func single(s string, c string) (string, error) {
	rest := strings.ReplaceAll(s, c+c, "")
	if strings.Contains(rest, c) {
		return "", fmt.Errorf("%q has a lone %s", s, c)
	}
	return strings.ReplaceAll(s, c+c, c), nil
}

// commandLine is what a command of a unit is started with.
func commandLine(value string) ([]string, error) {
	words, err := splitWords(value)
	for i := range words {
		if err == nil {
			words[i], err = single(words[i], "%")
		}
		if err == nil {
			words[i], err = single(words[i], "$")
		}
	}
	return words, err
}
