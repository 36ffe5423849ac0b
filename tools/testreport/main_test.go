package main

import (
	"slices"
	"strings"
	"testing"
)

const passed = `{"Action":"run","Package":"grm/x","Test":"TestA"}
{"Action":"output","Package":"grm/x","Test":"TestA","Output":"noise\n"}
{"Action":"pass","Package":"grm/x","Test":"TestA","Elapsed":7}
{"Action":"output","Package":"grm/x","Output":"PASS\n"}
{"Action":"output","Package":"grm/x","Output":"ok  \tgrm/x\t7.0s\n"}
{"Action":"pass","Package":"grm/x","Elapsed":7}
`

func TestReport(t *testing.T) {
	for _, c := range []struct {
		name, in string
		strict   bool
		out, err string
	}{
		{"passes", passed, true, "    --- PASS: TestA (7.0s)\nok  \tgrm/x\t7.0s\n", ""},
		{"fails", `{"Action":"output","Package":"grm/x","Test":"TestB","Output":"why\n"}
{"Action":"fail","Package":"grm/x","Test":"TestB"}
{"Action":"output","Package":"grm/x","Output":"FAIL\tgrm/x\t1s\n"}
{"Action":"fail","Package":"grm/x"}`, false, "why\nFAIL\tgrm/x\t1s\n", "failed: grm/x, grm/x TestB"},
		{"does not build", `{"Action":"build-output","ImportPath":"grm/x","Output":"x.go:1: syntax\n"}
{"Action":"build-fail","ImportPath":"grm/x"}`, false, "x.go:1: syntax\n", "failed: grm/x (does not build)"},
		{"skips as root", passed + `{"Action":"output","Package":"grm/x","Test":"TestC","Output":"no rights\n"}
{"Action":"skip","Package":"grm/x","Test":"TestC"}`, true, "    --- PASS: TestA (7.0s)\nok  \tgrm/x\t7.0s\nno rights\n", "skipped, although run as root: grm/x TestC"},
		{"skips", passed + `{"Action":"skip","Package":"grm/x","Test":"TestC"}`, false,
			"    --- PASS: TestA (7.0s)\nok  \tgrm/x\t7.0s\nskipped, as they need root: 1\n", ""},
		{"nothing at all", "go: no such package\n", false, "go: no such package\n", "no package was tested"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			_, err := report(strings.NewReader(c.in), &out, c.strict)
			if out.String() != c.out {
				t.Errorf("told %q, want %q", out.String(), c.out)
			}
			if got := errText(err); got != c.err {
				t.Errorf("error %q, want %q", got, c.err)
			}
		})
	}
}

func TestAlone(t *testing.T) {
	for _, c := range []struct{ failed, want []string }{
		{[]string{"grm/x", "grm/x TestB", "grm/x TestB/part"}, []string{"grm/x TestB"}},
		{[]string{"grm/x", "grm/x TestB", "grm/y"}, nil}, // y did not get as far as its tests
		{[]string{"grm/x (does not build)"}, nil},
		{nil, nil},
	} {
		if got := alone(c.failed); !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, want %q", c.failed, got, c.want)
		}
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
