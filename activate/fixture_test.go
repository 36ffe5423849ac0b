package activate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/config"
	"grm/control"
	"grm/internal/notify"
	"grm/internal/proc"
	"grm/internal/state"
	"grm/internal/systemd"
	"grm/internal/testenv"
)

// manager is what systemd is to one unit: its fd store, and what it says of it.
type manager struct {
	t        *testing.T
	listener *notify.Listener
	wake     [2]int
	ended    chan struct{}

	mu    sync.Mutex
	unit  systemd.Unit
	going bool
	asked int
	store []stored // as systemd keeps them
	says  []string // STATUS= and the like
}

type stored struct {
	name string
	fd   int
}

func newManager(t *testing.T, name string) *manager {
	l, err := notify.Listen("@")
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, listener: l, ended: make(chan struct{}), unit: systemd.Unit{
		Name: name, LoadState: "loaded", ActiveState: "activating", Type: "notify", NotifyAccess: "all", StoreMax: 2000, Restart: "always", User: "nobody", UID: systemd.NoUID, StopTimeout: killTimeout + 100*time.Millisecond,
	}}
	if err := unix.Pipe2(m.wake[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	go m.serve()
	t.Cleanup(func() {
		unix.Close(m.wake[1])
		<-m.ended
		unix.Close(m.wake[0])
		m.drop(func(string) bool { return true })
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func (m *manager) serve() {
	defer close(m.ended)
	for {
		fds := []unix.PollFd{{Fd: int32(m.listener.FD()), Events: unix.POLLIN}, {Fd: int32(m.wake[0])}}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			m.t.Error(err)
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		for {
			msg, err := m.listener.Receive()
			if errors.Is(err, notify.ErrNone) {
				break
			}
			if err != nil {
				m.t.Error(err)
				return
			}
			m.take(msg)
		}
	}
}

// take does with a message what systemd does.
func (m *manager) take(msg notify.Message) {
	defer msg.Close()
	list, err := notify.Parse(msg.Text)
	if err != nil {
		m.t.Error(err)
		return
	}
	fields := map[string]string{}
	for _, f := range list {
		fields[f.Key] = f.Value
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case fields["FDSTOREREMOVE"] == "1":
		m.dropLocked(func(name string) bool { return name == fields["FDNAME"] })
	case fields["FDSTORE"] == "1":
		if fields["FDPOLL"] != "0" {
			m.t.Errorf("stored without FDPOLL=0: %q", msg.Text)
		}
		if m.unit.NotifyAccess == "none" || m.unit.NotifyAccess == "main" {
			return
		}
		for _, fd := range msg.FDs {
			if len(m.store) < int(m.unit.StoreMax) {
				own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					m.t.Error(err)
				}
				m.store = append(m.store, stored{fields["FDNAME"], own})
			}
		}
	case fields["BARRIER"] == "1":
	default:
		m.says = append(m.says, string(msg.Text))
	}
}

func (m *manager) drop(match func(name string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dropLocked(match)
}

func (m *manager) dropLocked(match func(name string) bool) {
	m.store = slices.DeleteFunc(m.store, func(s stored) bool {
		if match(s.name) {
			unix.Close(s.fd)
			return true
		}
		return false
	})
}

func (m *manager) ask(unit string) (systemd.Unit, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked++
	if unit != m.unit.Name {
		return systemd.Unit{}, false, fmt.Errorf("asked for unit %s", unit)
	}
	u := m.unit
	u.Stored = uint32(len(m.store))
	return u, m.going, nil
}

// names are those of what is stored, sorted.
func (m *manager) names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var names []string
	for _, s := range m.store {
		names = append(names, s.name)
	}
	slices.Sort(names)
	return names
}

// fds are those stored under names with that beginning, in order of the names.
func (m *manager) fds(prefix string) []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	found := map[string]int{}
	for _, s := range m.store {
		if strings.HasPrefix(s.name, prefix) {
			found[s.name] = s.fd
		}
	}
	var fds []int
	for _, name := range slices.Sorted(maps.Keys(found)) {
		fds = append(fds, found[name])
	}
	return fds
}

// fixture is one service under test.
type fixture struct {
	*manager
	req Request
	env Env
	log bytes.Buffer
	run int // counts the unit's runs
}

// newFixture is a service that listens on those addresses. Its first run has begun.
func newFixture(t *testing.T, service string, addresses ...string) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	enterCgroup(t, service+".service")
	f := &fixture{manager: newManager(t, service+".service")}
	f.listen(service, addresses...)
	f.env = Env{Log: &f.log, Ask: f.ask}
	t.Setenv(notify.Env, f.listener.Address())
	f.nextRun()
	t.Cleanup(func() {
		f.drop(func(string) bool { return true })
		for _, path := range []string{bpfprog.Root, state.Root} {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Logf("log:\n%s", f.log.String())
		}
	})
	return f
}

func (f *fixture) listen(service string, addresses ...string) {
	f.t.Helper()
	f.req.Service, f.req.Listeners = service, nil
	for _, address := range addresses {
		l, err := config.ParseListener(address, config.DefaultListener())
		if err != nil {
			f.t.Fatal(err)
		}
		if l.Name == "" {
			l.Name = service
		}
		f.req.Listeners = append(f.req.Listeners, l)
	}
}

// nextRun is what systemd does between two starts.
func (f *fixture) nextRun() {
	f.run++
	f.t.Setenv("INVOCATION_ID", fmt.Sprintf("run%d", f.run))
	f.setUnit(func(u *systemd.Unit) { u.Job = "start" })
}

func (f *fixture) setUnit(change func(*systemd.Unit)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.unit)
}

func (f *fixture) start() error {
	f.t.Helper()
	req := f.req
	req.Listeners = slices.Clone(f.req.Listeners)
	return Start(context.Background(), req, f.env)
}

func (f *fixture) mustStart() {
	f.t.Helper()
	if err := f.start(); err != nil {
		f.t.Fatal(err)
	}
}

// stopPost is ExecStopPost= with that job and result.
func (f *fixture) stopPost(job, result, code, status string) {
	f.t.Helper()
	f.setUnit(func(u *systemd.Unit) { u.Job = job })
	for key, value := range map[string]string{"SERVICE_RESULT": result, "EXIT_CODE": code, "EXIT_STATUS": status} {
		f.t.Setenv(key, value)
	}
	if err := StopPost(context.Background(), f.req, f.env); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) service() *bpfprog.Service {
	f.t.Helper()
	s, err := bpfprog.OpenService(f.req.Service)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.t.Error(err)
		}
	})
	return s
}

func (f *fixture) state() *state.State {
	f.t.Helper()
	s, err := state.Read(state.Root, f.req.Service)
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// instance plays the server of a generation, and its keeper.
type instance struct {
	server, keeper *process
	bank           int
	ctl            *control.Map
}

// serve is what a decoy does of a plan: it starts keeper and server, flips, and
// says until when it is watched.
func (f *fixture) serve(watch time.Duration) *instance {
	f.t.Helper()
	ctl := f.service().Control()
	i := &instance{bank: ctl.Plan().Bank, ctl: ctl}
	generation := ctl.Bank(i.bank).Generation
	var fds []int
	for _, l := range f.req.Listeners {
		fds = append(fds, f.fds(fmt.Sprintf("grm.%s.%d.", l.Name, generation))...)
	}
	if len(fds) == 0 {
		f.t.Fatalf("nothing stored for generation %d: %v", generation, f.names())
	}
	i.keeper = f.spawn(keeperComm, fds...)
	i.server = f.spawn("server", fds...)
	ctl.SetPids(i.bank, i.keeper.pid(), i.server.pid())
	ctl.SetState(i.bank, control.Serving)
	ctl.SetReady(i.bank, control.Now(), control.Now()+watch)
	ctl.Flip(i.bank)
	return i
}

// crash ends the server, and the keeper as it then does.
func (i *instance) crash() {
	i.server.kill()
	i.ctl.SetPids(i.bank, 0, 0)
	i.keeper.kill()
}

// process is a child of the test in the service's cgroup.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
}

func (f *fixture) spawn(name string, fds ...int) *process {
	f.t.Helper()
	p := &process{t: f.t, cmd: exec.Command("/proc/self/exe")}
	p.cmd.Env = []string{holdVar + "=" + name}
	for _, fd := range fds {
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			f.t.Fatal(err)
		}
		file := os.NewFile(uintptr(own), "socket")
		defer file.Close()
		p.cmd.ExtraFiles = append(p.cmd.ExtraFiles, file)
	}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		f.t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		f.t.Fatal(err)
	}
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(p.kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "up\n" {
		f.t.Fatalf("%s: %q, %v", name, line, err)
	}
	return p
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may be gone
	_ = p.cmd.Wait()         // killed, as it should be
}

// ended says whether somebody else has ended it.
func (p *process) ended() bool {
	var ws unix.WaitStatus
	pid, err := unix.Wait4(p.pid(), &ws, unix.WNOHANG, nil)
	return err == nil && pid == p.pid() || errors.Is(err, unix.ECHILD)
}

// clientPort is the last one that a datagram was sent from: each is a flow of its own.
var clientPort uint16 = 20000

// arrives sends a datagram to a listener from a new port, and says under which
// stored name it can be read; "" if nowhere.
func (f *fixture) arrives(l config.Listener) string {
	f.t.Helper()
	domain := unix.AF_INET6
	if l.Address.Addr().Is4() {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	defer unix.Close(fd)
	defer testenv.OneCPU(f.t)()
	clientPort++
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(l.Address.Addr(), clientPort))); err != nil {
		f.t.Fatal(err)
	}
	if err := unix.Sendto(fd, []byte("hello"), 0, sockaddr(l.Address.AddrPort)); err != nil {
		f.t.Fatal(err)
	}
	f.settle(fd)
	f.mu.Lock()
	defer f.mu.Unlock()
	where := ""
	for _, s := range f.store {
		if !strings.HasPrefix(s.name, "grm."+l.Name+".") {
			continue
		}
		var buf [16]byte
		if n, _, err := unix.Recvfrom(s.fd, buf[:], unix.MSG_DONTWAIT); err == nil && string(buf[:n]) == "hello" {
			where = s.name
		}
	}
	return where
}

// settle waits until the kernel has dealt with all that this thread, which stays
// on one CPU, has sent over loopback: a CPU takes what came first first, but a
// busy one may leave it to a kernel thread.
func (f *fixture) settle(fd int) {
	f.t.Helper()
	self, err := unix.Getsockname(fd)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}); err != nil {
		f.t.Fatal(err)
	}
	if err := unix.Sendto(fd, []byte("done"), 0, self); err != nil {
		f.t.Fatal(err)
	}
	if _, _, err := unix.Recvfrom(fd, make([]byte, 16), 0); err != nil {
		f.t.Fatalf("a packet to its own sender has not come back: %v", err)
	}
}

// snapshot is all that a start that fails must not change.
func (f *fixture) snapshot() string {
	f.t.Helper()
	var b strings.Builder
	f.mu.Lock()
	for _, s := range f.store {
		inode, err := proc.Inode(s.fd)
		if err != nil {
			f.t.Fatal(err)
		}
		if s.name == controlName || strings.HasPrefix(s.name, "grm.flows.") {
			inode = 0 // another file of the same map
		}
		fmt.Fprintln(&b, "stored", s.name, inode)
	}
	f.mu.Unlock()
	lines := strings.SplitAfter(b.String(), "\n")
	for _, root := range []string{bpfprog.Root, state.Root} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && path != root && filepath.Dir(path) != root && !strings.HasSuffix(path, "/groups") && !strings.HasSuffix(path, "/services") {
				lines = append(lines, "file "+path+"\n")
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			f.t.Fatal(err)
		}
	}
	if s, err := state.Read(state.Root, f.req.Service); err == nil {
		s.Failed, s.Generation, s.Plan = nil, 0, nil // a number that was used up, why, and what the last start was
		text, err := json.Marshal(s)
		if err != nil {
			f.t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("state %s\n", text))
	}
	if s, err := bpfprog.OpenService(f.req.Service); err == nil {
		ctl := s.Control()
		lines = append(lines, fmt.Sprintf("control order %v alive %b plan %v\n", ctl.Order().Banks(), ctl.AliveBanks(), ctl.Plan()))
		for n := range control.Banks {
			if b := ctl.Bank(n); b != (control.Bank{}) {
				lines = append(lines, fmt.Sprintf("bank %d %+v\n", n, b))
			}
		}
		if err := s.Close(); err != nil {
			f.t.Fatal(err)
		}
	}
	keys, err := bpfprog.Groups()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, key := range keys {
		g, err := bpfprog.OpenGroup(key.Network, key.Address)
		if err != nil {
			f.t.Fatal(err)
		}
		for n := range control.Banks {
			if cookies, err := g.Slots(0, n); err != nil || len(cookies) > 0 {
				lines = append(lines, fmt.Sprintln("slots", key, n, cookies, err))
			}
		}
		if err := g.Close(); err != nil {
			f.t.Fatal(err)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// differences are the lines that only one of two snapshots has.
func differences(before, after string) string {
	a, b := strings.SplitAfter(before, "\n"), strings.SplitAfter(after, "\n")
	var out strings.Builder
	for _, line := range a {
		if !slices.Contains(b, line) {
			out.WriteString("- " + line)
		}
	}
	for _, line := range b {
		if !slices.Contains(a, line) {
			out.WriteString("+ " + line)
		}
	}
	return out.String()
}

// openFiles is how many descriptors the test has open.
func openFiles(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("not within 10s: %s", what)
			return
		}
	}
}
