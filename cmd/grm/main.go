// Grm is the operator's view of the services that run under grm, and the few
// things that an operator does by hand.
//
// What was asked for goes to standard output, everything else to standard
// error, with the program's name, in lower case and without a full stop.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"grm/bpfprog/model"
	"grm/inspect"
	"grm/operate"
)

// The exit statuses.
const (
	done     = 0
	failed   = 1 // it could not be done
	misused  = 2 // the command line makes no sense
	notFound = 3 // there is no such service or group
	refused  = 4 // something that lives stands in the way
)

// env is what the commands get from outside, so that a test can give its own.
type env struct {
	stdout, stderr io.Writer
	report         func() (inspect.Report, error)
	flows          func(func(inspect.Flow) bool) error
	examine        func() []inspect.Finding
	snapshot       func(group string) (*model.State, error)
	rollback       func(service string) (operate.Rolled, error)
	drain          func(service string, now bool) ([]uint64, error)
	remove         func(name string, force bool) ([]string, error)
}

func main() {
	e := env{
		stdout:   os.Stdout,
		stderr:   os.Stderr,
		report:   inspect.Read,
		flows:    inspect.Flows,
		examine:  inspect.Examine,
		snapshot: inspect.Snapshot,
		rollback: operate.Rollback,
		drain:    operate.Drain,
		remove:   operate.Delete,
	}
	os.Exit(status(run(e, os.Args[1:]), os.Stderr))
}

// command is one verb.
type command struct {
	name  string
	usage string // the whole help text; its second line is the summary
	run   func(e env, args []string) error
}

// A function, for the table mentions help, which reads the table.
func commands() []command {
	return []command{
		{"list", listUsage, list},
		{"status", statusUsage, showStatus},
		{"flows", flowsUsage, flows},
		{"metrics", metricsUsage, metrics},
		{"explain", explainUsage, explain},
		{"doctor", doctorUsage, doctor},
		{"rollback", rollbackUsage, rollback},
		{"drain", drainUsage, drain},
		{"delete", deleteUsage, remove},
	}
}

func run(e env, args []string) error {
	if len(args) == 0 {
		fmt.Fprint(e.stderr, usage)
		return usageError{errors.New("no command")}
	}
	name, args := args[0], args[1:]
	switch name {
	case "-h", "-help", "--help":
		_, err := fmt.Fprint(e.stdout, usage)
		return err
	case "help":
		if len(args) == 0 {
			_, err := fmt.Fprint(e.stdout, usage)
			return err
		}
		name, args = args[0], []string{"--help"}
	}
	for _, c := range commands() {
		if c.name != name {
			continue
		}
		err := c.run(e, args)
		if errors.Is(err, flag.ErrHelp) {
			_, err = fmt.Fprint(e.stdout, c.usage)
		}
		return err
	}
	var names []string
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return usageError{fmt.Errorf("command %q is not one of %s", name, strings.Join(names, ", "))}
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

// notThere is a service or group that does not exist.
type notThere struct{ error }

// status is the exit status for err, which it tells.
func status(err error, stderr io.Writer) int {
	if err == nil {
		return done
	}
	if !errors.Is(err, errBad) { // whose findings have been printed
		fmt.Fprintln(stderr, "grm:", err)
	}
	var u usageError
	var n notThere
	switch {
	case errors.As(err, &u):
		fmt.Fprintln(stderr, "grm: try grm --help")
		return misused
	case errors.As(err, &n), errors.Is(err, inspect.ErrNone):
		return notFound
	case errors.Is(err, operate.ErrLive):
		return refused
	case errors.Is(err, fs.ErrPermission):
		fmt.Fprintln(stderr, "grm: this takes root's rights")
	}
	return failed
}

// parse reads flags wherever they stand, and returns the other arguments, of
// which there are to be at least least and at most most.
func parse(fs *flag.FlagSet, args []string, least, most int) ([]string, error) {
	fs.SetOutput(io.Discard) // the error is told once, by status
	var rest []string
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err
			}
			return nil, usageError{fmt.Errorf("%s: %w", fs.Name(), err)}
		}
		if args = fs.Args(); len(args) == 0 {
			break
		}
		rest, args = append(rest, args[0]), args[1:]
	}
	switch {
	case len(rest) < least:
		return nil, usageError{fmt.Errorf("%s: an argument is missing (grm %s --help)", fs.Name(), fs.Name())}
	case len(rest) > most:
		return nil, usageError{fmt.Errorf("%s: %q is one argument too many (grm %s --help)", fs.Name(), rest[most], fs.Name())}
	}
	return rest, nil
}

const usage = `Usage: grm COMMAND [flags] [ARGUMENTS]

Shows the services that run under grm, and does what an operator does by hand.

Commands:
  list                 the services, one line each
  status [SERVICE]     generations, processes, sockets, flows and counters
  flows [SERVICE]      the flows that are known, and whose they are
  metrics              everything that is counted, as OpenMetrics text
  explain              what a group's dissector does with a packet, and why
  doctor               whether this host has what grm needs, and what to do
  rollback SERVICE     new flows go back to the generation before
  drain SERVICE        end the watch, or all waiting, of older generations
  delete NAME          remove what a service or group has left behind

Root sees everything; others see what root has recorded for all to read.
Each command has a --help of its own.

Exit status:
  0  done
  1  it could not be done
  2  the command line makes no sense
  3  there is no such service or group
  4  refused: something that lives stands in the way

Examples:
  grm status echo
  grm list --json
  grm rollback echo
`
