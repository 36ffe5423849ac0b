package decoy

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"grm/control"
)

// show tells systemd the status line if it has changed.
func (d *decoy) show() {
	if d.phase > speaking {
		return
	}
	if line := d.line(control.Now()); line != d.shown {
		d.shown = line
		d.tell("STATUS=" + line)
	}
}

// line is what systemctl status shows:
//
//	gen 7 serving since 12:03 (pid 812) · gen 6 draining, 14 flows, 3m40s left
//	gen 6 serving; gen 7 failed: exit 1 (12:03)
func (d *decoy) line(now time.Duration) string {
	if d.ctl == nil {
		return d.says
	}
	b := d.ctl.Bank(d.bank)
	var parts []string
	switch {
	case d.phase == attempting:
		parts = append(parts, fmt.Sprintf("gen %d starting", b.Generation))
	case d.failed.generation != 0:
		parts = append(parts, fmt.Sprintf("gen %d serving; gen %d failed: %s (%s)",
			b.Generation, d.failed.generation, clean(d.failed.reason), d.failed.at.Format("15:04")))
	default:
		part := fmt.Sprintf("gen %d serving since %s (pid %d)", b.Generation, wall(now, b.ReadyAt).Format("15:04"), b.Server)
		if now < b.WatchUntil {
			part += ", watched"
		}
		parts = append(parts, part)
	}
	parts = append(parts, d.others(now)...)
	if d.says != "" {
		parts = append(parts, d.says)
	}
	return strings.Join(parts, " · ")
}

// others are the instances beside the one that this decoy speaks for, newest
// first.
func (d *decoy) others(now time.Duration) []string {
	var flows [control.Banks]string
	var banks []int
	for i := range control.Banks {
		b := d.ctl.Bank(i)
		if i == d.bank || b.State != control.Serving && b.State != control.Draining {
			continue
		}
		banks = append(banks, i)
		if b.State == control.Draining {
			if n, known := d.flows.of(i); known {
				flows[i] = fmt.Sprintf(", %d flows", n)
			}
		}
	}
	slices.SortFunc(banks, func(x, y int) int {
		if d.ctl.Bank(x).Generation > d.ctl.Bank(y).Generation {
			return -1
		}
		return 1
	})
	var parts []string
	for _, i := range banks {
		b := d.ctl.Bank(i)
		switch {
		case b.State == control.Draining:
			parts = append(parts, fmt.Sprintf("gen %d draining%s, %v left", b.Generation, flows[i], left10(b.DrainUntil-now)))
		case d.phase == attempting:
			parts = append(parts, fmt.Sprintf("gen %d serving", b.Generation))
		default:
			parts = append(parts, fmt.Sprintf("gen %d standing by", b.Generation))
		}
	}
	return parts
}

// left10 is a time left, in steps that spare the journal and systemd.
func left10(d time.Duration) time.Duration {
	step := 10 * time.Second
	if d < step {
		step = time.Second
	}
	return max(0, d.Round(step))
}

// wall is when something was on the clock on the wall.
func wall(now, at time.Duration) time.Time { return time.Now().Add(at - now) }
