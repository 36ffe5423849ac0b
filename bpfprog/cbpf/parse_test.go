package cbpf

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// twoBytes returns the first two bytes of the payload.
var twoBytes = Program{{Op: 0x28}, {Op: 0x16}}

func TestParse(t *testing.T) {
	for name, text := range map[string]string{
		"bpf_asm -c":          "{ 0x28,  0,  0, 0000000000 },\n{ 0x16,  0,  0, 0000000000 },\n",
		"one line, no commas": "{0x28,0,0,0}{0x16,0,0,0}",
		"no comma at the end": "{ 0x28, 0, 0, 0x0 },\n{ 22, 0, 0, 0, }",
		"comments":            "# a\n/* b {\n */ { 0x28, 0, 0, 0 }, // c }\n{ 0x16, 0, 0, 0 },",
		"tcpdump -ddd":        "2\n40 0 0 0\n22 0 0 0\n",
		"bpf_asm":             "2,40 0 0 0,22 0 0 0,\n",
		"no count":            "40 0 0 0\r\n\r\n22 0 0 0",
	} {
		p, err := Parse([]byte(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !slices.Equal(p, twoBytes) {
			t.Errorf("%s: got %v", name, p)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                                 "no instruction found",
		"0\n":                              "no instruction found",
		"ldh [0]\nret a":                   `line 1: instruction 0 has 2 fields`,
		"\nret\n":                          `line 2: "ret" is not a number of instructions`,
		"3\n40 0 0 0\n22 0 0 0":            "3 instructions announced, 2 found",
		"1\n40 0 0 0\n22 0 0 0":            "1 instructions announced, 2 found",
		"40 0 0 0\n22 0 0":                 "line 2: instruction 1 has 3 fields",
		"0x28 0 0 0":                       `line 1: instruction 0: code "0x28": invalid syntax`,
		"40 256 0 0":                       `jt "256": value out of range`,
		"40 0 0 -1":                        `k "-1": invalid syntax`,
		"{ 0x28, 0, 0 },":                  "line 1: instruction 0 has 3 fields",
		"{ 0x28, 0, 0, 0 },\n\n{ 0x16, 0,": "line 3: { without }",
		"{ 0x28, 0, 0, 0 }\n40 0 0 0":      `line 2: "40 0 0 0" is not an instruction`,
		", { 0x28, 0, 0, 0 }":              `line 1: "," is not an instruction`,
		"{ 0x28, 0, 0, 0 },\n\n{\n\n0x100000, 0,0,0 }": `line 5: instruction 1: code "0x100000": value out of range`,
		"\n/* 40 0 0 0":                                "line 2: comment has no end",
		"\x00" + strings.Repeat("x", 100):              `"\x00xxxxxxxxxxxxxxxxxxxxxxx"…`,
		strings.Repeat("6 0 0 0\n", MaxInstructions+1): "line 4097: more than the 4096 instructions",
	} {
		p, err := Parse([]byte(text))
		if err == nil {
			t.Errorf("%.40q: parsed as %v", text, p)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q:\ngot  %v\nwant %s", text, err, want)
		}
	}
}

func decimal(p Program) string {
	text := fmt.Sprintln(len(p))
	for _, in := range p {
		text += fmt.Sprintln(in.Op, in.JT, in.JF, in.K)
	}
	return text
}

// FuzzParse: what is parsed, written in either form and parsed again is the
// same, and neither checking nor naming its instructions panics.
func FuzzParse(f *testing.F) {
	f.Add([]byte(twoBytes.String()))
	f.Add([]byte(decimal(twoBytes)))
	f.Add([]byte("2,40 0 0 4294963200,22 0 0 0,"))
	f.Add([]byte("/* */ { 0xffff, 255, 0xff, 0xffffffff } # "))
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse(text)
		if err != nil {
			return
		}
		for _, text := range []string{p.String(), decimal(p)} {
			if again, err := Parse([]byte(text)); err != nil || !slices.Equal(p, again) {
				t.Fatalf("%v became %v (%v)", p, again, err)
			}
		}
		_ = Check(p)
		for pc := range p {
			if p.Text(pc) == "" {
				t.Fatalf("instruction %+v has no text", p[pc])
			}
		}
	})
}
