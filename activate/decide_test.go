package activate

import (
	"testing"
	"time"

	"grm/control"
)

func TestDecide(t *testing.T) {
	var (
		serving  = fact{held: true, keeper: true, full: true, alive: true, serving: true}
		draining = fact{held: true, keeper: true, full: true, alive: true}
		orphan   = fact{held: true, full: true, alive: true}
		crashed  = fact{full: true, alive: true}
		fresh    = fact{full: true, alive: true, watched: true} // crashed in its watch
		lost     = fact{alive: true}                            // its sockets are gone
		lostNew  = fact{alive: true, watched: true}
		start    = control.Plan{Verb: control.Start, Bank: -1}
		again    = func(n int) control.Plan { return control.Plan{Verb: control.Again, Bank: n} }
		standIn  = func(n int) control.Plan { return control.Plan{Verb: control.StandIn, Bank: n} }
		inOrder  = func(all ...fact) facts {
			f := facts{banks: map[int]fact{}}
			for i, b := range all {
				n := 7 - i // some numbers
				f.order, f.banks[n] = append(f.order, n), b
			}
			return f
		}
	)
	for name, c := range map[string]struct {
		facts    facts
		operator control.Plan
		system   control.Plan
	}{
		"nothing":                                  {inOrder(), start, start},
		"restart":                                  {inOrder(serving), start, standIn(7)},
		"two live":                                 {inOrder(serving, serving), start, standIn(7)},
		"it said that it drains":                   {inOrder(draining), start, start},
		"its keeper was killed":                    {inOrder(orphan), start, start},
		"crash":                                    {inOrder(crashed), again(7), again(7)},
		"crash while an older one drains":          {inOrder(crashed, draining), again(7), again(7)},
		"crash while an orphan is there":           {inOrder(crashed, orphan), again(7), again(7)},
		"crash in its watch":                       {inOrder(fresh, serving), start, standIn(6)},
		"crash in its watch while one drains":      {inOrder(fresh, draining), again(7), again(7)},
		"crash of both":                            {inOrder(fresh, crashed), again(7), again(7)},
		"crash of the first one in its watch":      {inOrder(fresh), again(7), again(7)},
		"crash, and its sockets are lost":          {inOrder(lost), start, start},
		"the same while an older one drains":       {inOrder(lost, draining), start, start},
		"lost in its watch":                        {inOrder(lostNew, serving), start, standIn(6)},
		"lost in its watch, the older one crashed": {inOrder(lostNew, crashed), again(6), again(6)},
	} {
		if got := decide(c.facts); got != c.operator {
			t.Errorf("%s, by an operator: %v, want %v", name, got, c.operator)
		}
		c.facts.automatic = true
		if got := decide(c.facts); got != c.system {
			t.Errorf("%s, by systemd: %v, want %v", name, got, c.system)
		}
	}
}

func TestBackOff(t *testing.T) {
	for _, c := range []struct {
		n, good uint32
		want    time.Duration
	}{
		{0, 0, 0}, {1, 0, 0}, {2, 0, 100 * time.Millisecond}, {3, 0, 200 * time.Millisecond}, {7, 0, 3200 * time.Millisecond},
		{8, 0, 5 * time.Second}, {1 << 31, 0, 5 * time.Second}, {9, 8, 0}, {9, 9, 0}, {10, 8, 100 * time.Millisecond},
		{0, 8, 0}, {1, 8, 0}, {2, 8, 100 * time.Millisecond},
	} {
		if got := backOff(failures(c.n, c.good)); got != c.want {
			t.Errorf("restart %d, well until %d: %v, want %v", c.n, c.good, got, c.want)
		}
	}
}

func TestRestarts(t *testing.T) {
	results := []string{"success", "exit-code", "signal", "core-dump", "timeout", "watchdog", "oom-kill"}
	for policy, want := range map[string]string{
		"no": ".......", "always": "xxxxxxx", "on-success": "x......", "on-failure": ".xxxxxx",
		"on-abnormal": "..xxxxx", "on-abort": "..xx...", "on-watchdog": ".....x.",
	} {
		for i, result := range results {
			if got := restarts(policy, result); got != (want[i] == 'x') {
				t.Errorf("Restart=%s after %s: %v", policy, result, got)
			}
		}
	}
}

func TestReason(t *testing.T) {
	for want, r := range map[string]result{
		"exit status 1":                            {"exit-code", "exited", "1", "/srv"},
		"exit status 127: /srv is not there":       {"exit-code", "exited", "127", "/srv"},
		"exit status 126: /srv cannot be executed": {"exit-code", "exited", "126", "/srv"},
		"killed by SIGSEGV":                        {"exit-code", "exited", "139", "/srv"},
		"killed by SIGKILL":                        {"signal", "killed", "KILL", "/srv"},
		"killed by SIGABRT":                        {"core-dump", "dumped", "ABRT", "/srv"},
		"not ready in time":                        {"timeout", "killed", "TERM", "/srv"},
		"ended by itself":                          {"protocol", "exited", "0", "/srv"},
		"not ready":                                {},
		"resources":                                {"resources", "", "", "/srv"},
	} {
		if got := r.reason("ready"); got != want {
			t.Errorf("%+v: %q, want %q", r, got, want)
		}
	}
}

func TestMachine(t *testing.T) {
	for release, ok := range map[string]bool{
		"6.1.0-13-amd64": true, "6.18.44": true, "7.0": true, "6.1": true, "6.0.19": false, "5.10.0-26-amd64": false, "strange": true,
	} {
		if err := checkKernel(release); (err == nil) != ok {
			t.Errorf("kernel %s: %v", release, err)
		}
	}
	if err := checkCapabilities(^uint64(0)); err != nil {
		t.Error(err)
	}
	if err := checkCapabilities(^uint64(0) &^ (1 << Capabilities["CAP_BPF"]) &^ 1); err == nil ||
		err.Error() != "missing CAP_BPF, CAP_CHOWN (run it as root; in a unit write ExecStartPre=+/usr/lib/grm/grm-activate with the plus sign)" {
		t.Error(err)
	}
}
