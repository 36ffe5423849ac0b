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
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", s.Pid()))
	s.must(err)
	var rows [][]string // the names, and the numbers
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "Udp:" {
			rows = append(rows, fields)
		}
	}
	if len(rows) != 2 || len(rows[0]) != len(rows[1]) {
		s.Fatalf("no counters of UDP in\n%s", text)
	}
	n, err := strconv.ParseUint(rows[1][slices.Index(rows[0], "RcvbufErrors")], 10, 64)
	s.must(err)
	return n
}

// balanced fails the story unless each datagram of the box's only load is accounted for: it was answered, was taken by a server that was
// killed, one for each, since they have one socket and answer before they take another; was discarded; or found a full queue.
func (v *service) balanced(r load.Result, killed uint64) {
	v.s.Helper()
	discarded, overflow := v.discarded(), v.s.overflow()
	if least := discarded + overflow; r.Lost < least || r.Lost > least+killed || r.Moved+r.Duplicated+r.Strange != 0 {
		v.s.Errorf("%d servers were killed, %d datagrams discarded, %d found a queue full: %v", killed, discarded, overflow, r)
	}
}
