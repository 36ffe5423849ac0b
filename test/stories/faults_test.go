package stories

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/internal/state"
	"grm/test/box"
	"grm/test/load"
)

var (
	faultCount = flag.Int("faults", 60, "how many system calls of grm-activate go wrong in TestFaults; 0: each one, once with an error and once with SIGKILL")
	faultSeed  = flag.Uint64("faultseed", 1, "which ones are chosen")
	faultOnly  = flag.String("fault", "", `only this one, such as "bpf.OBJ_PIN 2", with " KILLED" after it for SIGKILL`)
)

// fault is one system call that goes wrong.
type fault struct {
	call string // as test/fault names it
	n    int
	kill bool // the process gets SIGKILL instead of an error
}

func (f fault) String() string {
	if f.kill {
		return fmt.Sprintf("SIGKILL at %s %d", f.call, f.n)
	}
	return fmt.Sprintf("%v at %s %d", f.errno(), f.call, f.n)
}

// errno is an error that the call can have in real life, and that does not mean "there is none".
func (f fault) errno() unix.Errno {
	name, _, _ := strings.Cut(f.call, ".")
	switch name {
	case "bpf", "mmap":
		return unix.ENOMEM
	case "openat", "openat2", "socket", "pipe2":
		return unix.EMFILE
	case "bind":
		return unix.EADDRNOTAVAIL
	case "mkdirat", "write", "renameat":
		return unix.ENOSPC
	case "sendmsg", "sendto":
		return unix.ENOBUFS
	case "flock":
		return unix.ENOLCK
	case "fchown", "fchmod", "mount", "setsockopt":
		return unix.EPERM
	}
	return unix.EIO
}

// Where a unit with faults finds them.
const faultDir = "/run/fault"

// faulty is a service whose ExecStartPre= can be told to fail.
type faulty struct {
	*service
	reasons map[string]bool
}

// newFaulty installs the echo server, with instances that go as soon as their flows of a second do.
func newFaulty(t *testing.T) faulty {
	s := newStory(t)
	s.must(buildTools())
	s.must(s.WriteFile(faultDir+"/none", "", 0o644))
	echo := s.install("echo", "[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"0s\"\n[drain]\nidle = \"3s\"\ngrace = \"0s\"\ntimeout = \"1m\"\n")
	unit, err := s.ReadFile("/etc/systemd/system/" + echo.Unit)
	s.must(err)
	pre := regexp.MustCompile(`(?m)^ExecStartPre=\+(.*(?:\\\n.*)*)$`).FindStringSubmatch(unit)
	if pre == nil {
		t.Fatalf("no ExecStartPre= in\n%s", unit)
	}
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/fault.conf": "[Service]\nExecStartPre=\nExecStartPre=+" + box.BinDir + "/test/fault " + faultDir + " " + pre[1] + "\n"}))
	return faulty{echo, map[string]bool{}}
}

// order has the next run of ExecStartPre= go wrong, or only write its log.
func (v faulty) order(f *fault) {
	v.s.Helper()
	order := map[string]any{}
	if f != nil {
		order = map[string]any{"Call": f.call, "N": f.n, "Kill": f.kill, "Errno": f.errno()}
	}
	text, err := json.Marshal(order)
	v.s.must(err)
	v.s.must(v.s.WriteFile(faultDir+"/order", string(text), 0o644))
}

// log is what the run that took the order called.
func (v faulty) log() []string {
	v.s.Helper()
	var text string
	v.s.must(v.s.Wait("there is a log of system calls", func() (bool, error) {
		var err error
		if text, err = v.s.ReadFile(faultDir + "/log"); errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return true, err
	}))
	_, err := v.s.Exec("rm", faultDir+"/log")
	v.s.must(err)
	return strings.Split(strings.TrimSpace(text), "\n")
}

// happened says whether the fault that was ordered came about.
func (v faulty) happened(f fault) bool {
	v.s.Helper()
	want := fmt.Sprintf("%s %d %s ", f.call, f.n, unix.ErrnoName(f.errno()))
	if f.kill {
		want = fmt.Sprintf("%s %d KILLED ", f.call, f.n)
	}
	return slices.ContainsFunc(v.log(), func(line string) bool { return strings.HasPrefix(line, want) })
}

// record is what root has written down of the service.
func (v *service) record() state.State {
	v.s.Helper()
	var st state.State
	text, err := v.s.ReadFile(state.Root + "/" + v.Name + "/state.json")
	v.s.must(err)
	v.s.must(json.Unmarshal([]byte(text), &st))
	return st
}

// remains is what a service has outside of its processes, and what its record says of it.
type remains struct {
	pins, files []string
	stored      int
	processes   string
	newest      uint64 // generation
	pending     bool
}

var cgroupID = regexp.MustCompile(`hooks/\d+`)

func (v *service) remains() remains {
	v.s.Helper()
	var r remains
	var err error
	r.pins, err = v.s.BPFFS()
	v.s.must(err)
	for i, pin := range r.pins {
		r.pins[i] = cgroupID.ReplaceAllString(pin, "hooks/CGROUP")
	}
	slices.Sort(r.pins)
	r.files, err = v.s.Tree("/run/grm")
	v.s.must(err)
	r.stored, err = v.s.FDStore(v.Unit)
	v.s.must(err)
	st := v.record()
	// One that has ended stays in the record until the next start.
	for _, b := range st.Banks {
		r.newest = max(r.newest, b.Generation)
	}
	r.pending = st.Pending != nil
	procs := v.processes()
	r.processes = fmt.Sprintf("decoy %v, %d keepers, %d servers, others %v", procs.Decoy != nil, len(procs.Keepers), len(procs.Servers), procs.Others)
	return r
}

// unchanged fails the story if something else remains than before. What ends with a process, as what systemd knows of it, may take a moment.
func (v *service) unchanged(f any, before remains) {
	v.s.Helper()
	var now remains
	if err := v.s.Wait("all is as before", func() (bool, error) {
		now = v.remains()
		return fmt.Sprint(now) == fmt.Sprint(before), nil
	}); err != nil {
		v.s.Errorf("%v: %v:\nbefore %+v\nafter  %+v", f, err, before, now)
	}
}

// choose takes a sample of what a log has: each name once, then more of them until there are n. All of them if n is 0.
func choose(log []string, n int, random *rand.Rand) []fault {
	if *faultOnly != "" {
		var f fault
		var how string
		_, _ = fmt.Sscan(*faultOnly, &f.call, &f.n, &how) // the test tells if it does not happen
		f.kill = how == "KILLED"
		return []fault{f}
	}
	counts := map[string]int{}
	for _, line := range log {
		name, _, _ := strings.Cut(line, " ")
		counts[name]++
	}
	delete(counts, "execve") // of grm-activate itself: a missing program is another story
	names := slices.Sorted(maps.Keys(counts))
	var all []fault
	if n == 0 {
		for _, name := range names {
			for i := range counts[name] {
				all = append(all, fault{name, i + 1, false}, fault{name, i + 1, true})
			}
		}
		return all
	}
	random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for i := range n {
		name := names[i%len(names)]
		all = append(all, fault{name, 1 + random.IntN(counts[name]), random.IntN(4) == 0})
	}
	return all
}

// TestFaults has the system calls of grm-activate go wrong, one at a time, in each kind of start: beside an instance that serves, first of all,
// after a crash, and after the decoy was killed. What serves goes on as if nothing had happened, nothing is left of the attempt, and the next
// start works.
func TestFaults(t *testing.T) {
	shares := map[string]struct {
		share int // of twelve
		run   func(faulty, func(log []string) []fault)
	}{
		"restart": {6, faulty.restarts},
		"first":   {2, faulty.firstStarts},
		"crash":   {2, faulty.crashes},
		"decoy":   {2, faulty.decoys},
	}
	for name, kind := range shares {
		t.Run(name, func(t *testing.T) {
			v := newFaulty(t)
			t.Logf("-faultseed %d", *faultSeed)
			random := rand.New(rand.NewPCG(*faultSeed, uint64(len(name))))
			kind.run(v, func(log []string) []fault {
				n := *faultCount * kind.share / 12
				if *faultCount > 0 {
					n = max(n, 1)
				}
				chosen := choose(log, n, random)
				t.Logf("%d of %d calls: %v", len(chosen), len(log), chosen)
				return chosen
			})
		})
	}
}

// flows are as short as instances are to be.
func (v faulty) flows() *driver {
	v.s.Helper()
	return v.load(func(o *load.Options) { o.Pace, o.Length = 100*time.Millisecond, 10 })
}

// restarts has restarts fail while an instance serves.
func (v faulty) restarts(choose func(log []string) []fault) {
	s := v.s
	v.start()
	g := v.flows()
	v.order(nil)
	v.restart()
	log := v.log()
	v.drained()
	before := v.remains()
	for i, f := range choose(log) {
		g.Mark(f.String())
		old := v.instance()
		v.order(&f)
		_, err := v.Restart()
		v.settled("active")
		happened := v.happened(f)
		if !happened {
			s.Logf("%v: did not happen", f)
		}
		if err == nil {
			if f.kill && happened {
				s.Errorf("%v: the restart did not fail", f)
			}
			s.Logf("%v: the start does without", f)
			if v.instance() == old {
				s.Errorf("%v: the restart came to nothing and did not fail", f)
			}
			v.drained()
			before = v.remains()
			continue
		}
		if now := v.instance(); now != old {
			s.Errorf("%v: the failed restart left %s working, not %s", f, now, old)
		}
		v.statusHas("serving", "failed")
		v.reason(f)
		v.unchanged(f, before)
		if i%10 != 9 {
			continue
		}
		// The next good one.
		v.restart()
		if v.instance() == old {
			s.Errorf("%v: no new instance afterwards", f)
		}
		v.drained()
		now := v.remains()
		if now.newest <= before.newest {
			s.Errorf("%v: then a restart: generation %d after %d", f, now.newest, before.newest)
		}
		before.newest = now.newest
		v.unchanged(f, before)
	}
	v.restart()
	g.newFlowsAt(v.instance(), 100)
	g.end()
	v.drained()
	s.must(v.Stop())
	s.nothingLeft(v.service)
}

// reason asserts that the unit says why, and shows each reason once.
func (v faulty) reason(f fault) {
	v.s.Helper()
	st := v.record()
	want := f.errno().Error()
	if st.Failed != nil && strings.HasPrefix(st.Failed.Reason, "user ") && !strings.Contains(st.Failed.Reason, want) {
		want = "not known as another one than root" // for some calls that is all that is to be had of Go's library
	}
	if f.kill {
		want = "killed"
	}
	if f.call == "statfs" && !f.kill {
		return // what has no file system to show counts as not mounted, and what comes of that is the reason
	}
	if st.Failed != nil && strings.Contains(st.Failed.Reason, "ExecStartPre=") && !f.kill {
		// It could not even open the record to say more, or Go's runtime gave it up. The journal tells.
		lines, err := v.s.Journal(v.Unit)
		v.s.must(err)
		if slices.ContainsFunc(lines[max(0, len(lines)-100):], func(line string) bool { return strings.Contains(line, want) || strings.HasPrefix(line, "goroutine ") }) {
			return
		}
	}
	if st.Failed == nil || !strings.Contains(st.Failed.Reason, want) {
		v.s.Errorf("%v: the record says %+v", f, st.Failed)
		return
	}
	v.s.Logf("%v: %s", f, st.Failed.Reason)
}

// firstStarts has starts fail while nothing runs. systemd tries again by itself.
func (v faulty) firstStarts(choose func(log []string) []fault) {
	s := v.s
	v.order(nil)
	v.start()
	log := v.log()
	s.must(v.Stop())
	s.nothingLeft(v.service)
	for _, f := range choose(log) {
		v.order(&f)
		err := v.Start()
		v.settled("active")
		switch happened := v.happened(f); {
		case !happened && err != nil:
			s.Errorf("%v: did not happen, but the start failed: %v", f, err)
		case !happened:
			s.Logf("%v: did not happen", f)
		case err == nil && f.kill:
			s.Errorf("%v: the start did not fail", f)
		case err == nil:
			s.Logf("%v: the start does without", f)
		}
		g := v.flows()
		v.restart()
		g.newFlowsAt(v.instance(), 10)
		g.end()
		v.drained()
		s.must(v.Stop())
		s.nothingLeft(v.service)
	}
}

// crashes has the start after a crash fail: the one after that takes over the sockets, with what waits in them.
func (v faulty) crashes(choose func(log []string) []fault) {
	s := v.s
	v.start()
	g := v.load(forever)
	crash := func() {
		// Else the wait between automatic starts grows with each.
		_, err := s.Systemctl("reset-failed", v.Unit)
		s.must(err)
		victim := v.server()
		g.Gone(v.instance())
		s.must(victim.Kill(unix.SIGKILL))
		s.must(s.Wait("another server runs", func() (bool, error) {
			procs, err := v.Processes()
			return len(procs.Servers) == 1 && procs.Decoy != nil && procs.Servers[0].BoxPid != victim.BoxPid, err
		}))
		v.settled("active")
		next := v.instance()
		g.until("the next one answers", func(r load.Result) bool { return r.Instances[next].Answers > 200 })
	}
	v.order(nil)
	crash()
	kills := uint64(1)
	for _, f := range choose(v.log()) {
		g.Mark(f.String())
		v.order(&f)
		crash()
		kills++
		if !v.happened(f) {
			s.Logf("%v: did not happen", f)
		}
		if v.record().Pending != nil {
			s.Errorf("%v: a start is still pending in the record", f)
		}
	}
	r := g.stop()
	v.balanced(r, kills)
	if r.Flows != 200 {
		s.Errorf("all flows go on: %v", r)
	}
	v.restart()
	v.drained()
	s.must(v.Stop())
	s.nothingLeft(v.service)
}

// decoys has the start after the decoy's end fail: the one after that stands in for the instance that serves.
func (v faulty) decoys(choose func(log []string) []fault) {
	s := v.s
	v.start()
	g := v.flows()
	kill := func() {
		victim := v.processes().Decoy
		s.must(victim.Kill(unix.SIGKILL))
		s.must(s.Wait("another decoy runs", func() (bool, error) {
			procs, err := v.Processes()
			return procs.Decoy != nil && procs.Decoy.BoxPid != victim.BoxPid, err
		}))
		v.settled("active")
	}
	v.order(nil)
	kill()
	server := v.server()
	before := v.remains()
	for _, f := range choose(v.log()) {
		g.Mark(f.String())
		v.order(&f)
		kill()
		if !v.happened(f) {
			s.Logf("%v: did not happen", f)
		}
		if now := v.server(); now.BoxPid != server.BoxPid {
			s.Logf("%v: the server was replaced", f)
			server = now
			v.drained()
			before = v.remains()
			continue
		}
		v.unchanged(f, before)
	}
	v.restart()
	g.newFlowsAt(v.instance(), 10)
	g.end()
	v.drained()
	s.must(v.Stop())
	s.nothingLeft(v.service)
}
