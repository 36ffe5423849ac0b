package stories

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestUnboundUnderDnsperf restarts an unmodified server of Debian's under the load of an unmodified client of Debian's.
func TestUnboundUnderDnsperf(t *testing.T) {
	s := newStory(t)
	unbound := s.install("unbound", quickly("1s")...)
	unbound.start()
	var queries strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&queries, "host%d.grm.test A\n", i)
	}
	s.must(s.WriteFile("/run/queries", queries.String(), 0o644))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	const seconds = 15
	cmd := s.Command(ctx, "dnsperf", "-s", "127.0.0.1", "-p", "5305", "-d", "/run/queries", "-c", "200", "-Q", "2000", "-l", strconv.Itoa(seconds), "-t", "5")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	s.must(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	restarts := 0
	for tick := time.NewTicker(time.Second); ; {
		select {
		case err := <-ended:
			tick.Stop()
			if err != nil {
				t.Fatalf("dnsperf: %v\n%s", err, out.String())
			}
			count := func(what string) int {
				m := regexp.MustCompile(what + `:\s+(\d+)`).FindStringSubmatch(out.String())
				if m == nil {
					t.Fatalf("dnsperf says nothing of %q:\n%s", what, out.String())
				}
				n, err := strconv.Atoi(m[1])
				s.must(err)
				return n
			}
			sent, completed, lost := count("Queries sent"), count("Queries completed"), count("Queries lost")
			if lost != 0 || sent != completed || sent < 1000 || restarts < 5 {
				t.Errorf("%d restarts: %d sent, %d completed, %d lost:\n%s", restarts, sent, completed, lost, out.String())
			}
			if !strings.Contains(out.String(), "NOERROR "+strconv.Itoa(completed)) {
				t.Errorf("not all were answered NOERROR:\n%s", out.String())
			}
			return
		case <-tick.C:
			if restarts < seconds-3 {
				unbound.restart()
				restarts++
			}
		}
	}
}
