package main

import (
	"flag"
	"fmt"
	"strings"
	"time"

	"grm/inspect"
)

const statusUsage = `Usage: grm status [--json] [SERVICE]
Shows each generation of a service, or of all: its state, processes, sockets, flows and counters.

States:
  prepared  its sockets are bound; no server has been ready yet
  watched   it takes new flows; the one before it stays ready to take over again
  working   it takes new flows
  standby   whole, with the flows that it has; a newer one takes the new ones
  draining  told to end when its flows have ended
  dead      its server is gone

Flags:
  --json   as JSON

Exit status 3: there is no such service.

Example:
  grm status echo
`

func showStatus(e env, args []string) error {
	fs := flag.NewFlagSet("status", flag.ContinueOnError)
	asJSON := fs.Bool("json", false, "")
	names, err := parse(fs, args, 0, 1)
	if err != nil {
		return err
	}
	r, err := e.report()
	if err != nil {
		return err
	}
	if len(names) == 1 {
		s, err := find(r, names[0])
		if err != nil {
			return err
		}
		r = only(r, s)
	}
	if *asJSON {
		return writeJSON(e.stdout, r)
	}
	tellProblems(e, r)
	if len(r.Services) == 0 {
		fmt.Fprintln(e.stderr, "grm: no service runs under grm in this network namespace")
	}
	for i, s := range r.Services {
		if i > 0 {
			fmt.Fprintln(e.stdout)
		}
		if err := writeService(e, r, s); err != nil {
			return err
		}
	}
	return nil
}

func find(r inspect.Report, name string) (inspect.Service, error) {
	var names []string
	for _, s := range r.Services {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name)
	}
	have := "there is none here"
	if names != nil {
		have = "known: " + strings.Join(names, ", ")
	}
	return inspect.Service{}, notThere{fmt.Errorf("no service %q runs under grm in this network namespace (%s)", name, have)}
}

// only is the part of a report that is about one service.
func only(r inspect.Report, s inspect.Service) inspect.Report {
	r.Services = []inspect.Service{s}
	groups := []inspect.Group{}
	for _, g := range r.Groups {
		for _, l := range s.Listeners {
			if l.Group == g.Name {
				groups = append(groups, g)
				break
			}
		}
	}
	r.Groups = groups
	return r
}

func writeService(e env, r inspect.Report, s inspect.Service) error {
	fmt.Fprintf(e.stdout, "%s: %s\n", s.Name, summary(s))
	if s.Failed != nil {
		fmt.Fprintf(e.stdout, "  generation %d failed: %s (%s)\n", s.Failed.Generation, s.Failed.Reason, s.Failed.At.Local().Format(time.DateTime))
	}
	for _, l := range s.Listeners {
		fmt.Fprintf(e.stdout, "  listener %s at %s", l.Name, l.Address)
		for _, g := range r.Groups {
			if g.Name != l.Group {
				continue
			}
			fmt.Fprintf(e.stdout, ", dissector %s", g.Dissector)
			if g.TableSize > 0 {
				fmt.Fprintf(e.stdout, ", %d of %d flows known, %d assured", g.Flows, g.TableSize, g.Assured)
			}
			if g.MaxApps > 1 {
				fmt.Fprintf(e.stdout, ", app %d of %d", l.App, g.MaxApps)
				if n := g.Counters["app_gone"]; n > 0 {
					fmt.Fprintf(e.stdout, "; app 0 got %d packets for apps without a service", n)
				}
			}
		}
		fmt.Fprintln(e.stdout)
	}
	if len(s.Generations) == 0 {
		fmt.Fprintln(e.stdout, "  no generation")
		return nil
	}
	t := newTable(e.stdout, "  GEN", "STATE", "SERVER", "KEEPER", "SOCKETS", "FLOWS", "PACKETS", "NEW FLOWS", "LAST PACKET", "LEFT")
	for _, g := range s.Generations {
		if g.State == inspect.Unknown {
			t.row(fmt.Sprintf("  %d", g.Number), g.State, "?", "?", sockets(g), "?", "?", "?", "?", "")
			continue
		}
		t.row(fmt.Sprintf("  %d", g.Number), g.State, process(g.Server), process(g.Keeper), sockets(g), g.Flows,
			g.Counters.Packets, g.Counters.NewFlows, ago(g.Counters.SincePacket), remaining(g))
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, g := range s.Generations {
		for _, problem := range g.Problems {
			fmt.Fprintf(e.stdout, "  generation %d: %s\n", g.Number, problem)
		}
	}
	return nil
}

// summary is one line such as "echo.service, generation 7 serves since 12:03:11".
func summary(s inspect.Service) string {
	parts := []string{}
	if s.Unit != "" {
		parts = append(parts, s.Unit)
	}
	switch {
	case s.Closing:
		parts = append(parts, "stopping: takes no new flow")
	case len(s.Generations) > 0 && s.Generations[0].State == inspect.Unknown:
		parts = append(parts, fmt.Sprintf("newest generation %d", s.Generations[0].Number))
	case s.Working == 0:
		parts = append(parts, "no generation takes new flows")
	}
	for _, g := range s.Generations {
		if g.Number != s.Working || s.Closing {
			continue
		}
		text := fmt.Sprintf("generation %d takes new flows", g.Number)
		if g.ReadySince != nil {
			text += " since " + g.ReadySince.Local().Format(time.DateTime)
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, ", ")
}

func process(p *inspect.Process) string {
	switch {
	case p == nil:
		return "-"
	case !p.Running:
		return fmt.Sprintf("%d (gone)", p.PID)
	}
	return fmt.Sprintf("%d %s", p.PID, p.Command)
}

// sockets is how many live, of how many.
func sockets(g inspect.Generation) string {
	live, count := 0, 0
	for _, s := range g.Sockets {
		live, count = live+s.Live, count+s.Count
	}
	if g.State == inspect.Unknown {
		return fmt.Sprintf("?/%d", count)
	}
	return fmt.Sprintf("%d/%d", live, count)
}

func ago(s inspect.Seconds) string {
	if s < 0 {
		return "never"
	}
	return time.Duration(s).Truncate(time.Second).String() + " ago"
}

func remaining(g inspect.Generation) string {
	switch {
	case g.State == inspect.Watched:
		return "watch " + time.Duration(g.WatchLeft).Round(time.Second).String()
	case g.DrainLeft > 0:
		return "drain " + time.Duration(g.DrainLeft).Round(time.Second).String()
	}
	return ""
}
