package activate

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
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
)

// foreignSocket is somebody else's: of that uid, with SO_REUSEPORT or without.
func foreignSocket(t *testing.T, network, address string, uid int, reuseport int) {
	t.Helper()
	a := netip.MustParseAddrPort(address)
	kind := unix.SOCK_DGRAM
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, reuseport)
	}
	if err == nil {
		err = unix.Fchown(fd, uid, -1)
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(a))
	}
	if err == nil && network == "tcp" {
		err = unix.Listen(fd, 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
}

func path(t *testing.T, parts ...string) string {
	t.Helper()
	dir, err := bpfprog.Dir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(append([]string{dir}, parts...)...)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever is wrong: one clear message with the object, the reason and the way
// out, the documented status, and nothing changed.
func TestWrongInputs(t *testing.T) {
	const udp, tcp = "udp://127.0.0.1:5201", "tcp://127.0.0.1:5201"
	me := fmt.Sprintf("process %d (%s)", os.Getpid(), proc.Comm(os.Getpid()))
	for name, c := range map[string]struct {
		address string
		live    bool // an instance of the service serves already
		spoil   func(t *testing.T, f *fixture)
		status  int
		says    []string
	}{
		"address of another process": {udp, false, func(t *testing.T, f *fixture) { foreignSocket(t, "udp", "127.0.0.1:5201", 0, 0) },
			StatusInUse, []string{"bind udp://127.0.0.1:5201", "in use by " + me + " of uid 0", "choose another address"}},
		"wildcard of another process": {udp, false, func(t *testing.T, f *fixture) { foreignSocket(t, "udp", "0.0.0.0:5201", 0, 0) },
			StatusInUse, []string{"bind udp://127.0.0.1:5201", "in use by " + me}},
		"group of another user": {udp, false, func(t *testing.T, f *fixture) { foreignSocket(t, "udp", "127.0.0.1:5201", 1, 1) },
			StatusInUse, []string{"in use by " + me + " of uid 1"}},
		"group of a stranger of the same user": {udp, false, func(t *testing.T, f *fixture) { foreignSocket(t, "udp", "127.0.0.1:5201", 65534, 1) },
			StatusInUse, []string{"in use by " + me + " of uid 65534"}},
		"listening socket of another process": {tcp, false, func(t *testing.T, f *fixture) { foreignSocket(t, "tcp", "127.0.0.1:5201", 0, 0) },
			StatusInUse, []string{"bind tcp://127.0.0.1:5201", me}},
		"address of no interface": {"udp://192.0.2.1:5201", false, nil,
			StatusFailure, []string{"bind udp://192.0.2.1:5201", "no interface has this address", "--freebind"}},
		"unknown user": {udp, false, func(t *testing.T, f *fixture) { f.req.User = "nobodyatall" },
			StatusUnfit, []string{`user "nobodyatall"`, "change User="}},
		"user whom fchown(2) would not see": {udp, false, func(t *testing.T, f *fixture) { f.req.User = "4294967295" },
			StatusUnfit, []string{`user "4294967295"`, "change User="}},
		"no fd store at all": {udp, false, func(t *testing.T, f *fixture) { t.Setenv(notify.Env, "") },
			StatusUnfit, []string{"no NOTIFY_SOCKET", "Type=notify", "-- COMMAND"}},
		"NOTIFY_SOCKET that is no address": {udp, false, func(t *testing.T, f *fixture) { t.Setenv(notify.Env, "here") },
			StatusUnfit, []string{"NOTIFY_SOCKET", `"here"`}},
		"several settings of the unit": {udp, false, func(t *testing.T, f *fixture) {
			f.setUnit(func(u *systemd.Unit) { u.NotifyAccess, u.StoreMax, u.PrivateNetwork = "main", 0, true })
		}, StatusUnfit, []string{"unit echo.service", "NotifyAccess=main", "write NotifyAccess=all", "write FileDescriptorStoreMax=561", "PrivateNetwork=yes"}},
		"fd store too small": {udp + "?sockets=20", false, func(t *testing.T, f *fixture) { f.setUnit(func(u *systemd.Unit) { u.StoreMax = 21 }) },
			StatusUnfit, []string{"FileDescriptorStoreMax=21 is too small", "22 more are to come", "write FileDescriptorStoreMax=561"}},
		"fd store too small for two": {udp + "?sockets=20", true, func(t *testing.T, f *fixture) { f.setUnit(func(u *systemd.Unit) { u.StoreMax = 41 }) },
			StatusUnfit, []string{"FileDescriptorStoreMax=41 is too small", "22 descriptors are stored, 20 more"}},
		"fd store too small for a new listener's table": {udp, true, func(t *testing.T, f *fixture) {
			f.setUnit(func(u *systemd.Unit) { u.StoreMax = 5 })
			f.listen("echo", udp, "udp://127.0.0.1:5202?name=b")
		}, StatusUnfit, []string{"FileDescriptorStoreMax=5 is too small", "3 descriptors are stored, 3 more"}},
		"pins of another layout": {udp, true, func(t *testing.T, f *fixture) {
			mem, err := unix.Mmap(f.service().ControlFD(), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			must(t, err)
			mem[4]++
			t.Cleanup(func() { mem[4]--; unix.Munmap(mem) })
		}, StatusConflict, []string{"open service echo", "another layout", "stop the service, then start it"}},
		"pin that is something else": {udp, true, func(t *testing.T, f *fixture) {
			must(t, os.Rename(path(t, "services", "echo", "control"), path(t, "services", "echo", "old")))
			must(t, os.Rename(path(t, "groups", "udp-7f000001-5201", "counters"), path(t, "services", "echo", "control")))
		}, StatusConflict, []string{"open service echo", "layout"}},
		"group with a pin missing": {udp, true, func(t *testing.T, f *fixture) {
			must(t, os.Rename(path(t, "groups", "udp-7f000001-5201", "slots"), path(t, "groups", "udp-7f000001-5201", "old")))
			must(t, os.Symlink("old", path(t, "groups", "udp-7f000001-5201", "slots")))
			must(t, os.Remove(path(t, "groups", "udp-7f000001-5201", "meta")))
			must(t, os.Symlink("../nowhere", path(t, "groups", "udp-7f000001-5201", "meta")))
		}, StatusUnsafe, []string{"group udp://127.0.0.1:5201", "not all of them", "remove what is pinned for it"}},
		"pins that were removed": {udp, true, func(t *testing.T, f *fixture) { must(t, os.RemoveAll(path(t))) },
			StatusConflict, []string{"service echo: generation 1 lives, but nothing of it is pinned", "stop the service, and start it"}},
		"pins that others can write": {udp, true, func(t *testing.T, f *fixture) { must(t, os.Chmod(path(t, "services"), 0o777)) },
			StatusUnsafe, []string{"/services", "mode 0777", "chmod 0700"}},
		"pins of somebody else": {udp, true, func(t *testing.T, f *fixture) { must(t, os.Chown(path(t), 1, 1)) },
			StatusUnsafe, []string{"belongs to uid 1", "chown root"}},
		"pins elsewhere": {udp, true, func(t *testing.T, f *fixture) {
			must(t, os.Rename(path(t, "groups"), path(t, "elsewhere")))
			must(t, os.Symlink("elsewhere", path(t, "groups")))
		}, StatusUnsafe, []string{"/groups is no directory", "remove it"}},
		"record that is garbage": {udp, true, func(t *testing.T, f *fixture) { must(t, os.WriteFile("/run/grm/echo/state.json", []byte("{"), 0o644)) },
			StatusUnsafe, []string{"/run/grm/echo/state.json", "invalid state file", "unexpected end", "remove it: which generations live"}},
		"record of somebody else": {udp, true, func(t *testing.T, f *fixture) { must(t, os.Chown("/run/grm/echo/state.json", 65534, 65534)) },
			StatusUnsafe, []string{"/run/grm/echo/state.json", "belongs to uid 65534"}},
		"record elsewhere": {udp, true, func(t *testing.T, f *fixture) {
			must(t, os.Rename("/run/grm/echo", "/run/grm/elsewhere"))
			must(t, os.Symlink("elsewhere", "/run/grm/echo"))
		}, StatusUnsafe, []string{"/run/grm/echo", "symbolic link", "remove it"}},
		"lock elsewhere": {udp, true, func(t *testing.T, f *fixture) {
			must(t, os.Remove("/run/grm/echo.lock"))
			must(t, os.Symlink("/etc/passwd", "/run/grm/echo.lock"))
		}, StatusUnsafe, []string{"/run/grm/echo.lock", "symbolic link"}},
		"directory that others can write": {udp, true, func(t *testing.T, f *fixture) { must(t, os.Chmod("/run/grm", 0o777)) },
			StatusUnsafe, []string{"/run/grm", "mode 0777"}},
		"another user while one lives": {udp, true, func(t *testing.T, f *fixture) { f.req.User = "daemon" },
			StatusConflict, []string{"user: the sockets of 1 living instances belong to uid 65534 (nobody)", "would to 1 (daemon)", "stop the service, then start it, or set the user back"}},
		"another dissector while one lives": {udp, true, func(t *testing.T, f *fixture) { f.listen("echo", udp+"?dissector=noop") },
			StatusConflict, []string{"group udp://127.0.0.1:5201", "dissector is flow, not noop", "set them back, or stop the service, then start it"}},
		"another table while one lives": {udp, true, func(t *testing.T, f *fixture) { f.listen("echo", udp+"?flows=2048&timeout=5s") },
			StatusConflict, []string{"timeout is 2m4s, not 5s", "flows is 65536, not 2048"}},
		"group of another service": {udp, true, func(t *testing.T, f *fixture) { f.req.Service = "other"; f.req.Listeners[0].Name = "other" },
			StatusConflict, []string{"udp://127.0.0.1:5201: another service has sockets there as app 0", "--apps-max"}},
		"cBPF dissector without a program": {udp, false, func(t *testing.T, f *fixture) {
			f.req.Listeners[0].Program.File = "/x"
			f.req.Listeners[0].Dissector = "cbpf"
		},
			StatusFailure, []string{"group udp://127.0.0.1:5201", "program"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, "echo", c.address)
			if c.live {
				f.mustStart()
				f.serve(0)
				f.nextRun()
			}
			if c.spoil != nil {
				c.spoil(t, f)
			}
			before := ""
			if c.says != nil {
				before = f.snapshotOrNothing()
			}
			files := openFiles(t)
			err := f.start()
			if err == nil {
				t.Fatal("it starts")
			}
			t.Log(err)
			if Status(err) != c.status && c.says != nil {
				t.Errorf("status %d, want %d", Status(err), c.status)
			}
			for _, says := range c.says {
				if !strings.Contains(err.Error(), says) {
					t.Errorf("it does not say %q", says)
				}
			}
			if c.says != nil {
				if d := differences(before, f.snapshotOrNothing()); d != "" {
					t.Errorf("changed:\n%s", d)
				}
			}
			if n := openFiles(t); n != files {
				t.Errorf("%d descriptors, %d before", n, files)
			}
		})
	}
}

// snapshotOrNothing is for when what is to be read is what was spoilt.
func (f *fixture) snapshotOrNothing() string {
	if keys, err := bpfprog.Groups(); err == nil {
		for _, key := range keys {
			g, err := bpfprog.OpenGroup(key.Network, key.Address)
			if err != nil {
				return ""
			}
			g.Close()
		}
	}
	return f.snapshot()
}

// Each capability that the documentation lists is needed, and says so.
func TestMissingCapability(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	for name, number := range Capabilities {
		err := withoutCapability(t, number, f.start)
		if Status(err) != StatusUnfit || !strings.Contains(err.Error(), "missing "+name+" (run it as root") {
			t.Errorf("without %s: status %d, %v", name, Status(err), err)
		}
	}
	if left := f.snapshot(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// withoutCapability calls do on a thread that lacks a capability, and is thrown away.
func withoutCapability(t *testing.T, number int, do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		err := unix.Capget(&header, &data[0])
		data[number/32].Effective &^= 1 << (number % 32)
		if err == nil {
			err = unix.Capset(&header, &data[0])
		}
		if err != nil {
			t.Error(err)
		}
		done <- do()
	}()
	return <-done
}

func TestClampedBuffer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l, err := config.ParseListener("udp://127.0.0.1:5202", config.DefaultListener())
	must(t, err)
	var warnings []string
	err = withoutCapability(t, unix.CAP_NET_ADMIN, func() error {
		fd, err := openSocket(l, 65534, func(text string) { warnings = append(warnings, text) })
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
	must(t, err)
	if len(warnings) != 1 || !strings.Contains(warnings[0], "udp://127.0.0.1:5202: the receive buffer has") || !strings.Contains(warnings[0], "net.core.rmem_max=16777216") {
		t.Errorf("warnings: %q", warnings)
	}
}

func TestPrivilegedPort(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l, err := config.ParseListener("udp://127.0.0.1:80", config.DefaultListener())
	must(t, err)
	err = withoutCapability(t, unix.CAP_NET_BIND_SERVICE, func() error {
		_, err := openSocket(l, 65534, func(string) {})
		return err
	})
	const says = "bind udp://127.0.0.1:80: permission denied (the port needs CAP_NET_BIND_SERVICE: run it as root, in a unit with ExecStartPre=+)"
	if err == nil || err.Error() != says {
		t.Errorf("%v, want %s", err, says)
	}
}

func TestSockets(t *testing.T) {
	for text, want := range map[string][4]int{ // family, type, V6ONLY, FREEBIND
		"udp://127.0.0.1:5203":              {unix.AF_INET, unix.SOCK_DGRAM, 0, 0},
		"tcp://127.0.0.1:5203?freebind=1":   {unix.AF_INET, unix.SOCK_STREAM, 0, 1},
		"udp://[::]:5203":                   {unix.AF_INET6, unix.SOCK_DGRAM, 1, 0},
		"udp://[::]:5203?dualstack=1":       {unix.AF_INET6, unix.SOCK_DGRAM, 0, 0},
		"udp://[2001:db8::1]:53?freebind=1": {unix.AF_INET6, unix.SOCK_DGRAM, 1, 1},
	} {
		if os.Geteuid() != 0 {
			t.Skip("needs root")
		}
		l, err := config.ParseListener(text, config.DefaultListener())
		must(t, err)
		fd, err := openSocket(l, 65534, func(text string) { t.Errorf("%s: %s", l, text) })
		must(t, err)
		get := func(level, option int) int {
			n, err := unix.GetsockoptInt(fd, level, option)
			must(t, err)
			return n
		}
		got := [4]int{get(unix.SOL_SOCKET, unix.SO_DOMAIN), get(unix.SOL_SOCKET, unix.SO_TYPE), 0, get(unix.IPPROTO_IP, unix.IP_FREEBIND)}
		if got[0] == unix.AF_INET6 {
			got[2] = get(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY)
		}
		if got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
		if l.Address.Proto == config.TCP && get(unix.SOL_SOCKET, unix.SO_ACCEPTCONN) != 1 {
			t.Errorf("%s does not listen", text)
		}
		if n := get(unix.SOL_SOCKET, unix.SO_RCVBUF); n != 2*(16<<20) {
			t.Errorf("%s: receive buffer %d", text, n)
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		must(t, err)
		if flags&unix.O_NONBLOCK != 0 {
			t.Errorf("%s does not block", text)
		}
		var st unix.Stat_t
		must(t, unix.Fstat(fd, &st))
		if st.Uid != 65534 {
			t.Errorf("%s is uid %d's", text, st.Uid)
		}
		must(t, unix.Close(fd))
	}
}

// bpffs is mounted if it is not there.
func TestBPFFSAbsent(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	must(t, unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH))
	for unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH) == nil {
		continue // one below, of the host's
	}
	f.mustStart()
	var st unix.Statfs_t
	must(t, unix.Statfs("/sys/fs/bpf", &st))
	if st.Type != unix.BPF_FS_MAGIC {
		t.Errorf("file system %#x", st.Type)
	}
}

// Without systemd to ask, a start goes on, and says what it does not know.
func TestSystemdAbsent(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.req.User = "nobody"
	f.env.Ask = func(string) (systemd.Unit, bool, error) {
		return systemd.Unit{}, false, fmt.Errorf("%w: gone", systemd.ErrAbsent)
	}
	f.mustStart()
	if !strings.Contains(f.log.String(), "systemd cannot be asked: gone: this start counts as an operator's") {
		t.Errorf("log: %s", f.log.String())
	}
}

// Another layout is fine when nobody lives.
func TestNewSettingsAfterTheEnd(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	f.nextRun()
	f.req.User = "daemon"
	f.listen("echo", "udp://127.0.0.1:5201?flows=2048&name=one", "udp://[::1]:5201?name=two")
	f.mustStart()
	f.serve(0)
	f.nextRun()
	f.listen("echo", "udp://[::1]:5201?name=two")
	f.mustStart()
	if keys, err := bpfprog.Groups(); err != nil || len(keys) != 2 {
		t.Errorf("groups %v, %v", keys, err)
	}
}

// The record is lost, the instance lives.
func TestLostRecord(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?sockets=2")
	f.mustStart()
	old := f.serve(0)
	inodes := f.state().Banks[old.bank].Inodes()
	must(t, os.RemoveAll(state.Root))
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.mustStart()
	if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.StandIn, Bank: old.bank}) {
		t.Errorf("plan %v", plan)
	}
	if s := f.state(); s.Generation != 1 || fmt.Sprint(s.Banks[old.bank].Inodes()) != fmt.Sprint(inodes) {
		t.Errorf("state %+v, inodes %v", s, inodes)
	}
	// The same after a crash.
	must(t, os.RemoveAll(state.Root))
	old.crash()
	// In which cgroup its sockets were made is lost too: it may be one before this one.
	hooks, err := filepath.Glob(path(t, "services", "echo", "hooks", "*"))
	must(t, err)
	must(t, os.Rename(hooks[0], path(t, "services", "echo", "hooks", "1")))
	f.nextRun()
	f.mustStart()
	if plan := old.ctl.Plan(); plan != (control.Plan{Verb: control.Again, Bank: old.bank}) {
		t.Errorf("plan %v", plan)
	}
	if hooks, err := filepath.Glob(path(t, "services", "echo", "hooks", "*")); err != nil || len(hooks) != 2 {
		t.Errorf("hooks %q, %v", hooks, err)
	}
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 0 })
	f.serve(0)
	f.mustStart()
	if s := f.state(); s.Generation != 2 || len(s.Banks) != 2 {
		t.Errorf("state %+v", s)
	}
}

// As many instances as there are banks: one more is refused, or the oldest ends.
func TestAllBanksTaken(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?dissector=noop")
	var all []*instance
	for range control.Banks {
		f.mustStart()
		all = append(all, f.serve(0))
		f.nextRun()
	}
	before := f.snapshot()
	err := f.start()
	if Status(err) != StatusConflict || !strings.Contains(err.Error(), "32 instances live") || !strings.Contains(err.Error(), "grm drain echo --now") {
		t.Errorf("one more: status %d: %v", Status(err), err)
	}
	if d := differences(before, f.snapshot()); d != "" {
		t.Errorf("changed:\n%s", d)
	}
	f.req.MaxInstances = 32
	go func() { // what its keeper does at its deadline
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && all[0].ctl.Bank(all[0].bank).DrainUntil == 0; {
			time.Sleep(time.Millisecond)
		}
		all[0].server.cmd.Process.Kill()
		all[0].keeper.cmd.Process.Kill()
	}()
	f.mustStart()
	if s := f.state(); len(s.Banks) != control.Banks || s.Banks[all[0].bank].Generation != s.Generation {
		t.Errorf("bank %d: %+v", all[0].bank, s.Banks[all[0].bank])
	}
	for _, i := range all[1:] {
		if i.server.ended() {
			t.Errorf("the one in bank %d has ended", i.bank)
		}
	}
}

// With room left the oldest is told to end once the new one is prepared.
func TestMaxInstances(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?dissector=noop")
	f.req.MaxInstances = 2
	var all []*instance
	for range 3 {
		f.mustStart()
		all = append(all, f.serve(0))
		f.nextRun()
	}
	for n, i := range all {
		if told := i.ctl.Bank(i.bank).DrainUntil != 0; told != (n == 0) {
			t.Errorf("instance %d: told to end %v", n, told)
		}
	}
}

// With a command the sockets go to that, as systemd would hand them over.
func TestCommand(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?sockets=2&name=a", "tcp://127.0.0.1:5201?name=b")
	script := `echo $LISTEN_FDS $LISTEN_FDNAMES $LISTEN_PID $$; ls /proc/self/fd | tr '\n' ' '; readlink /proc/self/fd/3 /proc/self/fd/4 /proc/self/fd/5`
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), commandVar+"="+script, notify.Env+"=", "LISTEN_FDS=7", "LISTEN_PIDFDID=3")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	pid := cmd.Process.Pid
	if want := fmt.Sprintf("3 a:a:b %d %d", pid, pid); len(lines) < 5 || lines[len(lines)-4] != want {
		t.Fatalf("%q, want %q", lines, want)
	}
	for _, link := range lines[len(lines)-2:] {
		if !strings.HasPrefix(link, "socket:[") {
			t.Errorf("descriptors: %q", lines)
		}
	}
	if names := f.names(); len(names) > 0 {
		t.Errorf("stored: %v", names)
	}
	// Nobody else serves, so it does at once.
	if ctl := f.service().Control(); ctl.Working() < 0 || ctl.Bank(ctl.Working()).State != control.Serving {
		t.Errorf("working bank %d", ctl.Working())
	}
}

// A group of another layout that nobody has sockets in makes way.
func TestRemnantOfAnotherLayout(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	must(t, os.RemoveAll(state.Root))
	must(t, os.RemoveAll(path(t, "services")))
	must(t, os.Rename(path(t, "groups", "udp-7f000001-5201", "sockets"), path(t, "groups", "udp-7f000001-5201", "meta")))
	if err := f.start(); Status(err) != StatusConflict || !strings.Contains(err.Error(), "there are sockets in it") {
		t.Errorf("while somebody has sockets: status %d: %v", Status(err), err)
	}
	f.drop(func(string) bool { return true })
	f.mustStart()
}

// A command that cannot be executed has not been started: nothing is left of it.
func TestCommandThatIsNone(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?sockets=2&name=a", "tcp://127.0.0.1:5201?name=b")
	garbage := filepath.Join(t.TempDir(), "garbage")
	must(t, os.WriteFile(garbage, []byte("\x7fELF"), 0o755))
	for _, command := range []string{"/nowhere", garbage} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), commandVar+"="+command, notify.Env+"=")
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "command "+command+": ") {
			t.Errorf("%v: %s", err, out)
		}
		if left := f.snapshot(); left != "" {
			t.Errorf("%s: left:\n%s", command, left)
		}
	}
}

func TestAdvanceAndNoRegister(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.req.Advance = true
	f.mustStart()
	if where := f.arrives(f.req.Listeners[0]); where != "grm.echo.1.0" {
		t.Errorf("a packet came to %q", where)
	}
	server := f.spawn("server", f.fds("grm.echo.1.")...)
	f.req.Advance, f.req.NoRegister = false, true
	f.nextRun()
	f.mustStart()
	ctl := f.service().Control()
	if b := ctl.Bank(ctl.Plan().Bank); b.Generation != 2 || b.Naming != control.Parked {
		t.Errorf("bank %+v", b)
	}
	server.kill()
}

// Stop asks for a hint only, and works whatever there is.
func TestStop(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	must(t, Stop(f.req, f.env)) // nothing was ever started
	f.mustStart()
	ctl := f.service().Control()
	for _, c := range []struct {
		job     string
		going   bool
		request control.Request
		closing bool
	}{
		{"", false, control.NoRequest, false}, {"restart", false, control.Restart, false}, {"try-restart", false, control.Restart, false},
		{"stop", false, control.Stop, true}, {"", true, control.Stop, true},
	} {
		ctl.SetRequest(control.NoRequest)
		ctl.SetClosing(false)
		f.setUnit(func(u *systemd.Unit) { u.Job = c.job })
		f.going = c.going
		must(t, Stop(f.req, f.env))
		if ctl.Request() != c.request || ctl.Closing() != c.closing {
			t.Errorf("job %q, going %v: request %v, closing %v", c.job, c.going, ctl.Request(), ctl.Closing())
		}
	}
}

// A stop ends everything, whatever the record looks like.
func TestStopWithGarbage(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	must(t, os.WriteFile("/run/grm/echo/state.json", []byte("garbage"), 0o644))
	f.setUnit(func(u *systemd.Unit) { u.Job = "stop" })
	err := StopPost(context.Background(), f.req, f.env)
	if Status(err) != StatusUnsafe || !strings.Contains(err.Error(), "state.json") {
		t.Errorf("status %d: %v", Status(err), err)
	}
	if !i.server.ended() || !i.keeper.ended() {
		t.Error("processes outlive a stop")
	}
	f.drop(func(string) bool { return true }) // as systemd does after a stop
	if left := f.snapshot(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// A record that somebody has removed is no reason to leave what it told of.
func TestStopWithoutRecord(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201", "tcp://127.0.0.1:5201?name=b")
	f.mustStart()
	f.serve(0)
	must(t, os.RemoveAll("/run/grm/echo"))
	f.stopPost("stop", "success", "exited", "0")
	f.drop(func(string) bool { return true }) // as systemd does after a stop
	if left := f.snapshot(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// Pins of another layout go with a stop, as the error of a start says: no later start could do anything about them.
func TestStopWithAnotherLayout(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	group := func(pin string) string { return path(t, "groups", "udp-7f000001-5201", pin) }
	must(t, os.Rename(group("counters"), path(t, "services", "echo", "control")))
	must(t, os.Rename(group("sockets"), group("meta")))
	f.nextRun()
	if err := f.start(); Status(err) != StatusConflict || !strings.Contains(err.Error(), "stop the service, then start it") {
		t.Errorf("status %d: %v", Status(err), err)
	}
	f.setUnit(func(u *systemd.Unit) { u.Job = "stop" })
	if err := StopPost(context.Background(), f.req, f.env); Status(err) != StatusConflict || !strings.Contains(err.Error(), "layout") {
		t.Errorf("status %d: %v", Status(err), err)
	}
	if !i.server.ended() || !i.keeper.ended() {
		t.Error("processes outlive a stop")
	}
	if left := f.snapshot(); left != "" {
		t.Errorf("left:\n%s", left)
	}
	f.nextRun()
	f.mustStart()
}

// A server that hangs until its watchdog ends the unit is replaced on the same sockets.
func TestWatchdog(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	f.stopPost("", "watchdog", "dumped", "ABRT")
	eventually(t, "the server has ended", i.server.ended)
	i.crash()
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Restarts = 1 })
	f.mustStart()
	if plan := i.ctl.Plan(); plan != (control.Plan{Verb: control.Again, Bank: i.bank}) {
		t.Errorf("plan %v", plan)
	}
}

// Two services share an address: what one does leaves the other's alone, and the last one removes the group.
func TestSharedGroup(t *testing.T) {
	address := func(app int) string {
		return fmt.Sprintf("udp://127.0.0.1:5201?dissector=cbpf&app=%d&max_apps=2&program=1,6+0+0+4294967295", app)
	}
	f := newFixture(t, "echo", address(0))
	f.mustStart()
	f.serve(0)
	other := *f
	other.listen("other", address(1))
	other.req.User = "daemon"
	other.mustStart()
	// The kernel takes one uid at an address, and these have two users.
	owned := func(generation string, want uint32) {
		t.Helper()
		fds := f.fds(generation)
		if len(fds) == 0 {
			t.Errorf("no socket of %s", generation)
		}
		for _, fd := range fds {
			var st unix.Stat_t
			must(t, unix.Fstat(fd, &st))
			if st.Uid != want {
				t.Errorf("a socket of %s belongs to uid %d, not %d", generation, st.Uid, want)
			}
		}
	}
	owned("grm.echo.1.", 0)
	owned("grm.other.1.", 0)
	if names := strings.Join(f.names(), " "); !strings.Contains(names, "grm.echo.1.0") || !strings.Contains(names, "grm.other.1.0") {
		t.Errorf("stored: %s", names)
	}
	// The same number as the other one has.
	third := *f
	third.listen("third", address(1))
	if err := third.start(); Status(err) != StatusConflict || !strings.Contains(err.Error(), "as app 1") {
		t.Errorf("a third one: status %d: %v", Status(err), err)
	}
	third.listen("third", address(1)+"&flows=2048")
	if err := third.start(); Status(err) != StatusConflict || !strings.Contains(err.Error(), "flows is 65536, not 2048") {
		t.Errorf("a third one: status %d: %v", Status(err), err)
	}
	// A grm that knew one user only gave them to that one.
	for _, fd := range append(f.fds("grm.echo."), f.fds("grm.other.")...) {
		must(t, unix.Fchown(fd, 65534, -1))
	}
	f.nextRun()
	f.mustStart()
	owned("grm.echo.2.", 65534)
	for n, which := range []*fixture{&other, f} {
		which.setUnit(func(u *systemd.Unit) { u.Job = "stop" })
		must(t, StopPost(context.Background(), which.req, which.env))
		if keys, err := bpfprog.Groups(); err != nil || len(keys) != 1-n {
			t.Errorf("groups %v, %v", keys, err)
		}
	}
	if left := f.snapshot(); left != "" {
		t.Errorf("left:\n%s", left)
	}
}

// More sockets than one message carries.
func TestManySockets(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?name=a&sockets=256&dissector=noop", "tcp://127.0.0.1:5201?name=b&sockets=256")
	f.mustStart()
	if n := len(f.names()); n != 513 {
		t.Errorf("%d stored", n)
	}
	f.serve(0)
	if where := f.arrives(f.req.Listeners[0]); where == "" {
		t.Error("a packet came nowhere")
	}
}

// A server that has closed the sockets it was given is still a server.
func TestServerWithoutSockets(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	i.server.kill()
	i.server = f.spawn("server")
	i.ctl.SetPids(i.bank, i.keeper.pid(), i.server.pid())
	f.stopPost("restart", "success", "exited", "0")
	f.nextRun()
	f.mustStart()
	if plan := i.ctl.Plan(); plan.Verb != control.Start || plan.Bank == i.bank {
		t.Errorf("plan %v", plan)
	}
	f.stopPost("start", "exit-code", "exited", "1")
	if i.server.ended() || i.keeper.ended() {
		t.Error("a failed start has ended the old instance")
	}
}

// A second unit with the same name is refused, and its end does not touch the first one's.
func TestNameOfAnotherUnit(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	before := f.snapshot()
	f.nextRun()
	f.setUnit(func(u *systemd.Unit) { u.Name = "second.service" })
	f.req.Unit = "second.service"
	if err := f.start(); Status(err) != StatusConflict || !strings.Contains(err.Error(), "service echo: echo.service runs under this name") {
		t.Errorf("status %d: %v", Status(err), err)
	}
	if failed := f.state().Failed; failed != nil {
		t.Errorf("it counts as a failure of the first one: %+v", failed)
	}
	f.stopPost("stop", "success", "exited", "0")
	if d := differences(before, f.snapshot()); d != "" || i.server.ended() {
		t.Errorf("ended %v, changed:\n%s", i.server.ended(), d)
	}
}

// What a listener had goes with it.
func TestRemovedListener(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?name=a", "udp://127.0.0.1:5202?name=b")
	f.mustStart()
	old := f.serve(0)
	f.nextRun()
	f.listen("echo", "udp://127.0.0.1:5201?name=a")
	f.mustStart()
	f.serve(0)
	old.ctl.SetState(old.bank, control.Ended)
	old.crash()
	f.nextRun()
	f.mustStart()
	if names := strings.Join(f.names(), " "); names != "grm.a.2.0 grm.a.3.0 grm.ctl grm.flows.a" {
		t.Errorf("stored: %s", names)
	}
	if keys, err := bpfprog.Groups(); err != nil || len(keys) != 1 {
		t.Errorf("groups %v, %v", keys, err)
	}
	if strings.Contains(f.snapshot(), "-5202-") {
		t.Errorf("its hooks are left, and with them its maps:\n%s", f.snapshot())
	}
}

// A start that fails leaves nothing of a listener that it was the first to have.
func TestFailureWithANewListener(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201?name=a")
	f.mustStart()
	f.serve(0)
	f.nextRun()
	before := f.snapshot()
	f.listen("echo", "udp://127.0.0.1:5201?name=a", "udp://127.0.0.1:5202?name=b")
	f.env.Fault = func(step string) error {
		if step == "publish" {
			return errors.New("it fails")
		}
		return nil
	}
	if err := f.start(); err == nil {
		t.Fatal("it starts")
	}
	if d := differences(before, f.snapshot()); d != "" {
		t.Errorf("changed:\n%s", d)
	}
}

// A stop that came when nobody could be told: the servers get their time, then SIGKILL.
func TestStopWithoutStop(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	f.mustStart()
	i := f.serve(0)
	orphan := f.spawn("orphan") // ends on SIGTERM
	ended := make(chan error)
	go func() {
		// What a keeper does when it sees the flag; the server itself takes no notice.
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline) && !i.ctl.Closing(); {
			time.Sleep(time.Millisecond)
		}
		ended <- orphan.cmd.Wait()
	}()
	f.stopPost("stop", "success", "exited", "0")
	if err := <-ended; err == nil || err.Error() != "signal: terminated" {
		t.Errorf("a process without a keeper: %v", err)
	}
	if !i.server.ended() || !i.keeper.ended() {
		t.Error("processes outlive a stop")
	}
}
