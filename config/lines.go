package config

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// maxDepth is how deep arrays, tables and dotted keys may be nested. A service needs 3; the TOML library recurses
// once a level, and a megabyte of brackets would exhaust the stack, which a program cannot survive.
const maxDepth = 16

// findLines tells on which line of a TOML document each key stands, for the messages: the TOML library knows positions
// only of syntax errors. Keys are joined by dots, elements of arrays that hold tables are counted: "listen[0].address".
//
// The document need not be valid. Where it is not, findLines stops, and the library will refuse it at that place. The
// only error is a document that is nested too deep for the library.
func findLines(doc []byte) (map[string]int, error) {
	f := &finder{
		src:    bytes.TrimPrefix(doc, []byte("\ufeff")),
		lines:  map[string]int{},
		tables: map[string]int{},
	}
	f.document()
	if f.tooDeep {
		return nil, &Problem{Line: f.line(), What: fmt.Sprintf("nested more than %d levels deep", maxDepth), Hint: "a service needs 3"}
	}
	return f.lines, nil
}

// finder walks over a document once.
type finder struct {
	src     []byte
	pos     int
	counted int // bytes of src whose line ends are in ended
	ended   int
	tooDeep bool
	lines   map[string]int // by key
	tables  map[string]int // how many [[…]] an array of tables has so far, by key
}

// line is the line of pos, counted from 1.
func (f *finder) line() int {
	f.ended += bytes.Count(f.src[f.counted:f.pos], []byte("\n"))
	f.counted = f.pos
	return f.ended + 1
}

// peek is the next byte, 0 at the end. A NUL is refused before anyone looks for lines.
func (f *finder) peek() byte {
	if f.pos < len(f.src) {
		return f.src[f.pos]
	}
	return 0
}

// eat steps over s if it is next.
func (f *finder) eat(s string) bool {
	if bytes.HasPrefix(f.src[f.pos:], []byte(s)) {
		f.pos += len(s)
		return true
	}
	return false
}

// blank steps over spaces and tabs.
func (f *finder) blank() {
	for f.peek() == ' ' || f.peek() == '\t' {
		f.pos++
	}
}

// space steps over white space, line ends and comments.
func (f *finder) space() {
	for {
		switch f.peek() {
		case ' ', '\t', '\r', '\n':
			f.pos++
		case '#':
			n := bytes.IndexByte(f.src[f.pos:], '\n')
			if n < 0 {
				f.pos = len(f.src)
				return
			}
			f.pos += n
		default:
			return
		}
	}
}

func (f *finder) document() {
	table := ""
	for {
		f.space()
		if f.pos == len(f.src) {
			return
		}
		if f.eat("[[") {
			line := f.line()
			parts, ok := f.key()
			if !ok || !f.eat("]]") {
				return
			}
			last := len(parts) - 1
			array := join(f.resolve(parts[:last], line), parts[last])
			f.note(array, line)
			table = fmt.Sprintf("%s[%d]", array, f.tables[array])
			f.tables[array]++
			f.note(table, line)
			continue
		}
		if f.eat("[") {
			line := f.line()
			parts, ok := f.key()
			if !ok || !f.eat("]") {
				return
			}
			table = f.resolve(parts, line)
			continue
		}
		if !f.pair(table, 0) {
			return
		}
	}
}

// resolve makes a header's key: parts that are arrays of tables stand for their last element.
func (f *finder) resolve(parts []string, line int) string {
	key := ""
	for _, p := range parts {
		key = join(key, p)
		f.note(key, line)
		if n := f.tables[key]; n > 0 {
			key = fmt.Sprintf("%s[%d]", key, n-1)
		}
	}
	return key
}

// note keeps the first line of a key.
func (f *finder) note(key string, line int) {
	if _, ok := f.lines[key]; !ok {
		f.lines[key] = line
	}
}

// pair steps over key = value, and tells whether it could.
func (f *finder) pair(table string, depth int) bool {
	line := f.line()
	parts, ok := f.key()
	if !ok || !f.eat("=") {
		return false
	}
	key := table
	for _, p := range parts {
		key = join(key, p)
		f.note(key, line)
	}
	f.blank()
	return f.value(key, depth+len(parts))
}

// value steps over a value.
func (f *finder) value(key string, depth int) bool {
	if depth > maxDepth {
		f.tooDeep = true
		return false
	}
	switch f.peek() {
	case '"', '\'':
		_, ok := f.quoted()
		return ok
	case '[':
		f.pos++
		for n := 0; ; n++ {
			f.space()
			if f.eat("]") {
				return true
			}
			element := fmt.Sprintf("%s[%d]", key, n)
			f.note(element, f.line())
			if !f.value(element, depth+1) {
				return false
			}
			f.space()
			if !f.eat(",") && f.peek() != ']' {
				return false
			}
		}
	case '{':
		f.pos++
		for {
			f.space()
			if f.eat("}") {
				return true
			}
			if !f.pair(key, depth+1) {
				return false
			}
			f.space()
			if !f.eat(",") && f.peek() != '}' {
				return false
			}
		}
	default: // a number, a date (which may have a space in it), true or false
		n := bytes.IndexAny(f.src[f.pos:], ",]}#\r\n")
		if n < 0 {
			n = len(f.src) - f.pos
		}
		f.pos += n
		return true
	}
}

// key steps over a dotted key and the blanks around it.
func (f *finder) key() (parts []string, ok bool) {
	for {
		f.blank()
		var part string
		if c := f.peek(); c == '"' || c == '\'' {
			if part, ok = f.quoted(); !ok {
				return nil, false
			}
		} else {
			start := f.pos
			for isBare(f.peek()) {
				f.pos++
			}
			if part = string(f.src[start:f.pos]); part == "" {
				return nil, false
			}
		}
		if parts = append(parts, part); len(parts) > maxDepth {
			f.tooDeep = true
			return nil, false
		}
		f.blank()
		if !f.eat(".") {
			return parts, true
		}
	}
}

// quoted steps over a string of any of the four kinds, and returns it without quotes and escapes.
func (f *finder) quoted() (string, bool) {
	start := f.pos
	mark := string(f.src[f.pos])
	if long := strings.Repeat(mark, 3); f.eat(long) {
		mark = long
	} else {
		f.pos++
	}
	for f.pos < len(f.src) {
		switch {
		case mark[0] == '"' && f.peek() == '\\':
			f.pos = min(f.pos+2, len(f.src))
		case f.eat(mark):
			// Up to two quotes more may stand directly before a long string's end.
			for n := 0; len(mark) == 3 && n < 2 && f.peek() == mark[0]; n++ {
				f.pos++
			}
			return unquote(f.src[start:f.pos], len(mark)), true
		case len(mark) == 1 && f.peek() == '\n':
			return "", false
		default:
			f.pos++
		}
	}
	return "", false
}

// unquote is the value of a string. Escapes are rare in keys, so the library does those.
func unquote(raw []byte, mark int) string {
	inner := raw[mark : len(raw)-mark]
	if raw[0] == '\'' || !bytes.ContainsRune(inner, '\\') || mark == 3 {
		return string(inner)
	}
	var v struct{ K string }
	if _, err := toml.Decode("K = "+string(raw), &v); err != nil {
		return string(inner) // the library will refuse the document for the same reason
	}
	return v.K
}

// isBare tells whether a byte may stand in a key without quotes.
func isBare(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == '-'
}

// join puts a part behind a dotted key; a part that is not bare is quoted.
func join(key, part string) string {
	bare := part != "" && utf8.ValidString(part)
	for i := range len(part) {
		bare = bare && isBare(part[i])
	}
	if !bare {
		part = quote(part)
	}
	if key == "" {
		return part
	}
	return key + "." + part
}
