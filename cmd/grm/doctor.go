package main

import (
	"errors"
	"flag"
	"fmt"

	"grm/inspect"
)

const doctorUsage = `Usage: grm doctor [--json]
Checks whether this host has what grm needs, and says what to do where it has not.

Flags:
  --json   as JSON

Exit status 1: services cannot start on this host as it is.

Example:
  sudo grm doctor
`

// errBad says that a finding is bad; the findings themselves have been written.
var errBad = errors.New("this host lacks something that grm needs")

func doctor(e env, args []string) error {
	fs := flag.NewFlagSet("doctor", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "")
	if _, err := parse(fs, args, 0, 0); err != nil {
		return err
	}
	findings := e.examine()
	bad := false
	for _, f := range findings {
		bad = bad || f.Level == inspect.Bad
	}
	if *asJSON {
		if err := writeJSON(e.stdout, findings); err != nil {
			return err
		}
	} else {
		t := newTable(e.stdout, "CHECK", "RESULT", "FOUND")
		for _, f := range findings {
			t.row(f.Check, f.Level, f.Found)
		}
		if err := t.flush(); err != nil {
			return err
		}
		for _, f := range findings {
			if f.Advice != "" {
				fmt.Fprintf(e.stdout, "%s: %s\n", f.Check, f.Advice)
			}
		}
	}
	if bad {
		return errBad
	}
	return nil
}
