package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"grm/inspect"
)

const listUsage = `Usage: grm list [--json]
Lists the services of this network namespace, one line each.

Flags:
  --json   as JSON, all that grm status shows as well

Example:
  grm list
`

func list(e env, args []string) error {
	fs := flag.NewFlagSet("list", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "")
	if _, err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	r, err := e.report()
	if err != nil {
		return err
	}
	if *asJSON {
		return writeJSON(e.stdout, r)
	}
	tellProblems(e, r)
	t := newTable(e.stdout, "SERVICE", "UNIT", "GENERATION", "STATE", "OLDER", "FLOWS", "LISTENERS")
	for _, s := range r.Services {
		generation, state, older, flows := "-", "-", 0, 0
		for _, g := range s.Generations {
			flows += g.Flows
			switch {
			case g.Number == s.Working && s.Working != 0:
				generation, state = strconv.FormatUint(g.Number, 10), string(g.State)
			case g.State == inspect.Standby || g.State == inspect.Draining:
				older++
			case g.State == inspect.Unknown:
				state = string(inspect.Unknown)
			}
		}
		if s.Closing {
			state = "stopping"
		}
		var addresses []string
		for _, l := range s.Listeners {
			addresses = append(addresses, l.Address)
		}
		t.row(s.Name, dash(s.Unit), generation, state, older, known(r, flows), strings.Join(addresses, " "))
	}
	for _, g := range r.Groups {
		if len(g.Services) == 0 {
			t.row("(none)", "-", "-", "-", 0, g.Assured, g.Name)
		}
	}
	return t.flush()
}

// known is a number that only root can see.
func known(r inspect.Report, n int) string {
	if !r.Complete {
		return "?"
	}
	return strconv.Itoa(n)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// tellProblems says on standard error what the report lacks.
func tellProblems(e env, r inspect.Report) {
	for _, p := range r.Problems {
		fmt.Fprintln(e.stderr, "grm:", p)
	}
	if !r.Complete {
		fmt.Fprintln(e.stderr, "grm: only root sees states, processes, flows and counters")
	}
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// table aligns columns.
type table struct{ w *tabwriter.Writer }

func newTable(out io.Writer, heads ...any) table {
	t := table{tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)}
	t.row(heads...)
	return t
}

func (t table) row(cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(t.w, "\t")
		}
		fmt.Fprint(t.w, c)
	}
	fmt.Fprintln(t.w)
}

// flush writes the table; errors of the rows come here too.
func (t table) flush() error { return t.w.Flush() }

// writeLine writes v on one line.
func writeLine(w io.Writer, v any) error { return json.NewEncoder(w).Encode(v) }
