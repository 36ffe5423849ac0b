package main

import (
	"flag"
	"fmt"
	"time"

	"grm/inspect"
)

const flowsUsage = `Usage: grm flows [--json] [--assured] [--max N] [SERVICE]
Lists the flows that the groups of a service, or of all, know, and which generation and socket each belongs to.

Flags:
  --assured   only flows that are known to be real
  --max N     at most N flows (default 1000; 0: all)
  --json      one JSON object per line

Exit status 3: there is no such service.

Example:
  sudo grm flows --assured echo
`

func flows(e env, args []string) error {
	fs := flag.NewFlagSet("flows", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "")
	assured := fs.Bool("assured", false, "")
	limit := fs.Int("max", 1000, "")
	names, err := parse(fs, args, 0, 1)
	if err != nil {
		return err
	}
	if *limit < 0 {
		return usageError{fmt.Errorf("flows: --max %d: a number of flows, or 0 for all", *limit)}
	}
	if len(names) == 1 {
		r, err := e.report()
		if err != nil {
			return err
		}
		if _, err := find(r, names[0]); err != nil {
			return err
		}
	}
	out := flowWriter{e: e, asJSON: *asJSON}
	if !*asJSON {
		out.table = newTable(e.stdout, "REMOTE", "GROUP", "SERVICE", "GEN", "SOCKET", "STATE", "IDLE")
	}
	n, more := 0, false
	err = e.flows(func(f inspect.Flow) bool {
		if (*assured && !f.Assured) || (len(names) == 1 && f.Service != names[0]) {
			return true
		}
		if more = *limit > 0 && n == *limit; more {
			return false
		}
		n++
		return out.write(f)
	})
	if err == nil {
		err = out.err
	}
	if err == nil && !*asJSON {
		err = out.table.flush()
	}
	if more {
		fmt.Fprintf(e.stderr, "grm: there are more than these %d flows (--max 0 lists all)\n", n)
	}
	return err
}

type flowWriter struct {
	e      env
	asJSON bool
	table  table
	err    error
}

// write says whether to go on.
func (w *flowWriter) write(f inspect.Flow) bool {
	if w.asJSON {
		w.err = writeLine(w.e.stdout, f)
		return w.err == nil
	}
	state := "new"
	if f.Assured {
		state = "assured"
	}
	generation := "-"
	if f.Generation != 0 {
		generation = fmt.Sprint(f.Generation)
	}
	w.table.row(f.Remote, f.Group, dash(f.Service), generation, f.Socket, state, time.Duration(f.Idle).Truncate(time.Second))
	return true
}
