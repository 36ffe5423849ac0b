package stories

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/test/load"
)

// TestSoak does at random what the other stories do one at a time, for $GRM_SOAK (a minute by default), by the seed in $GRM_SEED.
//
// A model predicts who may answer: a flow that begins does so at the instance that is working, or was when the action began; a flow that lives
// changes its instance only when that was killed; and what is lost is what was discarded at flips back, which grm counts, and at most the one
// datagram that a killed server had read, or what waited for one that had worked again.
func TestSoak(t *testing.T) {
	length, err := time.ParseDuration(orElse(os.Getenv("GRM_SOAK"), "1m"))
	if err != nil {
		t.Fatalf("GRM_SOAK: %v", err)
	}
	seed, err := strconv.ParseUint(orElse(os.Getenv("GRM_SEED"), strconv.FormatInt(time.Now().UnixNano(), 10)), 10, 64)
	if err != nil {
		t.Fatalf("GRM_SEED: %v", err)
	}
	t.Logf("GRM_SEED=%d", seed)
	s := newStory(t)
	m := &model{story: s, random: rand.New(rand.NewPCG(seed, 0))}
	m.echo = s.install("echo", quickly("1s")...)
	m.echo.start()
	m.load = m.echo.load(func(o *load.Options) { o.Seed = seed })
	m.working = m.echo.instance()
	actions := map[string]func(*model){
		"restart":       (*model).restart,
		"storm":         (*model).storm,
		"bad version":   (*model).badVersion,
		"crash":         (*model).crash,
		"kill decoy":    (*model).killDecoy,
		"kill keeper":   (*model).killKeeper,
		"stopped":       (*model).stopped,
		"drain --now":   (*model).drainNow,
		"rollback":      (*model).rollback,
		"daemon-reload": func(m *model) { m.systemctl("daemon-reload") },
		"daemon-reexec": func(m *model) { m.systemctl("daemon-reexec") },
	}
	names := slices.Sorted(maps.Keys(actions))
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		m.step++
		name := names[m.random.IntN(len(names))]
		t.Logf("%d: %s, working instance %s", m.step, name, m.working)
		m.load.Mark(fmt.Sprintf("%d: %s", m.step, name))
		before := m.load.Snapshot()
		m.expected = []string{m.working}
		actions[name](m)
		m.echo.settled("active")
		m.working = m.echo.instance()
		m.expected = append(m.expected, m.working)
		m.load.more(uint64(500 + m.random.IntN(4000)))
		m.check(before)
	}
	r := m.load.stop()
	if discarded := m.echo.discarded(); r.Lost < discarded || r.Lost > discarded+m.taken || r.Moved+r.Duplicated+r.Strange != 0 {
		t.Errorf("%d datagrams were discarded, killed servers may have taken %d: %v", discarded, m.taken, r)
	}
	m.echo.drained()
	s.must(m.echo.Stop())
	s.nothingLeft(m.echo)
}

func orElse(v, otherwise string) string {
	if v == "" {
		return otherwise
	}
	return v
}

// model is what the soak knows of the service.
type model struct {
	*story
	random   *rand.Rand
	echo     *service
	load     *driver
	step     int
	working  string
	expected []string // where flows may have begun since the step did
	taken    uint64   // datagrams that killed servers may have taken with them, at most
	newest   int      // pid of the newest server that an older one has worked after
}

// check compares where flows began since an earlier account with the prediction.
func (m *model) check(before load.Result) {
	m.Helper()
	for name, in := range m.load.Snapshot().Instances {
		// As in TestNewFlowsGoToTheNewInstance: answers under way.
		if n := in.Flows - before.Instances[name].Flows; n > 2 && !slices.Contains(m.expected, name) {
			m.Errorf("%d flows began at %s, expected are %q", n, name, m.expected)
		}
	}
}

func (m *model) systemctl(args ...string) {
	m.Helper()
	_, err := m.Systemctl(args...)
	m.must(err)
}

func (m *model) restart() { m.echo.restart() }

// storm restarts again before the last restart is over. Each instance that comes of it may have worked for a moment.
func (m *model) storm() {
	newest := m.echo.server().BoxPid
	for range 2 + m.random.IntN(5) {
		m.echo.later("restart")
		m.load.more(uint64(m.random.IntN(1000)))
	}
	m.echo.settled("active")
	for _, server := range m.echo.processes().Servers {
		if server.BoxPid > newest {
			m.expected = append(m.expected, strconv.Itoa(server.BoxPid))
		}
	}
}

func (m *model) badVersion() {
	good := quickly("1s")
	m.install("echo", append(good, `"/usr/lib/grm/examples/echo"`, `"/bin/false"`)...)
	if _, err := m.echo.Restart(); err == nil {
		m.Error("a restart into /bin/false did not fail")
	}
	m.echo.settled("active")
	if now := m.echo.instance(); now != m.working {
		m.Errorf("a version that failed left %s working in place of %s", now, m.working)
	}
	m.install("echo", good...)
}

// crash kills the newest server: within its watch the one before it takes over, later a new one does.
func (m *model) crash() {
	victim := m.echo.server()
	m.taken++
	if victim.BoxPid < m.newest {
		// It works again, and its sockets may have left the fd store: then they end with it and what is in them,
		// and new flows go to the newest older instance until the next one is ready.
		m.taken += 100
		for _, older := range m.echo.processes().Servers {
			m.expected = append(m.expected, strconv.Itoa(older.BoxPid))
		}
	}
	m.newest = max(m.newest, victim.BoxPid)
	m.load.Gone(strconv.Itoa(victim.BoxPid))
	before := m.load.Snapshot()
	m.must(victim.Kill(unix.SIGKILL))
	m.load.until("flows begin at another instance", func(r load.Result) bool {
		for name, in := range r.Instances {
			if name != strconv.Itoa(victim.BoxPid) && in.Flows > before.Instances[name].Flows+10 {
				m.expected = append(m.expected, name)
				return true
			}
		}
		return false
	})
}

// stopped stops the server for a while: whatever is sent to it waits.
func (m *model) stopped() {
	server := m.echo.server()
	m.must(server.Kill(unix.SIGSTOP))
	m.load.more(uint64(m.random.IntN(2000)))
	m.must(server.Kill(unix.SIGCONT))
}

// drainNow ends all instances but the one that works: their flows begin anew, and nothing is lost.
func (m *model) drainNow() {
	for _, server := range m.echo.processes().Servers {
		if name := strconv.Itoa(server.BoxPid); name != m.working {
			m.load.Gone(name)
		}
	}
	m.grm("drain", "--now", "echo")
	m.echo.drained()
}

// rollback restarts and goes back to the instance that worked before. The newer one ends, so that the newest is the one that works.
func (m *model) rollback() {
	m.echo.restart()
	newer := m.echo.server().BoxPid
	m.expected = append(m.expected, strconv.Itoa(newer))
	m.grm("rollback", "echo")
	m.newest = max(m.newest, newer)
	m.drainNow()
}

func (m *model) killDecoy() {
	victim := m.echo.processes().Decoy
	m.must(victim.Kill(unix.SIGKILL))
	m.must(m.Wait("another decoy runs", func() (bool, error) {
		procs, err := m.echo.Processes()
		return procs.Decoy != nil && procs.Decoy.BoxPid != victim.BoxPid, err
	}))
}

// killKeeper kills the keeper of the newest server, which goes on until a new instance takes its place.
func (m *model) killKeeper() {
	procs := m.echo.processes()
	newest := m.echo.server()
	if procs.Keeper(newest) == nil {
		return // an earlier step has killed it
	}
	m.must(killKeeper(procs))
	m.must(m.Wait("another server is the newest", func() (bool, error) {
		procs, err := m.echo.Processes()
		return procs.Decoy != nil && len(procs.Servers) > 0 && procs.Servers[len(procs.Servers)-1].BoxPid > newest.BoxPid, err
	}))
}

// TestNothingLeaks restarts 300 times under load and counts everything before and after.
func TestNothingLeaks(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", "[watch]\ntime = \"2s\"\n", "[watch]\ntime = \"0s\"\n[drain]\nidle = \"3s\"\ngrace = \"0s\"\ntimeout = \"1m\"\n")
	echo.start()
	g := echo.load(func(o *load.Options) { o.Pace, o.Length = 100*time.Millisecond, 10 })
	count := func() map[string]int {
		echo.drained()
		echo.stores(4)
		c := map[string]int{}
		pins, err := s.BPFFS()
		s.must(err)
		c["pins"] = len(pins)
		cgroups, err := s.Cgroups()
		s.must(err)
		c["cgroups"] = len(cgroups)
		for _, dir := range []string{"/run/grm", "/run/echo"} {
			files, err := s.Tree(dir)
			s.must(err)
			c[dir] = len(files)
		}
		procs := echo.processes()
		for name, pid := range map[string]int{"systemd": s.Pid(), "decoy": procs.Decoy.Pid, "keeper": procs.Keepers[0].Pid, "server": procs.Servers[0].Pid} {
			fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
			s.must(err)
			c["descriptors of "+name] = len(fds)
			statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
			s.must(err)
			pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
			s.must(err)
			c["KiB of "+name] = pages * os.Getpagesize() / 1024
		}
		return c
	}
	for range 5 {
		echo.restart() // the first ones make what stays
	}
	before := count()
	const restarts = 300
	for i := range restarts {
		if _, err := echo.Restart(); err != nil {
			t.Fatalf("restart %d: %v", i, err)
		}
		if i%8 != 0 {
			continue
		}
		// Not more at a time than there are banks.
		s.must(s.Wait("the older ones have drained", func() (bool, error) {
			procs, err := echo.Processes()
			return len(procs.Servers) < 16, err
		}))
	}
	g.end()
	after := count()
	for what, n := range after {
		slack := 0
		switch {
		case what == "descriptors of systemd":
			slack = 3 // its own come and go by one or two (timers, connections)
		case strings.HasPrefix(what, "KiB of "):
			slack = 2048 // pages that are shared come and go as well
		}
		if n > before[what]+slack {
			t.Errorf("%s: %d before %d restarts, %d after", what, before[what], restarts, n)
		}
	}
	s.must(echo.Stop())
	s.nothingLeft(echo)
}
