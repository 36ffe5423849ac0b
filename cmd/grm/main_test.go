package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"grm/bpfprog/model"
	"grm/control"
	"grm/inspect"
	"grm/operate"
)

var update = flag.Bool("update", false, "write what the commands say now into testdata")

// Each script in testdata holds comments ("// …") and commands ("$ grm …") with what they write on
// standard output, on standard error ("! …") and their exit status, if it is
// not 0 ("? 3"). "@ NAME" chooses what the commands find.
func TestScripts(t *testing.T) {
	t.Setenv("TZ", "UTC")
	time.Local = time.UTC
	scripts, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("scripts: %q, %v", scripts, err)
	}
	for _, file := range scripts {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := play(t, string(text))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != string(text) {
				t.Errorf("it is now (-update to accept):\n%s", got)
			}
		})
	}
}

// play runs a script's commands, and returns the script with what they really say.
func play(t *testing.T, script string) string {
	var out strings.Builder
	scene := "busy"
	for line := range strings.Lines(script) {
		switch {
		case strings.HasPrefix(line, "//"), line == "\n":
			out.WriteString(line)
		case strings.HasPrefix(line, "@ "):
			scene = strings.TrimSpace(line[2:])
			out.WriteString(line)
		case strings.HasPrefix(line, "$ grm"):
			out.WriteString(line)
			out.WriteString(say(t, scene, strings.Fields(line)[2:]))
		}
	}
	return out.String()
}

func say(t *testing.T, scene string, args []string) string {
	var stdout, stderr bytes.Buffer
	e := scenes(t, scene)
	e.stdout, e.stderr = &stdout, &stderr
	code := status(run(e, args), &stderr)
	text := stdout.String()
	if text != "" && !strings.HasSuffix(text, "\n") {
		t.Errorf("grm %q: output does not end with a newline", args)
	}
	// Blank lines separate commands in a script.
	text = strings.ReplaceAll(text, "\n\n", "\n.\n")
	for line := range strings.Lines(stderr.String()) {
		text += "! " + line
	}
	if code != 0 {
		text += fmt.Sprintf("? %d\n", code)
	}
	return text
}

// scenes is what the commands find.
func scenes(t *testing.T, name string) env {
	at := time.Date(2026, 3, 4, 12, 3, 11, 0, time.UTC)
	ready := at.Add(-5 * time.Second)
	listener := inspect.Listener{Name: "quic", Address: "udp://0.0.0.0:5201", Group: "udp://0.0.0.0:5201"}
	busy := inspect.Report{
		Time: at, Complete: true,
		Services: []inspect.Service{{
			Name: "echo", Unit: "echo.service", User: "echo", Epoch: "00c0ffee00c0ffee", Working: 7,
			Failed:    &inspect.Failed{Generation: 6, Reason: "exit status 1", At: at.Add(-time.Hour)},
			Listeners: []inspect.Listener{listener},
			Generations: []inspect.Generation{
				{Number: 7, Bank: 1, State: inspect.Watched, Server: &inspect.Process{PID: 812, Command: "echo", Running: true},
					Keeper: &inspect.Process{PID: 810, Command: "grm-decoy", Running: true}, ReadySince: &ready, WatchLeft: inspect.Seconds(5 * time.Second),
					Sockets: []inspect.Sockets{{Listener: "quic", Count: 4, Live: 4}}, Flows: 11,
					Counters: inspect.Counters{Packets: 4711, NewFlows: 23, Assured: 11, SincePacket: 0, SinceAssured: 0}},
				{Number: 5, Bank: 0, State: inspect.Draining, Server: &inspect.Process{PID: 755, Command: "echo", Running: true},
					Keeper: &inspect.Process{PID: 753}, DrainLeft: inspect.Seconds(220 * time.Second),
					Sockets: []inspect.Sockets{{Listener: "quic", Count: 4, Live: 3}}, Flows: 14,
					Counters: inspect.Counters{Packets: 99, NewFlows: 20, Assured: 14, OtherSlot: 1, SincePacket: inspect.Seconds(3 * time.Second), SinceAssured: -1}},
			},
		}},
		Groups: []inspect.Group{{Name: "udp://0.0.0.0:5201", Dissector: "flow", MaxApps: 1, TableSize: 65536, Flows: 30, Assured: 25,
			Services: []string{"echo"}, Counters: map[string]uint64{"dead_slot": 1, "table_full": 0}}},
	}
	e := env{
		report: func() (inspect.Report, error) { return busy, nil },
		flows: func(yield func(inspect.Flow) bool) error {
			for i := range 3 {
				if !yield(inspect.Flow{Remote: fmt.Sprintf("192.0.2.%d:4000", i+1), Group: "udp://0.0.0.0:5201", Service: "echo",
					Generation: 7, Socket: i, Assured: i != 1, Idle: inspect.Seconds(i) * inspect.Seconds(time.Second)}) {
					break
				}
			}
			return nil
		},
		examine: func() []inspect.Finding {
			return []inspect.Finding{{Check: "kernel", Level: inspect.Fine, Found: "6.1.0"}, {Check: "bpffs", Level: inspect.Note, Found: "not mounted", Advice: "mount it"}}
		},
		snapshot: func(group string) (*model.State, error) {
			if group != "udp://0.0.0.0:5201" {
				return nil, fmt.Errorf("group %s: %w", group, inspect.ErrNone)
			}
			s := &model.State{Dissector: model.Flow, Apps: []model.App{{Joined: true, Order: control.MakeOrder([]int{1, 0}), Alive: 3}},
				Flows: map[netip.AddrPort]model.Home{netip.MustParseAddrPort("192.0.2.1:4711"): {Bank: 0, Slot: 1}}}
			s.Apps[0].Banks[0] = model.Bank{Generation: 5, Sockets: 2}
			s.Apps[0].Banks[1] = model.Bank{Generation: 7, Sockets: 2}
			return s, nil
		},
		rollback: func(string) (operate.Rolled, error) { return operate.Rolled{Working: 5, Withdrawn: 7}, nil },
		drain:    func(_ string, now bool) ([]uint64, error) { return []uint64{5, 4}, nil },
		remove: func(name string, force bool) ([]string, error) {
			if !force {
				return nil, fmt.Errorf("delete %s: %w: it is alive", name, operate.ErrLive)
			}
			return []string{"service echo", "group udp://0.0.0.0:5201"}, nil
		},
	}
	switch name {
	case "busy":
	case "unprivileged":
		s := busy.Services[0]
		s.Working, s.Epoch = 0, ""
		s.Generations = []inspect.Generation{{Number: 7, Bank: 1, State: inspect.Unknown, Sockets: []inspect.Sockets{{Listener: "quic", Count: 4}}}}
		r := inspect.Report{Time: at, Services: []inspect.Service{s}, Groups: []inspect.Group{}}
		e.report = func() (inspect.Report, error) { return r, nil }
		e.flows = func(func(inspect.Flow) bool) error {
			return fmt.Errorf("read the flow tables: %w", fs.ErrPermission)
		}
		e.rollback = func(name string) (operate.Rolled, error) {
			return operate.Rolled{}, fmt.Errorf("service %s: %w", name, fs.ErrPermission)
		}
	case "shared":
		r := busy
		r.Services[0].Listeners[0].App = 1
		r.Groups[0].Dissector, r.Groups[0].MaxApps, r.Groups[0].Counters = "cbpf", 2, map[string]uint64{"app_gone": 12}
		e.report = func() (inspect.Report, error) { return r, nil }
	case "empty":
		e.report = func() (inspect.Report, error) {
			return inspect.Report{Time: at, Complete: true, Services: []inspect.Service{}, Groups: []inspect.Group{}}, nil
		}
		e.flows = func(func(inspect.Flow) bool) error { return nil }
		e.drain = func(string, bool) ([]uint64, error) { return nil, nil }
		e.rollback = func(name string) (operate.Rolled, error) {
			return operate.Rolled{}, fmt.Errorf("service %s: %w", name, inspect.ErrNone)
		}
	case "remnants":
		r := busy
		r.Services = []inspect.Service{{Name: "old", Closing: true, Listeners: []inspect.Listener{}, Generations: []inspect.Generation{}}}
		r.Groups = []inspect.Group{{Name: "udp://[::]:53", Dissector: "noop", MaxApps: 1, Services: []string{}}}
		r.Problems = []string{"service old: invalid state file"}
		e.report = func() (inspect.Report, error) { return r, nil }
	case "broken":
		e.report = func() (inspect.Report, error) {
			return inspect.Report{}, errors.New("list services: input/output error")
		}
		e.examine = func() []inspect.Finding {
			return []inspect.Finding{{Check: "kernel", Level: inspect.Bad, Found: "5.4.0", Advice: "boot a newer kernel"}}
		}
	default:
		t.Fatalf("no scene %q", name)
	}
	return e
}

// Every command explains itself, and mentions each of its flags.
func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"-help"}, {"help"}} {
		var out bytes.Buffer
		if err := run(env{stdout: &out}, args); err != nil || out.String() != usage {
			t.Errorf("grm %q: %v, %q", args, err, out.String())
		}
	}
	for _, c := range commands() {
		if !strings.Contains(usage, "\n  "+c.name+" ") {
			t.Errorf("grm --help does not mention %s", c.name)
		}
		if !strings.HasPrefix(c.usage, "Usage: grm "+c.name) || !strings.Contains(c.usage, "\nExample") {
			t.Errorf("usage of %s: %q", c.name, c.usage)
		}
		for _, args := range [][]string{{c.name, "--help"}, {c.name, "-h"}, {c.name, "x", "-help"}, {"help", c.name}} {
			var out bytes.Buffer
			if err := run(env{stdout: &out}, args); err != nil || out.String() != c.usage {
				t.Errorf("grm %q: %v, %q", args, err, out.String())
			}
		}
	}
}
