package stories

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"grm/test/box"
	"grm/test/load"
)

// TestOwnSockets restarts from one server into the next, each of which does something else to the sockets that it was given. The first one, which
// does nothing, serves its flows all the while; what the others have done is said, and whatever of their sockets they have not spoilt serves.
func TestOwnSockets(t *testing.T) {
	s := newOdd(t)
	settings := []string{
		"address = \"udp://0.0.0.0:5201\"", "address = \"udp://0.0.0.0:5201\"\nsockets = 4",
		"[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"0s\"\n[drain]\nidle = \"1h\"\ntimeout = \"1h\"\n",
	}
	echo := s.install("echo", settings...)
	echo.start()
	g := echo.load(forever)
	first := echo.instance()
	for _, c := range []struct {
		habit string
		says  []string // in the journal
		shows string   // in grm status
		whole bool     // every new flow is served
	}{
		{"dups", nil, "", true},
		{"connects", []string{"server: connects: operation not permitted"}, "", true},
		{"steals", []string{"server: steals: operation not permitted"}, "", true},
		{"leaver", []string{"server: leaver: <nil>"}, "socket 0 of echo: open, but no longer in the group: the server has taken it out", true},
		{"shuts", []string{"socket 0 of echo was shut down by its server"}, "", false},
		{"filters", []string{"socket 0 of echo has a filter of its server's, which decides what it gets"}, "", false},
		{"few", []string{"socket 1 of echo was closed by its server: others get its packets now", "socket 2 of echo was closed", "socket 3 of echo was closed"}, "", false},
	} {
		g.Mark(c.habit)
		s.install("echo", append(slices.Clone(settings), has(c.habit)...)...)
		seen := len(echo.journal())
		echo.restart()
		now := echo.instance()
		odd := func(o *load.Options) { o.Seed = 7 }
		h := echo.loadInPart(odd)
		h.until("the new server answers", func(r load.Result) bool { return r.Instances[now].Answers > 1000 })
		for _, says := range c.says {
			s.must(s.Wait(c.habit+": "+says, func() (bool, error) {
				return slices.ContainsFunc(echo.journal()[seen:], func(line string) bool { return strings.Contains(line, says) }), nil
			}))
		}
		status, err := s.Exec(box.BinDir+"/grm", "status", "echo")
		s.must(err)
		if !strings.Contains(status, c.shows) {
			t.Errorf("%s: %q is not in\n%s", c.habit, c.shows, status)
		}
		if r := h.stop(); len(r.Instances) != 1 || c.whole && r.Err() != nil {
			t.Errorf("%s: %v", c.habit, r)
		}
		if c.habit == "few" { // from now on it is whole
			h = echo.load(odd)
			h.more(2000)
			h.end()
			if status, err = s.Exec(box.BinDir+"/grm", "status", "echo"); err != nil || !strings.Contains(status, "1/4") {
				t.Errorf("1/4 is not in\n%s, %v", status, err)
			}
		}
	}
	metrics, err := s.Exec(box.BinDir+"/grm", "metrics")
	s.must(err)
	if !regexp.MustCompile(`(?m)event="guarded".* [1-9][0-9]*$`).MatchString(metrics) {
		t.Errorf("no attempt was counted in\n%s", metrics)
	}
	s.install("echo", settings...)
	echo.restart()
	h := echo.load(func(o *load.Options) { o.Seed = 8 })
	h.more(2000)
	h.end()
	if r := g.end(); len(r.Instances) != 1 || r.Instances[first].Answers != r.Answered {
		t.Errorf("the first server's flows: %v", r)
	}
}

// loadInPart starts a load on a service that does not answer all of it.
func (v *service) loadInPart(change func(*load.Options)) *driver {
	v.s.Helper()
	o := load.Options{NetNS: v.s.NetNS(), Targets: v.Targets(), Flows: 200, Pace: 50 * time.Millisecond, Length: 100}
	change(&o)
	g, err := load.Start(v.s.Context(), o)
	v.s.must(err)
	v.s.Cleanup(func() { g.Stop() })
	return &driver{g, v.s}
}
