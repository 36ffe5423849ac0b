// Command grm-decoy runs a server whose sockets grm-activate made, as the main
// process of its unit. See package decoy.
//
// Everything it says goes to standard error, as its name, a colon and a lower
// case text without a full stop.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"grm/decoy"
)

func main() {
	os.Exit(status(run(env{os.Stdout, os.Stderr}, os.Args[1:])))
}

// env is what tests fake.
type env struct{ stdout, stderr io.Writer }

// exit is the server's status, or that of a stage that could not become it.
type exit struct {
	status int
	err    error
}

func (e exit) Error() string {
	if e.err != nil {
		return e.err.Error()
	}
	return fmt.Sprintf("exit %d", e.status)
}

// status is the one place where an error becomes an exit status.
func status(err error) int {
	var e exit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.status
	}
	return decoy.ExitUsage
}

func run(e env, args []string) error {
	options, err := parse(args)
	if errors.Is(err, errHelp) {
		fmt.Fprint(e.stdout, usage())
		return nil
	}
	if err != nil {
		fmt.Fprintf(e.stderr, "grm-decoy: %v\n", err)
		return err
	}
	code, err := decoy.Run(options)
	if err != nil {
		fmt.Fprintf(e.stderr, "grm-decoy: %v\n", err)
	}
	if code == 0 && err == nil {
		return nil
	}
	return exit{code, err}
}
