// Package stories tells what grm promises, end to end: each story boots a real systemd of its own, runs a server under load in it, does
// something to that and accounts for each datagram.
//
// They need root, and skip without. Every wait has a deadline, nothing sleeps to synchronise, and the host is as before afterwards.
package stories

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
	"grm/test/rig"
)

// bin has grm's commands and the examples' servers, built once.
var bin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // all will skip
	}
	var err error
	if bin, err = os.MkdirTemp("", "grm-stories-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(bin)
	if err := install.All(context.Background(), bin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// patience bounds every wait for something that must happen.
const patience = 30 * time.Second

// story is a test in a box.
type story struct {
	*testing.T
	*rig.Rig
	watched map[string]bool // units whose journal is shown if the story fails
	alone   []string        // what install changes in every example, by standAlone
}

// newStory boots the box of a story. Stories run side by side: each has a network, a systemd and a bpffs of its own.
func newStory(t *testing.T) *story {
	t.Helper()
	return newStoryWith(t, bin, box.Options{Journal: true, Timeout: patience})
}

func newStoryWith(t *testing.T, bin string, o box.Options) *story {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	t.Parallel()
	r, err := rig.New(context.Background(), bin, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return &story{T: t, Rig: r, watched: map[string]bool{}}
}

// must ends the story if something that has to work did not.
func (s *story) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// install installs an example, changed as rig.Example says.
func (s *story) install(example string, oldnew ...string) *service {
	s.Helper()
	text, err := rig.Example(example, append(oldnew, s.alone...)...)
	s.must(err)
	return s.installText(text)
}

func (s *story) installText(toml string) *service {
	s.Helper()
	svc, err := s.Install(toml)
	s.must(err)
	if !s.watched[svc.Unit] {
		s.watched[svc.Unit] = true
		s.Cleanup(func() {
			if s.Failed() {
				s.dump(svc.Unit)
			}
		})
	}
	return &service{svc, s}
}

// dumped is how many lines of a journal are shown.
const dumped = 60

// dump shows the end of a unit's journal, but for what systemd says of every restart with processes that stay.
func (s *story) dump(unit string) {
	journal, err := s.Journal(unit)
	journal = slices.DeleteFunc(journal, func(line string) bool {
		return strings.Contains(line, "left-over process") || strings.Contains(line, "remains running") || strings.HasPrefix(line, "This usually indicates")
	})
	journal = journal[max(0, len(journal)-dumped):]
	for i, line := range journal {
		journal[i] = line[:min(len(line), 500)]
	}
	s.Logf("journal of %s (%v):\n%s", unit, err, strings.Join(journal, "\n"))
}

// service is an installed service, in the words of a story.
type service struct {
	*rig.Service
	s *story
}

func (v *service) start() {
	v.s.Helper()
	v.s.must(v.Start())
}

func (v *service) restart() {
	v.s.Helper()
	_, err := v.Restart()
	v.s.must(err)
}

// quickly makes an example's instances drain in seconds instead of minutes. On a busy machine the load itself may stand still for a second or
// two, which must not be taken for the end of its flows.
func quickly(watch string) []string {
	return []string{"[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"" + watch + "\"\n[drain]\nidle = \"5s\"\ngrace = \"1s\"\ntimeout = \"1m\"\n"}
}

// load starts the story's usual load: 200 flows of 5 seconds on average, 4,000 datagrams a second.
func (v *service) load(change ...func(*load.Options)) *driver {
	v.s.Helper()
	// What waits while grm-activate backs off, for up to 5 seconds, is late and not lost.
	o := load.Options{Flows: 200, Pace: 50 * time.Millisecond, Length: 100, Seed: 1, Deadline: 12 * time.Second}
	for _, f := range change {
		f(&o)
	}
	g, err := v.Service.Load(context.Background(), o)
	v.s.must(err)
	d := &driver{g, v.s}
	v.s.Cleanup(func() { g.Stop() })
	return d
}

// forever makes flows that do not end before the load does.
func forever(o *load.Options) { o.Length = 10_000_000 }

// driver is a running load.
type driver struct {
	*load.Generator
	s *story
}

// until waits for the account to meet a condition.
func (d *driver) until(what string, met func(load.Result) bool) {
	d.s.Helper()
	d.s.must(d.Until(what, patience, met))
}

// newFlowsAt waits until an instance got new flows, n of them in all.
func (d *driver) newFlowsAt(instance string, n uint64) {
	d.s.Helper()
	d.until(fmt.Sprintf("%d flows began at instance %s", n, instance), func(r load.Result) bool { return r.Instances[instance].Flows >= n })
}

// more waits until so many more datagrams were sent.
func (d *driver) more(n uint64) {
	d.s.Helper()
	goal := d.Snapshot().Sent + n
	d.until(fmt.Sprintf("%d datagrams were sent", goal), func(r load.Result) bool { return r.Sent >= goal })
}

// end stops the load and fails the story if anything was lost, moved or answered twice.
func (d *driver) end() load.Result {
	d.s.Helper()
	r := d.stop()
	if err := r.Err(); err != nil {
		d.s.counters()
		d.s.Error(err)
	}
	return r
}

// stop stops the load. What went wrong is the caller's to judge.
func (d *driver) stop() load.Result {
	d.s.Helper()
	r, err := d.Stop()
	d.s.must(err)
	if r.Pending() != 0 || r.Sent == 0 {
		d.s.Errorf("the account does not add up: %v", r)
	}
	return r
}

// server is the one server there is, or, if there are several, the newest.
func (v *service) server() box.Process {
	v.s.Helper()
	procs := v.processes()
	if len(procs.Servers) == 0 {
		v.s.Fatalf("%s has no server: %+v", v.Unit, procs)
	}
	return procs.Servers[len(procs.Servers)-1]
}

// instance is how the newest server calls itself in its answers.
func (v *service) instance() string {
	v.s.Helper()
	return strconv.Itoa(v.server().BoxPid)
}

func (v *service) processes() rig.Processes {
	v.s.Helper()
	procs, err := v.Processes()
	v.s.must(err)
	return procs
}

// drained waits until only one instance is left.
func (v *service) drained() {
	v.s.Helper()
	v.s.must(v.s.Wait(v.Unit+" has only one instance", func() (bool, error) {
		procs, err := v.Processes()
		return len(procs.Servers) == 1 && len(procs.Keepers) == 1 && procs.Decoy != nil, err
	}))
}

// stores waits until so many descriptors are in the fd store: for an instance alone the control map, the link to its keeper, a flow table and
// its sockets.
func (v *service) stores(want int) {
	v.s.Helper()
	var n int
	err := v.s.Wait(fmt.Sprintf("%s stores %d descriptors", v.Unit, want), func() (bool, error) {
		var err error
		n, err = v.s.FDStore(v.Unit)
		return n == want, err
	})
	if err != nil {
		v.s.Fatalf("%v: there are %d", err, n)
	}
}

// statusHas waits until the unit's status line has all of the parts.
func (v *service) statusHas(parts ...string) {
	v.s.Helper()
	var status string
	err := v.s.Wait("the status says so", func() (bool, error) {
		var err error
		status, err = v.Status()
		for _, part := range parts {
			if !strings.Contains(status, part) {
				return false, err
			}
		}
		return true, err
	})
	if err != nil {
		v.s.Errorf("%v: status %q has not all of %q", err, status, parts)
	}
}

// discarded is how many datagrams were in the queues of instances that died while another one worked, as grm's journal has it.
func (v *service) discarded() uint64 {
	v.s.Helper()
	lines, err := v.s.Journal(v.Unit)
	v.s.must(err)
	var sum uint64
	for _, line := range lines {
		if before, _, ok := strings.Cut(line, " datagrams discarded"); ok {
			n, err := strconv.ParseUint(before[strings.LastIndex(before, " ")+1:], 10, 64)
			v.s.must(err)
			sum += n
		}
	}
	return sum
}

// active asserts the unit's state.
func (v *service) active(want string) {
	v.s.Helper()
	v.s.must(v.s.WaitActive(v.Unit, want))
}

// nothingLeft asserts that stopped services have left nothing: no process, no cgroup, no stored descriptor, no pin, no state.
func (s *story) nothingLeft(services ...*service) {
	s.Helper()
	for _, v := range services {
		v.active("inactive")
		procs := v.processes()
		if procs.Decoy != nil || len(procs.Keepers)+len(procs.Servers)+len(procs.Others) != 0 {
			s.Errorf("processes are left of %s: %+v", v.Unit, procs)
		}
		if n, err := s.FDStore(v.Unit); err != nil || n != 0 {
			s.Errorf("%d descriptors are left in the store of %s, %v", n, v.Unit, err)
		}
	}
	s.must(s.Wait("the cgroups are gone", func() (bool, error) {
		names, err := s.Cgroups()
		for _, name := range names {
			for _, v := range services {
				if strings.Contains(name, v.Unit) {
					return false, err
				}
			}
		}
		return true, err
	}))
	if pins, err := s.BPFFS(); err != nil || len(pins) != 0 {
		s.Errorf("pins are left: %q, %v", pins, err)
	}
	for _, v := range services {
		if files, err := s.Tree("/run/grm/" + v.Name); err != nil || len(files) != 0 {
			s.Errorf("files are left in /run/grm/%s: %q, %v", v.Name, files, err)
		}
	}
}
