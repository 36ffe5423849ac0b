package bpfprog

import (
	"embed"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	"grm/control"
	"grm/internal/flowtable"
)

//go:embed c/*.h
var headers embed.FS

func header(t *testing.T, name string) string {
	return string(must(headers.ReadFile("c/" + name))(t))
}

// The Go table of counters is the C enum.
func TestCounterNames(t *testing.T) {
	text := header(t, "group.h")
	_, text, _ = strings.Cut(text, "enum grm_counter {")
	text, _, _ = strings.Cut(text, "};")
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^\tGRM_([A-Z_]+),`).FindAllStringSubmatch(text, -1) {
		names = append(names, strings.ToLower(m[1]))
	}
	want(t, "last", names[len(names)-1], "counters")
	names = names[:len(names)-1]
	want(t, "counters", len(names), int(counterCount))
	for i, name := range names {
		want(t, "name", Counter(i).String(), name)
		want(t, name+" has a text", Counter(i).Info().Help != "", true)
	}
	want(t, "one too many", counterCount.String(), "counter_14")
}

// What C and Go both define is the same.
func TestLayouts(t *testing.T) {
	want(t, "bucket", unsafe.Sizeof(steerFlowBucket{}), flowtable.BucketSize)
	text := header(t, "control.h") + header(t, "group.h") + header(t, "flow.h")
	for name, value := range map[string]string{
		"GRM_LAYOUT": "1", "GRM_GROUP_LAYOUT": "1", "GRM_BANKS": "32", "GRM_SLOTS": "256", "GRM_FALLBACK": "12",
		"GRM_APPS": "16", "FLOW_WAYS": "8", "FLOW_YOUNG": "10", "GRM_STATS_OFFSET": "4096",
	} {
		m := regexp.MustCompile(`(?m)^#define ` + name + ` (\d+)`).FindStringSubmatch(text)
		if m == nil || m[1] != value {
			t.Errorf("%s: %v in C, %s in Go", name, m, value)
		}
	}
	for _, ok := range []bool{control.Layout == 1, groupLayout == 1, control.Banks == 32, control.Slots == 256, control.Fallback == 12,
		Apps == 16, flowtable.Ways == 8, flowtable.Young == 10} {
		want(t, "Go's constants are those of the table above", ok, true)
	}
}
