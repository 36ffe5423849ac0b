package config

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with a configuration: where it is, what is wrong, and what to do about it.
// Types that own their text form return it without a place; the reader of the file, or of the command line, adds that.
type Problem struct {
	File string // the file's name as it was given; empty for a command line
	Line int    // 1 is the first line; 0 is unknown
	Key  string // dotted, as in the file: "drain.idle", "listen[0].address"
	What string // the cause, lower case
	Hint string // what to do; may be empty
}

// Error is one line: file:line: key: cause (hint).
func (p *Problem) Error() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d", p.Line)
		}
		b.WriteString(": ")
	}
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.What)
	if p.Hint != "" {
		b.WriteString(" (" + p.Hint + ")")
	}
	return b.String()
}

// problemf makes a Problem that has no place yet.
func problemf(hint, format string, args ...any) *Problem {
	return &Problem{What: fmt.Sprintf(format, args...), Hint: hint}
}

// quote shows a value of the user's in a message: escaped, and cut when it is long.
func quote(s string) string {
	const limit = 64
	if len(s) > limit {
		return fmt.Sprintf("%q...", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}
