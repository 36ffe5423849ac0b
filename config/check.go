package config

import (
	"errors"
	"strings"
	"unicode"
	"unicode/utf8"
)

// problems are what was found so far.
type problems []*Problem

// add takes an error of a type that owns its text form, and says which key it was.
func (ps *problems) add(key string, err error) {
	var p *Problem
	if !errors.As(err, &p) {
		p = problemf("", "%v", err)
	}
	q := *p
	q.Key = key
	*ps = append(*ps, &q)
}

// err joins the problems, nil if there are none.
func (ps problems) err() error {
	errs := make([]error, len(ps))
	for i, p := range ps {
		errs[i] = p
	}
	return errors.Join(errs...)
}

// checkLine tells whether a text can stand on a line of a unit without quotes: no control characters, no backslash at
// its end (it would join the next line), no white space around it (it would be lost), valid by systemd's idea of UTF-8.
func checkLine(s string) error {
	if i := strings.IndexFunc(s, unicode.IsControl); i >= 0 {
		r, _ := utf8.DecodeRuneInString(s[i:])
		return problemf("leave it out", "control character %U at byte %d of %s", r, i+1, quote(s))
	}
	if strings.TrimSpace(s) != s {
		return problemf("leave it out", "white space around %s", quote(s))
	}
	if strings.HasSuffix(s, `\`) {
		return problemf("leave it out: a backslash at the end of a line joins it with the next", "backslash at the end of %s", quote(s))
	}
	return checkUnicode(s)
}

// checkUnicode refuses what systemd refuses in a line: bytes that are no UTF-8, and Unicode's non-characters.
func checkUnicode(s string) error {
	if !utf8.ValidString(s) {
		return problemf("leave it out", "%s is not UTF-8", quote(s))
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r >= 0xFDD0 && r <= 0xFDEF || r&0xFFFE == 0xFFFE }); i >= 0 {
		r, _ := utf8.DecodeRuneInString(s[i:])
		return problemf("leave it out: systemd refuses it", "%U, which is not a character, at byte %d of %s", r, i+1, quote(s))
	}
	return nil
}
