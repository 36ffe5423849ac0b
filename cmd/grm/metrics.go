package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"grm/inspect"
)

const metricsUsage = `Usage: grm metrics
Writes everything that is counted as OpenMetrics text, for a collector that reads files or runs commands. One that
reads files is to see a whole one: write it beside, then rename it.

Example:
  sudo sh -c 'cd /var/lib/node_exporter && grm metrics > grm.new && mv grm.new grm.prom'
`

func metrics(e env, args []string) error {
	if _, err := parse(flag.NewFlagSet("metrics", flag.ContinueOnError), args, 0, 0); err != nil {
		return err
	}
	r, err := e.report()
	if err != nil {
		return err
	}
	tellProblems(e, r)
	return writeMetrics(e.stdout, r)
}

// family is one metric family: all samples of a family stand together.
type family struct {
	name, kind, help string
	samples          bytes.Buffer
}

// add adds a sample. Labels come in pairs of name and value.
func (f *family) add(value any, labels ...string) {
	name := f.name
	if f.kind == "counter" {
		name += "_total"
	}
	f.samples.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		fmt.Fprintf(&f.samples, `%s%s="%s"`, sep, labels[i], escape.Replace(labels[i+1]))
	}
	if len(labels) > 0 {
		f.samples.WriteByte('}')
	}
	fmt.Fprintln(&f.samples, "", value)
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// writeMetrics writes a report in the OpenMetrics 1.0 text format. Counters of
// a generation begin at 0 with it and go with it.
func writeMetrics(w io.Writer, r inspect.Report) error {
	var families []*family
	gauge := func(name, help string) *family {
		f := &family{name: "grm_" + name, kind: "gauge", help: help}
		families = append(families, f)
		return f
	}
	counter := func(name, help string) *family {
		f := gauge(name, help)
		f.kind = "counter"
		return f
	}
	working := gauge("working_generation", "Number of the generation that takes new flows, 0 if none does.")
	closing := gauge("closing", "1 while the service stops and takes no new flow.")
	failed := gauge("failed_generation", "Number of the last generation that could not take over, 0 if none has failed.")
	state := gauge("generation_state", "1 for the state that a generation is in.")
	sockets := gauge("sockets", "Sockets of a generation.")
	live := gauge("live_sockets", "Sockets of a generation that can receive.")
	flows := gauge("flows", "Assured flows of a generation that live.")
	packets := counter("packets", "Packets given to a generation's sockets; a train that the kernel has coalesced counts as one.")
	newFlows := counter("new_flows", "Packets of no known flow given to a generation.")
	assured := counter("assured_flows", "Flows of a generation that became assured.")
	otherSlot := counter("other_slot", "Packets given to another socket of their generation, as theirs was closed.")
	fellBack := counter("fell_back", "New flows given to a generation because newer ones had no live socket.")
	for _, s := range r.Services {
		if r.Complete {
			working.add(s.Working, "service", s.Name)
			closing.add(oneIf(s.Closing), "service", s.Name)
		}
		var n uint64
		if s.Failed != nil {
			n = s.Failed.Generation
		}
		failed.add(n, "service", s.Name)
		for _, g := range s.Generations {
			of := []string{"service", s.Name, "generation", fmt.Sprint(g.Number)}
			state.add(1, append(of, "state", string(g.State))...)
			for _, l := range g.Sockets {
				at := append(slices.Clone(of), "listener", l.Listener)
				sockets.add(l.Count, at...)
				if g.State != inspect.Unknown {
					live.add(l.Live, at...)
				}
			}
			if g.State == inspect.Unknown {
				continue
			}
			flows.add(g.Flows, of...)
			packets.add(g.Counters.Packets, of...)
			newFlows.add(g.Counters.NewFlows, of...)
			assured.add(g.Counters.Assured, of...)
			otherSlot.add(g.Counters.OtherSlot, of...)
			fellBack.add(g.Counters.FellBack, of...)
		}
	}
	size := gauge("flow_table_size", "Flows that a group's table is made for.")
	known := gauge("group_flows", "Flows that a group knows, assured or not.")
	groupAssured := gauge("group_assured_flows", "Assured flows that a group knows.")
	events := counter("group_events", "What happened in a group, by event (docs/operations.md explains each).")
	for _, g := range r.Groups {
		if g.TableSize > 0 {
			size.add(g.TableSize, "group", g.Name)
			known.add(g.Flows, "group", g.Name)
			groupAssured.add(g.Assured, "group", g.Name)
		}
		for _, event := range slices.Sorted(maps.Keys(g.Counters)) {
			events.add(g.Counters[event], "group", g.Name, "event", event)
		}
	}
	var out bytes.Buffer
	for _, f := range families {
		if f.samples.Len() == 0 {
			continue
		}
		fmt.Fprintf(&out, "# TYPE %s %s\n# HELP %s %s\n%s", f.name, f.kind, f.name, f.help, f.samples.Bytes())
	}
	out.WriteString("# EOF\n")
	_, err := w.Write(out.Bytes())
	return err
}

func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}
