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

	"grm/test/box"
	"grm/test/load"
)

// TestSoak does at random what the other stories do one at a time, for $GRM_SOAK (a minute by default), by the seed in $GRM_SEED.
//
// A model predicts who may answer: a flow that begins does so at the instance that is working, or was when the action began; a flow that lives
// changes its instance only when that was killed; and what is lost is what was discarded, perished or found a queue full, which is counted, and
// at most the one datagram that a killed server had read.
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
	s := newOdd(t)
	s.standAlone()
	m := &model{story: s, seed: seed, random: rand.New(rand.NewPCG(seed, 0))}
	m.must(s.WriteFile(wanted, "", 0o644))
	m.must(s.WriteFile(well, "", 0o644))
	m.echo = m.installed()
	m.must(s.InstallUnits(map[string]string{m.echo.Unit + ".d/wanted.conf": "[Unit]\nConditionPathExists=" + wanted + "\n"}))
	m.echo.start()
	m.begin()
	actions := map[string]func(*model){
		"restart":           (*model).restart,
		"storm":             (*model).storm,
		"bad version":       (*model).badVersion,
		"probe fails":       (*model).probeFails,
		"condition fails":   (*model).conditionFails,
		"stop":              (*model).stop,
		"crash":             (*model).crash,
		"out of memory":     (*model).outOfMemory,
		"kill older":        (*model).killOlder,
		"kill all":          (*model).killAll,
		"kill decoy":        (*model).killDecoy,
		"kill keeper":       (*model).killKeeper,
		"kill grm-activate": func(m *model) { m.echo.restartKilled() },
		"stopped":           (*model).stopped,
		"drain --now":       (*model).drainNow,
		"rollback":          (*model).rollback,
		"daemon-reload":     func(m *model) { m.systemctl("daemon-reload") },
		"daemon-reexec":     func(m *model) { m.systemctl("daemon-reexec") },
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
	m.account()
	m.echo.drained()
	s.must(m.echo.Stop())
	s.nothingLeft(m.echo)
}

// Files by which the soak has the unit's condition and the probe of its watch fail.
const (
	wanted = "/run/wanted"
	well   = "/run/well"
)

func orElse(v, otherwise string) string {
	if v == "" {
		return otherwise
	}
	return v
}

// model is what the soak knows of the service.
type model struct {
	*story
	seed     uint64
	random   *rand.Rand
	echo     *service
	load     *driver
	step     int
	working  string
	expected []string // where flows may have begun since the step did
	killed   uint64   // servers that were killed, each of which may have read one datagram
	lost     uint64   // in the loads that have ended
}

// installed is the service with a good version, changed.
func (m *model) installed(oldnew ...string) *service {
	m.Helper()
	if len(oldnew) == 0 {
		oldnew = has("hungry")
	}
	settings := quickly("1s")
	settings[1] = strings.Replace(settings[1], "[watch]\n", "[watch]\nprobe = [\"/usr/bin/test\", \"-e\", \""+well+"\"]\n", 1)
	return m.install("echo", append(settings, oldnew...)...)
}

// begin begins with a load.
func (m *model) begin() {
	m.Helper()
	m.load = m.echo.load(func(o *load.Options) { o.Seed = m.seed })
	m.working = m.echo.instance()
}

// account ends the load. All that was lost up to now has to be accounted for.
func (m *model) account() {
	m.Helper()
	r := m.load.stop()
	m.lost += r.Lost
	discarded, overflow, perished := m.echo.discarded(), m.overflow(), m.echo.perished()
	if least := discarded + overflow + perished; m.lost < least || m.lost > least+m.killed || r.Moved+r.Duplicated+r.Strange != 0 {
		m.counters()
		m.Errorf("%d servers were killed, %d datagrams discarded, %d found a queue full, %d perished, %d were lost: %v", m.killed, discarded, overflow, perished, m.lost, r)
	}
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

// badVersion restarts into a version that does not get ready, or dies as soon as it is.
func (m *model) badVersion() {
	const server = `"/usr/lib/grm/examples/echo"`
	versions := [][]string{
		{server, `"/bin/false"`},
		{server, `"/etc/passwd"`},
		{server, `"/usr/lib/grm/examples/none"`},
		{server, `"/bin/sh", "-c", "kill -SEGV $$"`},
		never("1s"),
		has("dies"),
	}
	i := m.random.IntN(len(versions))
	m.installed(versions[i]...)
	if _, err := m.echo.Restart(); err == nil && i != len(versions)-1 {
		m.Errorf("a restart into %q did not fail", versions[i])
	}
	m.echo.statusHas("failed")
	m.echo.settled("active")
	if now := m.echo.instance(); now != m.working {
		m.Errorf("a version that failed left %s working in place of %s", now, m.working)
	}
	m.installed()
}

// conditionFails restarts with a condition that does not hold: the unit is inactive for a while, and its instances go on. systemd throws away
// what is stored, so that none of them is safe from a crash before the next one works.
func (m *model) conditionFails() {
	m.must(os.Remove(m.Path(wanted)))
	if _, err := m.echo.Restart(); err != nil {
		m.Logf("restart with a failed condition: %v", err)
	}
	m.echo.settled("inactive")
	m.load.more(uint64(m.random.IntN(2000)))
	m.must(m.WriteFile(wanted, "", 0o644))
	m.echo.start()
	m.expected = append(m.expected, m.echo.instance())
	m.working = m.echo.instance()
	m.drainNow()
}

// stop ends everything, perhaps in the midst of a restart, and begins anew.
func (m *model) stop() {
	m.account()
	switch m.random.IntN(3) {
	case 0:
		m.echo.later("restart")
	case 1:
		m.installed(never("40s")...)
		m.echo.startingAfter(box.Process{})
		m.installed()
	}
	m.must(m.echo.Stop())
	_, _ = m.Systemctl("reset-failed", m.echo.Unit) // as in TestStopInEachPhase
	m.nothingLeft(m.echo)
	m.echo.start()
	m.begin()
}

// crash kills the newest server, alone or with one of those that look after it: within its watch the one before it takes over, later a new one does.
func (m *model) crash() {
	procs := m.echo.processes()
	server := m.echo.server()
	victims := []box.Process{server}
	switch m.random.IntN(3) {
	case 0:
		victims = append(victims, *procs.Decoy)
	case 1:
		if keeper := procs.Keeper(server); keeper != nil { // else an earlier step has killed it
			victims = append(victims, *keeper)
		}
	}
	if m.random.IntN(2) == 0 {
		slices.Reverse(victims)
	}
	m.dies(server, func() { m.kill(victims...) })
}

// outOfMemory is a crash as the kernel makes it.
func (m *model) outOfMemory() {
	server := m.echo.server()
	m.dies(server, func() { m.starve(m.echo, server) })
}

// dies has the newest server die, and waits until another one has its place.
func (m *model) dies(server box.Process, kill func()) {
	m.killed++
	// Until the next one is ready new flows go to any that is there, if nothing of it is stored: it may have worked before, and work again.
	for _, older := range m.echo.processes().Servers {
		m.expected = append(m.expected, strconv.Itoa(older.BoxPid))
	}
	m.load.Gone(strconv.Itoa(server.BoxPid))
	before := m.load.Snapshot()
	kill()
	m.load.until("flows begin at another instance", func(r load.Result) bool {
		for name, in := range r.Instances {
			if name != strconv.Itoa(server.BoxPid) && in.Flows > before.Instances[name].Flows+10 {
				m.expected = append(m.expected, name)
				return true
			}
		}
		return false
	})
}

// killOlder kills a server that stands by or drains, perhaps with its keeper.
func (m *model) killOlder() {
	if len(m.echo.processes().Servers) < 2 {
		m.restart()
	}
	procs := m.echo.processes()
	older := procs.Servers[:len(procs.Servers)-1]
	if len(older) == 0 {
		return // it has drained
	}
	victim := older[m.random.IntN(len(older))]
	m.killed++
	m.load.Gone(strconv.Itoa(victim.BoxPid))
	if keeper := procs.Keeper(victim); keeper != nil && m.random.IntN(2) == 0 {
		m.kill(*keeper)
	}
	m.kill(victim)
	m.must(m.Wait("it is gone", func() (bool, error) { return unix.Kill(victim.Pid, 0) == unix.ESRCH, nil }))
}

// killAll kills all there is by way of systemd.
func (m *model) killAll() {
	victims := m.echo.processes().Servers
	for _, victim := range victims {
		m.killed++
		m.expected = append(m.expected, strconv.Itoa(victim.BoxPid)) // not all of them die at once
		m.load.Gone(strconv.Itoa(victim.BoxPid))
	}
	m.systemctl("kill", "--signal=KILL", m.echo.Unit)
	m.must(m.Wait("another server is the newest", func() (bool, error) {
		procs, err := m.echo.Processes()
		return procs.Decoy != nil && len(procs.Servers) == 1 && procs.Servers[0].BoxPid > victims[len(victims)-1].BoxPid, err
	}))
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
	m.expected = append(m.expected, m.echo.instance())
	m.grm("rollback", "echo")
	m.drainNow()
}

// probeFails is a rollback that a probe brings about.
func (m *model) probeFails() {
	m.must(os.Remove(m.Path(well)))
	m.echo.restart()
	m.expected = append(m.expected, m.echo.instance())
	m.echo.statusHas("failed: watch probe")
	m.must(m.WriteFile(well, "", 0o644))
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
