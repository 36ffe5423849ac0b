package decoy

import (
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
)

// begun starts a generation and waits until it works.
func (m *manager) begun() (*run, int) {
	m.t.Helper()
	m.activate(2)
	m.said = nil
	r := m.start()
	pid, _ := m.report("start")
	m.hears("READY=1")
	return r, pid
}

func TestStart(t *testing.T) {
	m := newManager(t, "report=before", "say=STATUS=warm|X_MINE=1", "say=READY=1").withControl()
	m.store = append([]named{}, m.store...)
	m.put("mine", 0)
	r, pid := m.begun()
	_ = r
	b := m.bankOf(1)
	if m.ctl.Working() != m.bank[1] || !m.ctl.Alive(m.bank[1]) || b.State != control.Serving || b.ReadyAt == 0 || b.Server != pid {
		t.Errorf("after READY=1: order %v, %+v", m.ctl.Order().Banks(), b)
	}
	if i := slices.IndexFunc(m.said, func(s string) bool { return strings.HasPrefix(s, "READY=1\nSTATUS=gen 1 serving since ") }); i < 0 {
		t.Errorf("READY=1 and STATUS= did not come in one message: %q", m.said)
	}
	if got := m.ask(m.port); got != "1" {
		t.Errorf("answer from %q", got)
	}
	var env environ
	for _, s := range m.heard {
		if _, rest, ok := strings.Cut(s, " start "); ok {
			env = strings.Split(rest, "\x01")
		}
	}
	for key, want := range map[string]string{
		"LISTEN_FDS": "3", "LISTEN_FDNAMES": "echo:echo:mine", "LISTEN_PID": strconv.Itoa(pid), "WATCHDOG_PID": strconv.Itoa(pid),
		"SYSTEMD_EXEC_PID": strconv.Itoa(pid), "GRM_GENERATION": "1", "GRM_STOP_SIGNAL": "SIGTERM", "GRM_DRAIN_SIGNAL": "", stageVar: "", bankVar: "", verbVar: "",
	} {
		if got := env.get(key); got != want {
			t.Errorf("server has %s=%q, want %q", key, got, want)
		}
	}
	if got, want := m.names(), []string{"grm.echo.1.0", "grm.echo.1.1", "grm.keeper.1", "mine"}; !slices.Equal(got, want) {
		t.Errorf("fd store holds %q, want %q", got, want)
	}
}

func TestRestart(t *testing.T) {
	m := newManager(t, "say=READY=1").withControl()
	first, server1 := m.begun()
	port1 := m.port
	for generation := uint64(2); generation <= 4; generation++ {
		m.ctl.SetRequest(control.Restart)
		first.signal(syscall.SIGTERM)
		first.expect(0)
		if !alive(server1) || m.ask(port1) != strconv.Itoa(int(generation-1)) {
			t.Fatal("the old server does not go on")
		}
		second, server2 := m.begun()
		m.until("old generation drained", func() bool { return m.bankOf(generation-1).State == control.Ended })
		m.until("old server gone", func() bool { return !alive(server1) })
		if m.ctl.Working() != m.bank[generation] || m.ctl.Alive(m.bank[generation-1]) || len(m.ctl.Order().Banks()) != 1 {
			t.Errorf("order %v, alive %b", m.ctl.Order().Banks(), m.ctl.AliveBanks())
		}
		want := []string{socketName("echo", generation, 0), socketName("echo", generation, 1), keeperName(generation)}
		m.until("old generation out of the store", func() bool { return slices.Equal(m.names(), want) })
		first, server1, port1 = second, server2, m.port
	}
}

func TestNewOneFails(t *testing.T) {
	for _, c := range []struct {
		what   string
		steps  []string
		change func(*Options)
		status int
	}{
		{"exits", []string{"exit=3"}, nil, 3},
		{"exits with success", []string{"exit=0"}, nil, 0},
		{"crashes", nil, func(o *Options) { o.Command = []string{"/bin/sh", "-c", "kill -SEGV $$"} }, 139},
		{"is killed", []string{"kill=9"}, nil, 137},
		{"hangs", nil, func(o *Options) { o.ReadyTimeout = 100 * time.Millisecond }, ExitNotReady},
		{"hangs and ignores signals", []string{"ignore-term"}, func(o *Options) { o.ReadyTimeout = 100 * time.Millisecond }, ExitNotReady},
		{"does not exist", nil, func(o *Options) { o.Command = []string{"/nonexistent"} }, 127},
		{"cannot be executed", nil, func(o *Options) { o.Command = []string{"/etc/passwd"} }, 126},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			m := newManager(t, "say=READY=1").withControl()
			first, server := m.begun()
			first.signal(syscall.SIGTERM)
			first.expect(0)
			m.server, m.said = c.steps, nil
			good := m.o
			if c.change != nil {
				c.change(&m.o)
			}
			port := m.port
			m.activate(2)
			m.start().expect(c.status)
			if m.ctl.Working() != m.bank[1] || m.bankOf(1).State != control.Serving || m.bankOf(2).State != control.Ended || m.heardBySystemd("READY=1") {
				t.Errorf("order %v, %+v, systemd heard %q", m.ctl.Order().Banks(), m.bankOf(2), m.said)
			}
			if want := []string{"grm.echo.1.0", "grm.echo.1.1", "grm.keeper.1"}; !slices.Equal(m.names(), want) {
				t.Errorf("fd store holds %q, want %q", m.names(), want)
			}
			if got := len(m.processes()); got != 2 {
				t.Errorf("%d processes live, want keeper and server of gen 1", got)
			}
			// The next start stands in.
			m.o = good
			m.plan(control.StandIn, 1)
			standIn := m.start()
			m.hears("READY=1\nSTATUS=gen 1 serving")
			if m.ask(port) != "1" || !alive(server) {
				t.Error("gen 1 does not serve")
			}
			// It forwards signals, and sees the end.
			standIn.signal(syscall.SIGUSR1)
			m.report("signal 10")
			_ = unix.Kill(server, unix.SIGKILL)
			standIn.expect(ExitFailure)
		})
	}
}
