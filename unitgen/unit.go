package unitgen

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"grm/config"
)

// maxLine is the longest line that systemd reads, with what it continues.
const maxLine = 1<<20 - 1

// unit is a unit while it is written, section by section.
type unit struct {
	text  bytes.Buffer
	name  string            // of the section
	given config.Directives // what the TOML says in this section
	err   error             // the first one
}

// section begins a section. A directive that the TOML gives is left out where it would stand, and written at the end.
func (u *unit) section(name string, given config.Directives) {
	if u.text.Len() > 0 {
		u.text.WriteByte('\n')
	}
	u.text.WriteString("[" + name + "]\n")
	u.name, u.given = name, given
}

// end closes a section with what the TOML gives.
func (u *unit) end() {
	for _, key := range slices.Sorted(maps.Keys(u.given)) {
		if key == beforeOurs {
			continue
		}
		for _, value := range u.given[key] {
			u.line(key, value)
		}
	}
}

// beforeOurs is the one directive of the TOML that stands beside ours instead of in its place.
const beforeOurs = "ExecStartPre"

// set writes a directive, with a line for each value, under a comment that says what would fail without it.
func (u *unit) set(why, key string, values ...string) {
	if _, ok := u.given[key]; ok && key != beforeOurs || len(values) == 0 {
		return
	}
	if why != "" {
		u.comment(why)
	}
	for _, v := range values {
		u.line(key, v)
	}
}

// comment writes a text in lines of about a hundred characters.
func (u *unit) comment(text string) {
	const width = 100
	line := "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > width && line != "#" {
			u.text.WriteString(line + "\n")
			line = "#"
		}
		line += " " + word
	}
	u.text.WriteString(line + "\n")
}

// line writes one directive. Values come from a checked Service; what could break out of a line is refused all the same.
func (u *unit) line(key, value string) {
	text := key + "=" + value
	rest := strings.ReplaceAll(text, continued, "")
	switch {
	case strings.ContainsAny(rest, "\n\r\x00") || strings.HasSuffix(rest, `\`) || !utf8.ValidString(rest):
		u.fail(fmt.Errorf("[%s] %s=: %q does not fit on one line (leave out line ends, NULs, a backslash at the end, and what is not UTF-8)", u.name, key, value))
	case len(text) > maxLine:
		u.fail(fmt.Errorf("[%s] %s=: %d bytes are more than the %d that systemd reads (put a part into a file)", u.name, key, len(text), maxLine))
	default:
		u.text.WriteString(text + "\n")
	}
}

func (u *unit) fail(err error) {
	if u.err == nil {
		u.err = err
	}
}

// continued is a line end that is none for systemd.
const continued = " \\\n    "

// command is a command line over several lines: words that belong together on one of them.
type command []string

// add begins a line with these words, already quoted.
func (c *command) add(words ...string) { *c = append(*c, strings.Join(words, " ")) }

// arguments begins a line with these words, and quotes them.
func (c *command) arguments(words ...string) {
	for i, w := range words {
		words[i] = argument(w)
	}
	c.add(words...)
}

// String is short on one line, long on several.
func (c command) String() string {
	if one := strings.Join(c, " "); len(one) <= 100 {
		return one
	}
	return strings.Join(c, continued)
}
