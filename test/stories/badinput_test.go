package stories

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"grm/activate"
	"grm/test/box"
)

// bad is something that is wrong with a service, its unit or the machine.
type bad struct {
	name   string
	spoil  func(*service)
	mend   func(*service) // nil: removing the drop-in does it
	status int            // grm-activate's
	says   string         // all of it; %s is a part that differs from run to run
}

// dropIn spoils the unit by lines of its [Service] section.
func dropIn(lines ...string) func(*service) {
	return func(v *service) {
		v.s.must(v.s.InstallUnits(map[string]string{v.Unit + ".d/bad.conf": "[Service]\n" + strings.Join(lines, "\n") + "\n"}))
	}
}

// by has another command run grm-activate.
func by(command string) func(*service) {
	return dropIn("ExecStartPre=", "ExecStartPre="+command)
}

// shell spoils or mends by commands as root.
func shell(commands string) func(*service) {
	return func(v *service) {
		_, err := v.s.Exec("/bin/sh", "-ec", commands)
		v.s.must(err)
	}
}

// The service's own command, and where its network namespace's pins are.
const (
	activateEcho = box.BinDir + "/grm-activate echo udp://0.0.0.0:5201"
	itsPins      = "/sys/fs/bpf/grm/[0-9]*"
)

// unfit are settings and machines that cannot do.
func unfit() []bad {
	const notifyMain = "NotifyAccess=main makes systemd ignore the sockets that ExecStartPre= stores (write NotifyAccess=all)"
	return []bad{
		{"a private network", dropIn("PrivateNetwork=yes"), nil, activate.StatusUnfit,
			"unit echo.service: PrivateNetwork=yes would bind the sockets in a network of their own (remove it)"},
		{"NotifyAccess=", dropIn("NotifyAccess=main"), nil, activate.StatusUnfit, "unit echo.service: " + notifyMain},
		{"no plus sign", by(activateEcho), nil, activate.StatusUnfit,
			"missing CAP_BPF, CAP_CHOWN, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, CAP_SYS_ADMIN, CAP_SYS_PTRACE " +
				"(run it as root; in a unit write ExecStartPre=+/usr/lib/grm/grm-activate with the plus sign)"},
		{"an old kernel", by("+/usr/bin/setarch --uname-2.6 " + activateEcho), nil, activate.StatusUnfit,
			"kernel 2.6.%s is too old: grm needs Linux 6.1 (boot a newer kernel; grm doctor says what is missing)"},
		{"bpffs that is hidden", by(`+/usr/bin/unshare --mount /bin/sh -c "mkdir /run/hidden; mount --bind /sys/fs/cgroup /run/hidden; mount -t tmpfs tmpfs /sys/fs; ` +
			`mkdir /sys/fs/cgroup; mount --bind /run/hidden /sys/fs/cgroup; exec ` + activateEcho + `"`), shell("rmdir /run/hidden"), activate.StatusUnfit,
			"mount bpffs at /sys/fs/bpf: it is mounted, but hidden from this unit by its settings (have an administrator mount it before: mount -t bpf bpf /sys/fs/bpf)"},
		{"a flag that there is not", by("+" + box.BinDir + "/grm-activate --counts=4 echo udp://0.0.0.0:5201"), nil, activate.StatusUsage,
			"flag --counts is not known (see grm-activate --help)"},
		{"not started by systemd", by("+/usr/bin/env -u NOTIFY_SOCKET " + activateEcho), nil, activate.StatusUnfit,
			"no NOTIFY_SOCKET: there is no fd store to put the sockets into (start it from a unit with Type=notify and NotifyAccess=all, or add -- COMMAND)"},
	}
}

// mended is when nothing is wrong any more.
func (b bad) mended(v *service) {
	if b.mend != nil {
		b.mend(v)
	}
	shell("rm -f /etc/systemd/system/" + v.Unit + ".d/bad.conf; systemctl daemon-reload")(v)
}

// refused asserts what was logged of a start.
func (b bad) refused(v *service, lines []string) {
	v.s.Helper()
	expected := "grm-activate: echo: " + b.says
	if b.status == activate.StatusUsage {
		expected = "grm-activate: " + b.says // whose it is is not known
	}
	if !hasLike(lines, expected) {
		v.s.Errorf("%s: nobody says\n%q, but\n%s", b.name, expected, strings.Join(lines, "\n"))
	}
	if status := fmt.Sprintf("echo.service: Control process exited, code=exited, status=%d/%%s", b.status); !hasLike(lines, status) {
		v.s.Errorf("%s: exit status %d is not in\n%s", b.name, b.status, strings.Join(lines, "\n"))
	}
}

// TestUnfit starts a service that cannot be started, for a reason after the other. Each gets one line that says what is wrong and what to do, and
// its documented exit status; nothing is left of the attempt, and systemd does not try in a loop that fills the journal.
func TestUnfit(t *testing.T) {
	lacksChroot := by("+" + bounded(slices.Sorted(maps.Keys(activate.Capabilities))...) + " " + activateEcho)
	rows := append(unfit(),
		bad{"bpffs that cannot be mounted", func(v *service) { shell("umount /sys/fs/bpf")(v); lacksChroot(v) }, shell("mount -t bpf -o mode=700 bpf /sys/fs/bpf"), activate.StatusUnfit,
			"mount bpffs at /sys/fs/bpf: enter the service manager's mount namespace: operation not permitted (have an administrator mount it before: mount -t bpf bpf /sys/fs/bpf)"},
		bad{"no fd store", dropIn("FileDescriptorStoreMax=0"), nil, activate.StatusUnfit,
			"unit echo.service: FileDescriptorStoreMax= is not set (write FileDescriptorStoreMax=561)"},
		bad{"neither", dropIn("NotifyAccess=main", "FileDescriptorStoreMax=0"), nil, activate.StatusUnfit,
			"unit echo.service: NotifyAccess=main makes systemd ignore the sockets that ExecStartPre= stores (write NotifyAccess=all); FileDescriptorStoreMax= is not set (write FileDescriptorStoreMax=561)"},
		bad{"too small an fd store", dropIn("FileDescriptorStoreMax=2"), nil, activate.StatusUnfit,
			"unit echo.service: FileDescriptorStoreMax=2 is too small: 0 descriptors are stored, 3 more are to come (write FileDescriptorStoreMax=561)"})
	s := newStory(t)
	echo := s.install("echo", quickly("0s")...)
	for _, row := range rows {
		row.spoil(echo)
		seen := len(echo.journal())
		if err := echo.Start(); err == nil {
			t.Errorf("%s: it starts", row.name)
		}
		row.refused(echo, echo.journal()[seen:])
		// It is tried again, but not as fast as that goes.
		s.must(s.Wait("an attempt waits for the next one", func() (bool, error) {
			return hasLike(echo.journal()[seen:], "grm-activate: %s: waiting %s"), nil
		}))
		s.must(echo.Stop())
		row.mended(echo)
		shell("systemctl reset-failed echo.service || :")(echo) // a stop may have killed the last attempt
		s.nothingLeft(echo)
		s.untouched()
	}
	// bpffs that is not there is mounted, and stays when the command that has done it ends.
	shell("umount /sys/fs/bpf")(echo)
	echo.start()
	shell("test $(stat -f -c %t /sys/fs/bpf) = cafe4a11")(echo) // BPF_FS_MAGIC
	g := echo.load()
	echo.restart()
	g.newFlowsAt(echo.instance(), 50)
	g.end()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestBadInput spoils what a service that runs needs for its next start, one thing at a time, and restarts it. Each gets one line that says what
// is wrong and what to do, and its documented exit status; the instance that serves goes on, nothing is changed, and once it is mended the unit
// is as before.
func TestBadInput(t *testing.T) {
	rows := append(unfit(), []bad{
		{"pins that others can write", shell("chmod 0777 " + itsPins + "/services"), shell("chmod 0700 " + itsPins + "/services"), activate.StatusUnsafe,
			"pins: /sys/fs/bpf/grm/%s/services belongs to uid 0 with mode 0777: others could have put there what is in it (see who did; then chown root and chmod 0700, or remove it)"},
		{"pins of another user", shell("chown 65534 " + itsPins), shell("chown 0 " + itsPins), activate.StatusUnsafe,
			"pins: /sys/fs/bpf/grm/%s belongs to uid 65534 with mode 0700: others could have put there what is in it (see who did; then chown root and chmod 0700, or remove it)"},
		{"a pin of something else",
			shell("cd " + itsPins + "; mv services/echo/control services/echo/kept; mv groups/udp-00000000-5201/counters services/echo/control"),
			shell("cd " + itsPins + "; mv services/echo/control groups/udp-00000000-5201/counters; mv services/echo/kept services/echo/control"), activate.StatusConflict,
			"open service echo: pinned by a grm of another layout (stop the service, then start it again): control map: control map has another layout: %s"},
		{"a record of another user", shell("chown 65534 /run/grm/echo/state.json"), shell("chown 0 /run/grm/echo/state.json"), activate.StatusUnsafe,
			"/run/grm/echo/state.json is not safe to use: it belongs to uid 65534, not to 0 (see who made it, then remove it)"},
		{"a record that is garbage", shell("cd /run/grm/echo; cp -p state.json /tmp; echo '{\"version\": 1, \"service\": \"echo\", \"banks\": {\"99\": {}}}' >state.json"),
			shell("cp -p /tmp/state.json /run/grm/echo"), activate.StatusUnsafe,
			"/run/grm/echo/state.json: invalid state file: %s (remove it: which generations live is then found out from what is pinned)"},
		{"a record elsewhere", shell("cd /run/grm/echo; mv state.json kept; ln -s /etc/passwd state.json"), shell("cd /run/grm/echo; mv kept state.json"), activate.StatusUnsafe,
			"/run/grm/echo/state.json is not safe to use: it is, or is reached through, a symbolic link or no directory (remove it)"},
		{"a directory elsewhere", shell("cd /run/grm; mv echo kept; mkdir -p /tmp/trap; ln -s /tmp/trap echo"), shell("cd /run/grm; rm echo; mv kept echo; rmdir /tmp/trap"), activate.StatusUnsafe,
			"/run/grm/echo is not safe to use: it is, or is reached through, a symbolic link or no directory (remove it)"},
		{"a directory that others can write", shell("chmod 0777 /run/grm"), shell("chmod 0755 /run/grm"), activate.StatusUnsafe,
			"/run/grm is not safe to use: its mode 0777 lets others write (see who did, then chmod go-w)"},
		{"a lock elsewhere", shell("cd /run/grm; mv echo.lock kept; ln -s /etc/passwd echo.lock"), shell("cd /run/grm; mv kept echo.lock"), activate.StatusUnsafe,
			"/run/grm/echo.lock is not safe to use: it is, or is reached through, a symbolic link or no directory (remove it)"},
	}...)
	s := newStory(t)
	echo := s.install("echo", quickly("0s")...)
	echo.start()
	g := echo.load(forever)
	server := echo.instance()
	before := echo.remains()
	users, err := s.ReadFile("/etc/passwd")
	s.must(err)
	for _, row := range rows {
		g.Mark(row.name)
		row.spoil(echo)
		seen := len(echo.journal())
		if _, err := echo.Restart(); err == nil {
			t.Errorf("%s: the restart works", row.name)
		}
		row.refused(echo, echo.journal()[seen:])
		g.more(500)
		row.mended(echo)
		echo.settled("active")
		if now := echo.instance(); now != server {
			t.Fatalf("%s: the server is %s, not %s:\n%s", row.name, now, server, strings.Join(echo.journal()[seen:], "\n"))
		}
		echo.unchanged(row.name, before)
	}
	if now, err := s.ReadFile("/etc/passwd"); err != nil || now != users {
		t.Errorf("/etc/passwd was written to, %v", err)
	}
	if r := g.Snapshot(); len(r.Instances) != 1 {
		t.Errorf("more than one instance: %v", r)
	}
	echo.restart()
	h := echo.load()
	h.newFlowsAt(echo.instance(), 50)
	h.end()
	g.end()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestClampedBuffer starts a service whose sockets do not get the buffer that was asked for: that is no reason not to start, and is said.
func TestClampedBuffer(t *testing.T) {
	echo := newFaulty(t)
	echo.order(&fault{"setsockopt.1.33", 1, false}) // SO_RCVBUFFORCE, without CAP_NET_ADMIN in the initial user namespace
	echo.start()
	const says = "grm-activate: echo: udp://0.0.0.0:5201: the receive buffer has %s bytes, not 16777216 (set sysctl net.core.rmem_max=16777216, or run it with CAP_NET_ADMIN)"
	if lines := echo.journal(); !hasLike(lines, says) {
		t.Errorf("nobody says\n%q, but\n%s", says, strings.Join(lines, "\n"))
	}
	g := echo.load()
	g.more(1000)
	g.end()
}

// journal is what the unit has logged so far.
func (v *service) journal() []string {
	v.s.Helper()
	lines, err := v.s.Journal(v.Unit)
	v.s.must(err)
	return lines
}

// hasLike says whether one of the lines is like that, with anything in place of "%s".
func hasLike(lines []string, like string) bool {
	for _, line := range lines {
		rest, matches := line, true
		for i, part := range strings.Split(like, "%s") {
			at := strings.Index(rest, part)
			if at < 0 || i == 0 && at > 0 {
				matches = false
				break
			}
			rest = rest[at+len(part):]
		}
		if matches && (rest == "" || strings.HasSuffix(like, "%s")) {
			return true
		}
	}
	return false
}
