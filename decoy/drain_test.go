package decoy

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/control"
)

// packet makes the counters say that a packet has come for a bank just now.
func (m *manager) packet(bank int, assured bool) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &ts); err != nil {
		m.t.Fatal(err)
	}
	const offset, line = 4096, 64
	stamps := (*[2]uint32)(unsafe.Pointer(&m.mem[offset+bank*line+48]))
	stamps[0] = uint32(ts.Nano() >> 30)
	if assured {
		stamps[1] = stamps[0]
	}
}

// drained is a service with the given options whose gen 1, which had a packet,
// is replaced by gen 2.
func drained(t *testing.T, assured bool, change func(*Options), steps ...string) (m *manager, server1, server2, port1 int) {
	t.Helper()
	m = newManager(t, append([]string{"say=READY=1"}, steps...)...).withControl()
	change(&m.o)
	first, server1 := m.begun()
	port1 = m.port
	m.packet(m.bank[1], assured)
	first.leaves()
	_, server2 = m.begun()
	return m, server1, server2, port1
}

func TestDrainEndsWhenIdle(t *testing.T) {
	t.Parallel()
	m, server1, _, _ := drained(t, true, func(o *Options) { o.DrainIdle, o.DrainTimeout = 10*time.Second, time.Hour })
	m.hears("gen 1 draining, 1h0m0s left")
	for end := control.Now() + 4*time.Second; control.Now() < end; m.serve(10) {
		m.packet(m.bank[1], true)
	}
	if !alive(server1) || !m.ctl.Alive(m.bank[1]) {
		t.Error("ended while its flow lived")
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

func TestDrainGrace(t *testing.T) {
	t.Parallel()
	m, server1, _, _ := drained(t, false, func(o *Options) { o.DrainGrace, o.DrainTimeout = 10*time.Second, time.Hour })
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	for end := control.Now() + 2*time.Second; control.Now() < end; m.serve(10) {
		m.packet(m.bank[1], false)
	}
	if !alive(server1) || !m.ctl.Alive(m.bank[1]) {
		t.Error("ended within the grace")
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

func TestDrainTimeout(t *testing.T) {
	t.Parallel()
	m, server1, _, _ := drained(t, true, func(o *Options) { o.DrainIdle, o.DrainTimeout = time.Hour, time.Second })
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	if !alive(server1) {
		t.Error("ended before its time")
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

func TestDrainNow(t *testing.T) {
	t.Parallel()
	m, server1, server2, _ := drained(t, true, func(o *Options) { o.Watch, o.DrainIdle, o.DrainTimeout = time.Hour, time.Hour, time.Hour })
	m.ctl.SetDrainUntil(m.bank[1], control.Now())
	m.ctl.SetWatchUntil(m.bank[2], control.Now())
	m.until("gen 1 ends", func() bool { return !alive(server1) })
	if !alive(server2) {
		t.Error("gen 2 ended")
	}
}

func TestDrainSignal(t *testing.T) {
	t.Parallel()
	m, server1, _, _ := drained(t, true, func(o *Options) {
		o.DrainSignal, o.StopSignal, o.DrainIdle = unix.SIGUSR1, unix.SIGQUIT, 2*time.Second
	})
	if pid, _ := m.report("signal 10"); pid != server1 {
		t.Errorf("drain signal to %d, want %d", pid, server1)
	}
	if pid, _ := m.report("signal 3"); pid != server1 {
		t.Errorf("stop signal to %d, want %d", pid, server1)
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

// Real-time signals have no names, so a server learns their numbers.
func TestSignalsWithoutNames(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	m.o.DrainSignal, m.o.StopSignal = 40, 41
	m.activate(1)
	r := m.start()
	_, said := m.report("start")
	for _, kv := range []string{"GRM_DRAIN_SIGNAL=40", "GRM_STOP_SIGNAL=41"} {
		if !slices.Contains(strings.Split(said, "\x01"), kv) {
			t.Errorf("%s is not in the server's environment", kv)
		}
	}
	m.hears("READY=1")
	r.leaves()
}

// A drained instance that becomes the working one again was told nothing, so it
// goes on.
func TestWorksAgain(t *testing.T) {
	t.Parallel()
	m, server1, _, _ := drained(t, true, func(o *Options) { o.DrainIdle = time.Hour })
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	m.ctl.Flip(m.bank[1])
	m.until("gen 1 serves", func() bool { return m.bankOf(1).State == control.Serving && m.bankOf(1).DrainUntil == 0 })
	m.until("gen 2 drains", func() bool { return m.bankOf(2).State == control.Draining })
	if !alive(server1) {
		t.Error("gen 1 ended")
	}
}

// An instance that drains has left the fd store. If it works again what it has
// is stored again, and it is heard.
func TestStoredAgain(t *testing.T) {
	t.Parallel()
	const sockets = 2*atOnce + 3
	file := filepath.Join(t.TempDir(), "speak")
	m := newManager(t, "say=READY=1", "wait="+file, "say=WATCHDOG=1").withControl()
	m.o.DrainIdle = time.Hour
	m.activate(sockets)
	first := m.start()
	m.report("start")
	m.hears("READY=1")
	m.packet(m.bank[1], true)
	all := []string{keeperName(1)}
	for i := range sockets {
		all = append(all, socketName("echo", 1, i))
	}
	slices.Sort(all)
	first.leaves()
	m.server = []string{"say=READY=1"}
	second, _ := m.begun()
	both := []string{socketName("echo", 2, 0), socketName("echo", 2, 1), keeperName(1), keeperName(2)}
	slices.Sort(both)
	m.until("gen 1 has left the store", func() bool { return slices.Equal(m.names(), both) })
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	m.ctl.Flip(m.bank[1])
	m.hears("gen 1 serving; gen 2 failed: rolled back")
	m.until("gen 1 is stored again, and gen 2 is not", func() bool { return slices.Equal(m.names(), all) })
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.hears("WATCHDOG=1")
	// The next decoy has them from the store.
	second.leaves()
	third, _ := m.begun()
	m.until("gen 1 has left the store once more", func() bool {
		return !slices.ContainsFunc(m.names(), func(name string) bool { return strings.HasPrefix(name, "grm.echo.1.") })
	})
	m.ctl.Flip(m.bank[1])
	m.until("and is in it again", func() bool {
		return slices.Contains(m.names(), socketName("echo", 1, sockets-1))
	})
	third.leaves()
}

// What waits in a socket that the server has closed keeps nobody waiting, and
// is said once.
func TestClosedSocketDoesNotKeepTheDrain(t *testing.T) {
	t.Parallel()
	m := newManager(t, "shut", "say=READY=1").withControl()
	m.o.DrainTimeout = time.Hour
	first, server1 := m.begun()
	c, err := net.Dial("udp", "127.0.0.1:"+strconv.Itoa(m.port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("to nobody")); err != nil {
		t.Fatal(err)
	}
	const said = "was closed by its server"
	m.until("it is said", func() bool { return strings.Contains(first.stderr(), said) })
	for end := control.Now() + 2*lookEvery + time.Second; control.Now() < end; m.serve(10) {
	}
	if n := strings.Count(first.stderr(), said); n != 1 {
		t.Errorf("it was said %d times", n)
	}
	first.leaves()
	m.server = []string{"say=READY=1"}
	second, _ := m.begun()
	m.until("gen 1 ends", func() bool { return !alive(server1) && m.bankOf(1).State == control.Ended })
	second.leaves()
}

// What a queue holds when the flows are gone is answered before the server
// ends.
func TestQueueIsEmptied(t *testing.T) {
	t.Parallel()
	m := newManager(t, "say=READY=1").withControl()
	first, server1 := m.begun()
	c, err := net.Dial("udp", "127.0.0.1:"+strconv.Itoa(m.port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = unix.Kill(server1, unix.SIGSTOP)
	m.until("it is stopped", func() bool { return stopped(server1) })
	for range 100 {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	first.leaves()
	m.begun()
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	// Without the queue it would end now: it had no packet that is counted.
	for end := control.Now() + 5*tick; control.Now() < end; m.serve(10) {
	}
	if m.bankOf(1).State != control.Draining || !m.ctl.Alive(m.bank[1]) {
		t.Errorf("left with a full queue: %+v", m.bankOf(1))
	}
	_ = unix.Kill(server1, unix.SIGCONT)
	_ = c.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 10)
	for i := range 100 {
		if _, err := c.Read(buf); err != nil {
			t.Fatalf("answer %d of 100: %v", i+1, err)
		}
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

// A server that connects a socket for each flow has flows that no program sees.
func TestDrainWaitsForConnections(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "close")
	m := newManager(t, "peer="+file, "say=READY=1").withControl()
	first, server1 := m.begun()
	first.leaves()
	m.server = []string{"say=READY=1"}
	m.begun()
	m.until("gen 1 drains", func() bool { return m.bankOf(1).State == control.Draining })
	for end := control.Now() + 5*tick; control.Now() < end; m.serve(10) {
	}
	if !alive(server1) || !m.ctl.Alive(m.bank[1]) {
		t.Error("ended with a connected socket")
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.until("gen 1 ends", func() bool { return !alive(server1) })
}

func TestQueued(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 1000, 60000} {
		if queued(fd) {
			t.Fatalf("empty socket holds something")
		}
		for range 50 {
			if err := unix.Sendto(fd, make([]byte, size), 0, sa); err != nil && err != unix.ENOBUFS {
				t.Fatal(err)
			}
		}
		if !queued(fd) {
			t.Errorf("50 datagrams of %d bytes are not seen", size)
		}
		if n := discard(fd); n == 0 || n > 50 {
			t.Errorf("%d of at most 50 datagrams of %d bytes discarded", n, size)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if queued(int(f.Fd())) {
		t.Error("a listener without connections holds something")
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !queued(int(f.Fd())) {
		t.Error("a connection to accept is not seen")
	}
	if discard(int(f.Fd())) != 0 {
		t.Error("a listener's queue was counted in datagrams")
	}
}
