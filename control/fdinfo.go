package control

import (
	"bytes"
	"strconv"
)

// fdinfo finds a number in the text of /proc/self/fdinfo/N of a BPF map
// (kernel: bpf_map_show_fdinfo).
func fdinfo(text []byte, key string) (int, bool) {
	for line := range bytes.Lines(text) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != key {
			continue
		}
		n, err := strconv.Atoi(string(bytes.TrimSpace(value)))
		return n, err == nil
	}
	return 0, false
}
