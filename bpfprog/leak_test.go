package bpfprog

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// inventory is how many there are of what generations use: descriptors of this
// process, pins, names of cookies and full slots of the group, sockets of the
// network namespace, and pages of memory.
func (r *rig) inventory() map[string]int {
	t := r.t
	runtime.GC()
	has := map[string]int{"descriptors": len(must(os.ReadDir("/proc/self/fd"))(t))}
	check(t, filepath.WalkDir(bpffs, func(_ string, _ fs.DirEntry, err error) error {
		has["pins"]++
		return err
	}))
	for _, n := range r.Names() {
		if n.Used {
			has["names"]++
		}
	}
	var key, next uint32
	var cookie uint64
	for at := any(nil); r.slots.NextKey(at, &next) == nil; at = &key {
		if key = next; r.slots.Lookup(key, &cookie) == nil {
			has["slots"]++
		}
	}
	for line := range strings.Lines(string(must(os.ReadFile("/proc/thread-self/net/sockstat"))(t))) {
		if fields := strings.Fields(line); fields[0] == "UDP:" {
			has["sockets"] = must(strconv.Atoi(fields[2]))(t)
		}
	}
	pages := strings.Fields(string(must(os.ReadFile("/proc/self/statm"))(t)))
	has["pages"] = must(strconv.Atoi(pages[1]))(t)
	return has
}

// leaks fails the test if there is more now than there was. The heap and the
// runtime's threads may have grown by a few megabytes for good.
func (r *rig) leaks(before map[string]int) {
	r.t.Helper()
	after := r.inventory()
	for _, what := range slices.Sorted(maps.Keys(after)) {
		slack := 0
		if what == "pages" {
			slack = 16 << 20 / os.Getpagesize()
		}
		if after[what] > before[what]+slack {
			r.t.Errorf("%s: %d before, %d after", what, before[what], after[what])
		}
	}
}
