package unitgen

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// systemd takes a line of a unit in three steps, which is what the functions here undo: it splits the value at white
// space and takes quotes and C escapes away, then it expands %, and when it starts a command it expands $. The escapes
// come first, so % and $ cannot be written as \x25 and \x24: they are doubled.

// argument is one word of a command line.
func argument(s string) string {
	return quoted(strings.NewReplacer("%", "%%", "$", "$$").Replace(s))
}

// assignment is one variable of Environment=, where $ means nothing.
func assignment(name, value string) string {
	return quoted(specifiers(name + "=" + value))
}

// specifiers is a text in which % means nothing, for values that systemd does not split.
func specifiers(s string) string {
	return strings.ReplaceAll(s, "%", "%%")
}

// plain are the characters, besides letters and digits, of words that need no quotes.
const plain = "-_./:=@,+?&[]%$"

// quoted puts a word into quotes if it needs them: the kind that leaves more of it readable.
func quoted(s string) string {
	if s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(plain, r))
	}) < 0 {
		return s
	}
	quote := byte('"')
	if strings.Count(s, `"`) > strings.Count(s, `'`) {
		quote = '\''
	}
	var b strings.Builder
	b.WriteByte(quote)
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == rune(quote) || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == utf8.RuneError && n == 1, !unicode.IsPrint(r):
			// Byte by byte: systemd refuses a line with what is no character, but not its escape, and nobody is to be
			// deceived by what a terminal does with the others.
			for _, c := range []byte(s[i : i+n]) {
				fmt.Fprintf(&b, `\x%02x`, c)
			}
		default:
			b.WriteRune(r)
		}
		i += n
	}
	b.WriteByte(quote)
	return b.String()
}
