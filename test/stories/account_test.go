package stories

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
)

// What the stories of failures have in common: where datagrams may stay, and who else is built for them.

// buildTools builds the programs that things go wrong with, which an operator does not have: into "test" beside grm's.
var buildTools = sync.OnceValue(func() error {
	return install.Build(context.Background(), filepath.Join(bin, "test"), "./test/fault", "./test/server")
})

// overflow is how many datagrams found a full queue in the box, ever.
func (s *story) overflow() uint64 {
	s.Helper()
	return s.count("RcvbufErrors")
}

// refused is how many datagrams found no socket in the box, ever.
func (s *story) refused() uint64 {
	s.Helper()
	return s.count("NoPorts")
}

// count is one of the counters of udp.
func (s *story) count(name string) uint64 {
	s.Helper()
	n, err := strconv.ParseUint(s.udp()[name], 10, 64)
	s.must(err)
	return n
}

// udp is what the kernel has counted in the box's network.
func (s *story) udp() map[string]string {
	s.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", s.Pid()))
	s.must(err)
	var rows [][]string // the names, and the numbers
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "Udp:" {
			rows = append(rows, fields[1:])
		}
	}
	if len(rows) != 2 || len(rows[0]) != len(rows[1]) {
		s.Fatalf("no counters of UDP in\n%s", text)
	}
	counters := map[string]string{}
	for i, name := range rows[0] {
		counters[name] = rows[1][i]
	}
	return counters
}

// counters logs who could know where a datagram went: the kernel's counters and the programs'.
func (s *story) counters() {
	s.Helper()
	softnet, _ := os.ReadFile("/proc/net/softnet_stat") // the second column of it: what a CPU's queue had no room for
	metrics, err := s.Exec(box.BinDir+"/grm", "metrics")
	lines := slices.DeleteFunc(strings.Split(metrics, "\n"), func(line string) bool { return strings.HasPrefix(line, "#") || strings.HasSuffix(line, " 0") })
	s.Logf("counters: UDP %v\nsoftnet\n%s%s (%v)", s.udp(), softnet, strings.Join(lines, "\n"), err)
}

// balanced fails the story unless each datagram of the box's only load is accounted for: it was answered, was taken by a server that was
// killed, one for each, since they have one socket and answer before they take another; was discarded; or found a full queue.
func (v *service) balanced(r load.Result, killed uint64) {
	v.s.Helper()
	v.balancedBut(r, killed, 0)
}

// balancedBut is balanced where so many datagrams perished with sockets that nobody held any more.
func (v *service) balancedBut(r load.Result, killed, perished uint64) {
	v.s.Helper()
	discarded, overflow := v.discarded(), v.s.overflow()
	if least := discarded + overflow + perished; r.Lost < least || r.Lost > least+killed || r.Moved+r.Duplicated+r.Strange != 0 {
		v.s.counters()
		v.s.Errorf("%d servers were killed, %d datagrams discarded, %d found a queue full, %d perished: %v", killed, discarded, overflow, perished, r)
	}
}
