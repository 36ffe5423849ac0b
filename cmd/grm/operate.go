package main

import (
	"flag"
	"fmt"
	"strings"
)

const rollbackUsage = `Usage: grm rollback SERVICE
Gives new flows back to the generation before the working one, while that one lives.

The working generation keeps the flows that it has, and drains as any older one does. The next
systemctl restart starts the program again as usual.

Exit status 3: there is no such service. 4: no older generation lives that could take over.

Example:
  sudo grm rollback echo
`

func rollback(e env, args []string) error {
	names, err := parse(flag.NewFlagSet("rollback", flag.ContinueOnError), args, 1, 1)
	if err != nil {
		return err
	}
	r, err := e.rollback(names[0])
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "%s: generation %d takes new flows; generation %d drains\n", names[0], r.Working, r.Withdrawn)
	return err
}

const drainUsage = `Usage: grm drain [--now] SERVICE
Ends the watch of the working generation, so that the older ones begin to drain.

Flags:
  --now   also ends all waiting: older generations stop at once, with whatever flows they still have

Exit status 3: there is no such service.

Example:
  sudo grm drain --now echo
`

func drain(e env, args []string) error {
	fs := flag.NewFlagSet("drain", flag.ContinueOnError)
	now := fs.Bool("now", false, "")
	names, err := parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	generations, err := e.drain(names[0], *now)
	if err != nil {
		return err
	}
	if len(generations) == 0 {
		_, err = fmt.Fprintf(e.stdout, "%s: no older generation lives\n", names[0])
		return err
	}
	what := "drains"
	if *now {
		what = "ends now"
	}
	for _, g := range generations {
		if _, err := fmt.Fprintf(e.stdout, "%s: generation %d %s\n", names[0], g, what); err != nil {
			return err
		}
	}
	return nil
}

const deleteUsage = `Usage: grm delete [--force] NAME
Removes what a service (by its name) or a group (such as udp://0.0.0.0:5201) has left behind: pins, state, locks.

What is alive is not removed: systemctl stop ends a service in an orderly way. An instance that lives on although
its unit is inactive is ended with --force.

Flags:
  --force   ends what still lives: SIGTERM, then SIGKILL

Exit status 3: there is no such service or group. 4: refused, as it is alive.

Examples:
  sudo grm delete echo
  sudo grm delete --force echo
  sudo grm delete udp://0.0.0.0:5201
`

func remove(e env, args []string) error {
	fs := flag.NewFlagSet("delete", flag.ContinueOnError)
	force := fs.Bool("force", false, "")
	names, err := parse(fs, args, 1, 1)
	if err != nil {
		return err
	}
	removed, err := e.remove(names[0], *force)
	if len(removed) > 0 {
		if _, err := fmt.Fprintf(e.stdout, "%s: removed %s\n", names[0], strings.Join(removed, ", ")); err != nil {
			return err
		}
	}
	return err
}
