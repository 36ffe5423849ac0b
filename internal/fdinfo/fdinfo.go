// Package fdinfo tells the sizes of a BPF map from /proc/self/fdinfo, which
// needs no privilege and no bpf(2). Whoever maps a map has to know them: mmap(2)
// refuses a length beyond its end.
package fdinfo

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// Map is what fdinfo says of a BPF map.
type Map struct {
	ValueSize  int
	MaxEntries int
}

// Read tells the sizes of the map behind fd, which stays the caller's. It fails
// if fd is something else.
func Read(fd int) (Map, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return Map{}, err
	}
	m, ok := parse(text)
	if !ok {
		return Map{}, fmt.Errorf("descriptor %d is no BPF map", fd)
	}
	return m, nil
}

// parse reads what bpf_map_show_fdinfo in the kernel writes.
func parse(text []byte) (Map, bool) {
	size, ok := number(text, "value_size")
	entries, ok2 := number(text, "max_entries")
	return Map{ValueSize: size, MaxEntries: entries}, ok && ok2
}

func number(text []byte, key string) (int, bool) {
	for line := range bytes.Lines(text) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != key {
			continue
		}
		n, err := strconv.Atoi(string(bytes.TrimSpace(value)))
		return n, err == nil && n > 0
	}
	return 0, false
}
