package model

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"grm/bpfprog/cbpf"
	"grm/control"
)

// TestConstants: what the programs and the model both have a number for is the
// same number.
func TestConstants(t *testing.T) {
	for file, lines := range map[string][]string{
		"group.h": {
			"#define GRM_APPS " + strconv.Itoa(cbpf.MaxApps),
			"#define GRM_NAMES " + strconv.Itoa(Names),
			"#define GRM_COOKIE_CHECK(serial, index) (1 + ((serial) + (index)) % 7)",
			" * A cookie is what a server puts into its packets: index << 8 | check << 5 |\n * name.",
		},
		"select.h": {
			"#define NEIGHBOURS " + strconv.Itoa(neighbours),
			"at = (__u64)(md->hash * 0x" + strconv.FormatUint(secondPlace, 16) + "u) * n >> 32;",
		},
		"control.h": {
			"#define GRM_BANKS " + strconv.Itoa(control.Banks),
			"#define GRM_FALLBACK " + strconv.Itoa(control.Fallback),
		},
	} {
		source, err := os.ReadFile("../c/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range lines {
			if !strings.Contains(string(source), line) {
				t.Errorf("%s has no %q", file, line)
			}
		}
	}
	source, err := os.ReadFile("../c/group.h")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []Event{DroppedClosing, DroppedNoSocket, DeadSlot, StaleFlow, BadCookie, CBPFError, BadApp, AppGone} {
		if !strings.Contains(string(source), "GRM_"+strings.ToUpper(string(e))+",") {
			t.Errorf("the programs count no %s", e)
		}
	}
}
