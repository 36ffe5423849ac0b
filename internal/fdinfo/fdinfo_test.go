package fdinfo

import (
	"fmt"
	"testing"
)

func TestNoMap(t *testing.T) {
	for _, fd := range []int{0, -1} {
		if m, err := Read(fd); err == nil {
			t.Errorf("descriptor %d is %+v", fd, m)
		}
	}
}

// FuzzParse: sizes that stand there are found, whatever follows.
func FuzzParse(f *testing.F) {
	f.Add([]byte("pos:\t0\nvalue_size:\t4096\nmax_entries:\t1\n"), 12, 3)
	f.Add([]byte("value_size:"), 0, -1)
	f.Fuzz(func(t *testing.T, noise []byte, size, entries int) {
		if m, ok := parse(noise); ok && (m.ValueSize <= 0 || m.MaxEntries <= 0) {
			t.Fatalf("%q is %+v", noise, m)
		}
		text := append(fmt.Appendf(nil, "map_type:\t2\nvalue_size:\t%d\nmax_entries:\t%d\n", size, entries), noise...)
		if m, ok := parse(text); ok != (size > 0 && entries > 0) || ok && m != (Map{size, entries}) {
			t.Fatalf("%d and %d came back as %+v, %v", size, entries, m, ok)
		}
	})
}
