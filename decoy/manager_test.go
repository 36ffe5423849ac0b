package decoy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/notify"
)

// patience bounds every wait of a test; no test waits that long if all is well.
const patience = 20 * time.Second

// manager plays systemd for one unit, and grm-activate.
type manager struct {
	t       *testing.T
	o       Options
	server  []string // steps of the next server
	notify  *notify.Listener
	store   []named
	said    []string // what came on the notify socket, in order
	reports chan string
	heard   []string // reports that were taken
	env     []string
	binary  string   // grm-decoy, if not the test binary
	args    []string // and its arguments
	stdin   *os.File // of the next decoy; nil: /dev/null
	stderr  *os.File // of the next decoy; nil: a file that the test shows if it fails

	ctl   *control.Map
	ctlFD int
	mem   []byte
	gen   uint64
	port  int
	bank  map[uint64]int
}

// run is one life of a decoy.
type run struct {
	m    *manager
	cmd  *exec.Cmd
	done chan error
}

func newManager(t *testing.T, server ...string) *manager {
	t.Helper()
	dir := t.TempDir()
	l, err := notify.Listen(filepath.Join(dir, "notify"))
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, o: Defaults(), server: server, notify: l, reports: make(chan string, 10000), ctlFD: -1, bank: map[uint64]int{}}
	m.o.Watch, m.o.DrainGrace, m.o.DrainIdle = 0, 0, time.Millisecond
	path := filepath.Join(dir, "report")
	c, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			m.reports <- string(buf[:n])
		}
	}()
	m.env = append(os.Environ(), reportVar+"="+path, notify.Env+"="+l.Address(), "SYSTEMD_EXEC_PID=1", "WATCHDOG_PID=1", "WATCHDOG_USEC=1000000")
	t.Cleanup(func() {
		m.killAll()
		_ = c.Close()
		_ = l.Close()
		for _, d := range m.store {
			_ = unix.Close(d.fd)
		}
		if m.ctl != nil {
			_ = m.ctl.Close()
			_ = unix.Munmap(m.mem)
			_ = unix.Close(m.ctlFD)
		}
	})
	return m
}

// killAll ends every process that the test has caused: those with its report
// socket in their environment.
func (m *manager) killAll() {
	for range 100 {
		left := m.processes()
		if len(left) == 0 {
			return
		}
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	m.t.Errorf("processes left: %v", m.processes())
}

func (m *manager) processes() []int {
	mark := m.env[slices.IndexFunc(m.env, func(s string) bool { return strings.HasPrefix(s, reportVar) })]
	var found []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		env, err := os.ReadFile(dir + "/environ")
		if err == nil && bytes.Contains(env, []byte(mark)) {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			found = append(found, pid)
		}
	}
	return found
}

// withControl gives the service a control map, which takes root.
func (m *manager) withControl() *manager {
	m.t.Helper()
	if os.Geteuid() != 0 {
		m.t.Skip("making a BPF map takes root")
	}
	size := control.Size(runtime.NumCPU())
	fd, err := createArray(size)
	if err != nil {
		m.t.Fatal(err)
	}
	m.ctlFD = fd
	if m.ctl, err = control.Init(fd, 4711); err != nil {
		m.t.Fatal(err)
	}
	if m.mem, err = unix.Mmap(fd, 0, (size+4095)&^4095, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		m.t.Fatal(err)
	}
	m.put("grm.ctl", fd)
	m.o.Listen = []string{"echo"}
	m.o.Name = "decoytest"
	return m
}

// createArray makes a mappable ARRAY of one element with bpf(2) itself: this
// package and its tests do without cilium/ebpf.
func createArray(size int) (int, error) {
	attr := struct{ kind, key, value, entries, flags uint32 }{unix.BPF_MAP_TYPE_ARRAY, 4, uint32(size), 1, unix.BPF_F_MMAPABLE}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return -1, fmt.Errorf("BPF_MAP_CREATE: %w", errno)
	}
	unix.CloseOnExec(int(fd))
	return int(fd), nil
}

func (m *manager) put(name string, fd int) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	m.store = append(m.store, named{name, dup})
}

// activate prepares a new generation, as ExecStartPre= does, with n sockets.
func (m *manager) activate(n int) {
	m.t.Helper()
	m.gen++
	bank := -1
	for b := range control.Banks {
		if s := m.ctl.Bank(b).State; s == control.Free || s == control.Ended {
			bank = b
			break
		}
	}
	m.ctl.Assign(bank, m.gen, control.Prepared)
	m.bank[m.gen] = bank
	for i := n - 1; i >= 0; i-- {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		}
		if err != nil {
			m.t.Fatal(err)
		}
		sa, _ := unix.Getsockname(fd)
		m.port = sa.(*unix.SockaddrInet4).Port // of socket 0 in the end
		m.put(socketName("echo", m.gen, i), fd)
		_ = unix.Close(fd)
	}
	m.ctl.SetPlan(control.Plan{Verb: control.Start, Bank: bank})
}

func (m *manager) plan(v control.Verb, generation uint64) {
	m.ctl.SetPlan(control.Plan{Verb: v, Bank: m.bank[generation]})
}

func (m *manager) bankOf(generation uint64) control.Bank { return m.ctl.Bank(m.bank[generation]) }

// fill sends so many empty datagrams, which count as well, to the stored socket
// of a generation.
func (m *manager) fill(generation uint64, n int) {
	m.t.Helper()
	i := slices.IndexFunc(m.store, func(d named) bool { return d.name == socketName("echo", generation, 0) })
	if i < 0 {
		m.t.Fatalf("gen %d has no socket in the store: %q", generation, m.names())
	}
	sa, err := unix.Getsockname(m.store[i].fd)
	if err != nil {
		m.t.Fatal(err)
	}
	c, err := net.Dial("udp", "127.0.0.1:"+strconv.Itoa(sa.(*unix.SockaddrInet4).Port))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	for range n {
		if _, err := c.Write(nil); err != nil {
			m.t.Fatal(err)
		}
	}
}

// start starts a decoy with all that is in the store.
func (m *manager) start() *run {
	m.t.Helper()
	o := m.o
	if o.Command == nil {
		o.Command = append([]string{self(), "server"}, m.server...)
	}
	text, err := json.Marshal(o)
	if err != nil {
		m.t.Fatal(err)
	}
	r := &run{m: m, cmd: exec.Command(self(), "decoy", string(text)), done: make(chan error, 1)}
	if m.binary != "" {
		r.cmd = exec.Command(m.binary, m.args...)
	}
	var names []string
	for i, d := range m.store {
		dup, err := unix.FcntlInt(uintptr(d.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			m.t.Fatal(err)
		}
		f := os.NewFile(uintptr(dup), "")
		defer f.Close()
		r.cmd.ExtraFiles = append(r.cmd.ExtraFiles, f)
		names = append(names, m.store[i].name)
	}
	r.cmd.Env = environ(m.env).listen(names)
	// A file, not a pipe: the server outlives the decoy and holds it open.
	log, err := os.Create(filepath.Join(m.t.TempDir(), "stderr"))
	if err != nil {
		m.t.Fatal(err)
	}
	r.cmd.Stderr = log
	if m.stderr != nil {
		r.cmd.Stderr = m.stderr
	}
	if m.stdin != nil {
		r.cmd.Stdin = m.stdin
	}
	m.t.Cleanup(func() {
		if text, _ := os.ReadFile(log.Name()); m.t.Failed() && len(text) > 0 {
			m.t.Logf("standard error:\n%s", text)
		}
		_ = log.Close()
	})
	if err := r.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	return r
}

func (r *run) stderr() string {
	text, _ := os.ReadFile(r.cmd.Stderr.(*os.File).Name())
	return string(text)
}

func (r *run) signal(s syscall.Signal) {
	r.m.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.m.t.Fatal(err)
	}
}

// status waits for the decoy's end; -n is death by signal n.
func (r *run) status() int {
	r.m.t.Helper()
	end := time.Now().Add(patience)
	for time.Now().Before(end) {
		r.m.serve(10)
		select {
		case err := <-r.done:
			r.m.drainNotify()
			var x *exec.ExitError
			if errors.As(err, &x) {
				ws := x.Sys().(syscall.WaitStatus)
				if ws.Signaled() {
					return -int(ws.Signal())
				}
				return ws.ExitStatus()
			}
			return 0
		default:
		}
	}
	r.m.t.Fatalf("decoy does not end; stderr:\n%s", r.stderr())
	return 0
}

func (r *run) expect(status int) {
	r.m.t.Helper()
	if got := r.status(); got != status {
		r.m.t.Fatalf("decoy ended with %d, want %d; stderr:\n%s", got, status, r.stderr())
	}
}

// serve works off what comes on the notify socket, as systemd does.
func (m *manager) serve(milliseconds int) {
	if m.notify.Wait(milliseconds) == nil {
		m.drainNotify()
	}
}

func (m *manager) drainNotify() {
	for {
		msg, err := m.notify.Receive()
		if err != nil {
			return
		}
		text := string(msg.Text)
		fields, _ := notify.Parse(msg.Text)
		get := func(key string) string {
			for _, f := range fields {
				if f.Key == key {
					return f.Value
				}
			}
			return ""
		}
		if get("FDSTORE") == "1" {
			for _, fd := range msg.FDs {
				m.put(get("FDNAME"), fd)
			}
		}
		if get("FDSTOREREMOVE") == "1" {
			m.store = slices.DeleteFunc(m.store, func(d named) bool {
				if d.name == get("FDNAME") {
					_ = unix.Close(d.fd)
					return true
				}
				return false
			})
		}
		msg.Close()
		m.said = append(m.said, text)
	}
}

// names are those in the store, without the control map.
func (m *manager) names() []string {
	var names []string
	for _, d := range m.store {
		if d.name != nameControl {
			names = append(names, d.name)
		}
	}
	slices.Sort(names)
	return names
}

// until waits for a condition, and plays systemd meanwhile.
func (m *manager) until(what string, ok func() bool) {
	m.t.Helper()
	end := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(end) {
			m.t.Fatalf("%s: does not come to pass; systemd heard %q; reports %q", what, m.said, m.heard)
		}
		m.serve(5)
	}
}

// hears waits until systemd has heard a message that contains text.
func (m *manager) hears(text string) {
	m.t.Helper()
	m.until("systemd hears "+text, func() bool { return m.heardBySystemd(text) })
}

func (m *manager) heardBySystemd(text string) bool {
	return slices.ContainsFunc(m.said, func(s string) bool { return strings.Contains(s, text) })
}

// report waits for a report that contains text, and returns its sender and
// the rest.
func (m *manager) report(text string) (pid int, rest string) {
	m.t.Helper()
	end := time.After(patience)
	for {
		select {
		case s := <-m.reports:
			m.heard = append(m.heard, s)
			number, rest, _ := strings.Cut(s, " ")
			if strings.Contains(rest, text) {
				pid, _ := strconv.Atoi(number)
				return pid, rest
			}
		case <-time.After(5 * time.Millisecond):
			m.drainNotify()
		case <-end:
			m.t.Fatalf("no report %q; reports %q; systemd heard %q", text, m.heard, m.said)
		}
	}
}

// ask sends a datagram to the port of the newest generation and returns who
// answers.
func (m *manager) ask(port int) string {
	m.t.Helper()
	c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		m.t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 100)
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("who")); err != nil {
		m.t.Fatal(err)
	}
	n, err := c.Read(buf)
	if err != nil {
		m.t.Fatalf("no answer on port %d: %v", port, err)
	}
	return string(buf[:n])
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }
