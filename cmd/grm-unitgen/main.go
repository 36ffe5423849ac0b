// Grm-unitgen turns services' TOML files into systemd units.
//
// What was asked for goes to standard output, everything else to standard
// error, with the program's name, in lower case and without a full stop.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"grm/config"
	"grm/unitgen"
)

// The exit statuses.
const (
	done    = 0
	failed  = 1 // it could not be done, or --check found a unit that is not current
	misused = 2 // the command line makes no sense
)

// env is what the program gets from outside, so that a test can give its own.
type env struct {
	stdout, stderr io.Writer
	unitDir        string                 // where the operator's units are
	configDir      string                 // where the TOML files of a systemd generator are
	systemctl      func() (string, error) // what systemctl --version prints
}

func main() {
	e := env{
		stdout:    os.Stdout,
		stderr:    os.Stderr,
		unitDir:   "/etc/systemd/system",
		configDir: "/etc/grm",
		systemctl: func() (string, error) {
			out, err := exec.Command("systemctl", "--version").Output()
			return string(out), err
		},
	}
	os.Exit(status(run(e, os.Args[1:]), os.Stderr))
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

// errNotCurrent is what --check ends with; what it found has been printed.
var errNotCurrent = errors.New("not current")

// status is the exit status for err, which it tells.
func status(err error, stderr io.Writer) int {
	switch {
	case err == nil:
		return done
	case errors.Is(err, errNotCurrent):
		return failed
	}
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(stderr, "grm-unitgen: %s\n", strings.TrimSuffix(line, "\n"))
	}
	var u usageError
	if errors.As(err, &u) {
		fmt.Fprintln(stderr, "grm-unitgen: try grm-unitgen --help")
		return misused
	}
	return failed
}

// options are the command line.
type options struct {
	unitgen.Options
	out    string
	dryRun bool
	check  bool
	files  []string
}

func run(e env, args []string) error {
	o, err := parse(e, args)
	if errors.Is(err, flag.ErrHelp) {
		_, err = fmt.Fprint(e.stdout, usage)
		return err
	}
	if err != nil {
		return err
	}
	asGenerator := areDirectories(o.files)
	if o.SystemdVersion == 0 {
		if o.SystemdVersion, err = systemdVersion(e); err != nil {
			return err
		}
	}
	if asGenerator {
		return generate(e, o)
	}
	units, err := render(o)
	if err != nil {
		return err
	}
	switch {
	case o.check:
		return check(e, o, units)
	case o.dryRun:
		return show(e, o, units)
	}
	return install(e, o, units)
}

// parse reads flags wherever they stand.
func parse(e env, args []string) (o options, err error) {
	fs := flag.NewFlagSet("grm-unitgen", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // the error is told once, by status
	for _, name := range []string{"o", "output"} {
		fs.StringVar(&o.out, name, e.unitDir, "")
	}
	for _, name := range []string{"n", "dry-run"} {
		fs.BoolVar(&o.dryRun, name, false, "")
	}
	fs.BoolVar(&o.check, "check", false, "")
	fs.StringVar(&o.BinDir, "bindir", unitgen.DefaultBinDir, "")
	fs.IntVar(&o.SystemdVersion, "systemd-version", 0, "")
	for len(args) > 0 {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return o, err
			}
			return o, usageError{err}
		}
		if args = fs.Args(); len(args) > 0 {
			o.files, args = append(o.files, args[0]), args[1:]
		}
	}
	versionGiven := false
	fs.Visit(func(f *flag.Flag) { versionGiven = versionGiven || f.Name == "systemd-version" })
	switch {
	case len(o.files) == 0:
		return o, usageError{errors.New("no file is given")}
	case o.check && o.dryRun:
		return o, usageError{errors.New("--check and --dry-run exclude each other")}
	case versionGiven && o.SystemdVersion < unitgen.MinSystemdVersion:
		return o, usageError{fmt.Errorf("--systemd-version: %d is too old (grm needs %d)", o.SystemdVersion, unitgen.MinSystemdVersion)}
	}
	return o, nil
}

// areDirectories tells whether systemd called us as one of its generators: with three directories.
func areDirectories(args []string) bool {
	for _, a := range args {
		if info, err := os.Stat(a); err != nil || !info.IsDir() {
			return false
		}
	}
	return len(args) == 3
}

// systemdVersion asks which systemd the units are for.
func systemdVersion(e env) (version int, err error) {
	out, err := e.systemctl()
	if err == nil {
		_, err = fmt.Sscanf(out, "systemd %d", &version)
	}
	if err != nil {
		return 0, fmt.Errorf("systemctl --version: %w (say it with --systemd-version)", err)
	}
	return version, nil
}

// render reads all files and makes all units, or tells all that is wrong with them.
func render(o options) ([]unitgen.Unit, error) {
	var units []unitgen.Unit
	var errs []error
	from := map[string]string{} // by name
	for _, file := range o.files {
		u, s, err := renderFile(file, o.Options)
		if err == nil && from[s.Name] != "" {
			err = fmt.Errorf("%s: the name %q is that of %s too (choose another)", file, s.Name, from[s.Name])
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		from[s.Name] = file
		units = append(units, u)
	}
	return units, errors.Join(errs...)
}

func renderFile(file string, o unitgen.Options) (unitgen.Unit, *config.Service, error) {
	s, err := config.Load(file)
	if err != nil {
		return unitgen.Unit{}, nil, err
	}
	// The unit is to say the same wherever grm-unitgen was called.
	if s.Path, err = filepath.Abs(file); err != nil {
		return unitgen.Unit{}, nil, err
	}
	var text strings.Builder
	err = unitgen.Render(&text, s, o)
	return unitgen.Unit{Name: unitgen.FileName(s), Text: []byte(text.String())}, s, err
}

// install writes the units.
func install(e env, o options, units []unitgen.Unit) error {
	states, err := unitgen.Install(o.out, units)
	if err != nil {
		return err
	}
	wrote := false
	for i, u := range units {
		path := filepath.Join(o.out, u.Name)
		if states[i] == unitgen.Current {
			fmt.Fprintf(e.stderr, "grm-unitgen: %s is current\n", path)
			continue
		}
		wrote = true
		fmt.Fprintf(e.stderr, "grm-unitgen: wrote %s\n", path)
	}
	if wrote && o.out == e.unitDir {
		fmt.Fprintln(e.stderr, "grm-unitgen: systemd does not know yet: systemctl daemon-reload")
	}
	return nil
}

// show prints the units instead of writing them.
func show(e env, o options, units []unitgen.Unit) error {
	for i, u := range units {
		if len(units) > 1 {
			separator := ""
			if i > 0 {
				separator = "\n"
			}
			if _, err := fmt.Fprintf(e.stdout, "%s# %s\n", separator, filepath.Join(o.out, u.Name)); err != nil {
				return err
			}
		}
		if _, err := e.stdout.Write(u.Text); err != nil {
			return err
		}
	}
	return nil
}

// check tells of each unit whether it is current.
func check(e env, o options, units []unitgen.Unit) error {
	var notCurrent error
	for _, u := range units {
		state, err := unitgen.Compare(o.out, u)
		if err != nil {
			return err
		}
		if state != unitgen.Current {
			notCurrent = errNotCurrent
		}
		if _, err := fmt.Fprintf(e.stdout, "%s: %s\n", filepath.Join(o.out, u.Name), state); err != nil {
			return err
		}
	}
	return notCurrent
}

const usage = `Usage: grm-unitgen [flags] FILE.toml...
       grm-unitgen NORMAL-DIR EARLY-DIR LATE-DIR

Makes a systemd unit of each service's TOML file, and writes it as NAME.service.
If anything is wrong with any of the files, all of it is told and nothing is
written. A unit that grm-unitgen did not write, or that was changed since, is
not replaced: move it away.

Flags:
  -o, --output DIR        write into DIR (default /etc/systemd/system)
  -n, --dry-run           print the units, write nothing
      --check             tell whether the units are current, write nothing
      --bindir DIR        where grm-activate and grm-decoy are (default
                          /usr/lib/grm)
      --systemd-version N the systemd that the units are for (default: what
                          systemctl --version says)
  -h, --help              this text

Called with three directories, it is a systemd generator: it makes units of all
/etc/grm/*.toml in the first of them and enables them as their [Install] says.
Services that have a unit in /etc/systemd/system are left to that.

Exit status:
  0  done; with --check: all units are current
  1  it could not be done; with --check: a unit is not current
  2  the command line makes no sense

Example:
  grm-unitgen -n /etc/grm/echo.toml     # look
  grm-unitgen /etc/grm/echo.toml        # write
  systemctl daemon-reload
  systemctl restart echo
`
