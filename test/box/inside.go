package box

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// searchPath is $PATH of PID 1 and of commands that run in the box.
const searchPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Command prepares a command that runs in all of the box's namespaces, as root, with a clean environment.
func (b *Box) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter",
		append([]string{"--target", strconv.Itoa(b.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--", name}, args...)...)
	cmd.Env = []string{"PATH=" + searchPath, "LC_ALL=C.UTF-8", "SYSTEMD_PAGER=cat", "SYSTEMD_COLORS=0", "SYSTEMD_URLIFY=0"}
	// nsenter forks to get into the pid namespace: both belong to one process group, and end together.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// Exec runs a command in the box to its end, within the box's timeout, and returns what it wrote to stdout.
// The error names the command and has what it wrote to stderr; it wraps the [exec.ExitError].
func (b *Box) Exec(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), b.opts.Timeout)
	defer cancel()
	cmd := b.Command(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("not done within %v", b.opts.Timeout)
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), err
}

// Systemctl runs systemctl in the box and returns its output.
func (b *Box) Systemctl(args ...string) (string, error) { return b.Exec("systemctl", args...) }

// Path is the path by which the host sees a file of the box. Symbolic links with absolute targets lead back to the host: name the real file.
func (b *Box) Path(name string) string { return fmt.Sprintf("/proc/%d/root%s", b.pid, name) }

// ReadFile reads a file of the box.
func (b *Box) ReadFile(name string) (string, error) {
	data, err := os.ReadFile(b.Path(name))
	return string(data), err
}

// WriteFile writes a file of the box, and makes the directories that lead to it.
func (b *Box) WriteFile(name, data string, mode os.FileMode) error {
	if err := os.MkdirAll(b.Path(path.Dir(name)), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(b.Path(name), []byte(data), mode); err != nil {
		return err
	}
	return os.Chmod(b.Path(name), mode) // whatever the umask
}

// InstallUnits writes unit files (name → text) and lets systemd read them.
func (b *Box) InstallUnits(units map[string]string) error {
	for name, text := range units {
		if err := b.WriteFile("/etc/systemd/system/"+name, text, 0o644); err != nil {
			return fmt.Errorf("install unit %s: %w", name, err)
		}
	}
	_, err := b.Systemctl("daemon-reload")
	return err
}

// AddUser makes a system user with a group of the same name, in the box alone, and returns its number.
func (b *Box) AddUser(name string) (uid int, err error) {
	const passwd, group = "/etc/passwd", "/etc/group"
	users, err := b.ReadFile(passwd)
	if err != nil {
		return 0, err
	}
	groups, err := b.ReadFile(group)
	if err != nil {
		return 0, err
	}
	taken := func(table string, field int, value string) bool {
		return slices.ContainsFunc(strings.Split(table, "\n"), func(line string) bool {
			fields := strings.Split(line, ":")
			return len(fields) > field && fields[field] == value
		})
	}
	if taken(users, 0, name) || taken(groups, 0, name) {
		return 0, fmt.Errorf("add user %s: it exists", name)
	}
	for uid = 600; taken(users, 2, strconv.Itoa(uid)) || taken(groups, 2, strconv.Itoa(uid)); uid++ {
	}
	err = errors.Join(
		b.WriteFile(group, fmt.Sprintf("%s\n%s:x:%d:\n", strings.TrimSuffix(groups, "\n"), name, uid), 0o644),
		b.WriteFile(passwd, fmt.Sprintf("%s\n%s:x:%d:%d::/nonexistent:/usr/sbin/nologin\n", strings.TrimSuffix(users, "\n"), name, uid, uid), 0o644))
	return uid, err
}

// Show returns properties of a unit, or of the manager if unit is empty.
func (b *Box) Show(unit string, properties ...string) (map[string]string, error) {
	args := []string{"show", "--property=" + strings.Join(properties, ",")}
	if unit != "" {
		args = append(args, unit)
	}
	out, err := b.Systemctl(args...)
	if err != nil {
		return nil, err
	}
	props := map[string]string{}
	for line := range strings.Lines(out) {
		if k, v, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			props[k] = v
		}
	}
	return props, nil
}

// Property returns one property of a unit.
func (b *Box) Property(unit, property string) (string, error) {
	props, err := b.Show(unit, property)
	return props[property], err
}

// WaitProperty waits until a unit's property has a value.
func (b *Box) WaitProperty(unit, property, want string) error {
	var got string
	err := b.Wait(fmt.Sprintf("%s of %s is %q", property, unit, want), func() (ok bool, err error) {
		got, err = b.Property(unit, property)
		return got == want, err
	})
	if err != nil {
		return fmt.Errorf("%w (it is %q)", err, got)
	}
	return nil
}

// WaitActive waits for a unit's ActiveState ("active", "inactive", "failed", …).
func (b *Box) WaitActive(unit, state string) error { return b.WaitProperty(unit, "ActiveState", state) }

// FDStore returns how many descriptors systemd keeps for a unit.
func (b *Box) FDStore(unit string) (int, error) {
	n, err := b.Property(unit, "NFileDescriptorStore")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(n)
}

// Process is one process of the box.
type Process struct {
	Pid     int      // the host's number: what kill(2) here takes
	BoxPid  int      // the box's number: what MAINPID, `systemctl status` and the process itself say
	BoxPPid int      // its parent's, in the box
	Comm    string   // the short name
	Args    []string // the command line
}

// Kill sends a signal to the process.
func (p Process) Kill(sig unix.Signal) error {
	if err := unix.Kill(p.Pid, sig); err != nil {
		return fmt.Errorf("send %v to %s (pid %d in the box): %w", sig, p.Comm, p.BoxPid, err)
	}
	return nil
}

// Processes lists those in the cgroup of a unit and below, by their number in the box. A unit without a cgroup has none.
func (b *Box) Processes(unit string) ([]Process, error) {
	cgroup, err := b.Property(unit, "ControlGroup")
	if err != nil || cgroup == "" {
		return nil, err
	}
	var procs []Process
	err = filepath.WalkDir(b.Path("/sys/fs/cgroup"+cgroup), func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return ignoreGone(err)
		}
		data, err := os.ReadFile(filepath.Join(name, "cgroup.procs")) // in the reader's, the host's, numbers
		if err != nil {
			return ignoreGone(err)
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			if p, ok := b.process(pid); ok {
				procs = append(procs, p)
			}
		}
		return nil
	})
	slices.SortFunc(procs, func(x, y Process) int { return x.BoxPid - y.BoxPid })
	return procs, err
}

// process reads /proc; a process that has ended meanwhile is none.
func (b *Box) process(pid int) (Process, bool) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return Process{}, false
	}
	p := Process{Pid: pid}
	for line := range strings.Lines(string(status)) {
		switch k, v, _ := strings.Cut(line, ":"); k {
		case "Name":
			p.Comm = strings.TrimSpace(v)
		case "NSpid":
			fields := strings.Fields(v)
			p.BoxPid, _ = strconv.Atoi(fields[len(fields)-1])
		}
	}
	args, _ := os.ReadFile(dir + "cmdline")
	p.Args = strings.Split(strings.TrimSuffix(string(args), "\x00"), "\x00")
	// Only the box's own /proc knows the parent by the box's number.
	if inside, err := b.ReadFile(fmt.Sprintf("/proc/%d/stat", p.BoxPid)); err == nil {
		if _, rest, ok := strings.Cut(inside, ") "); ok {
			if fields := strings.Fields(rest); len(fields) > 1 {
				p.BoxPPid, _ = strconv.Atoi(fields[1])
			}
		}
	}
	return p, p.BoxPid != 0
}

// BPFFS lists everything that is pinned in the box, by path below /sys/fs/bpf. What the kernel itself puts there does not count.
func (b *Box) BPFFS() ([]string, error) {
	names, err := b.Tree("/sys/fs/bpf")
	return slices.DeleteFunc(names, func(name string) bool { return name == "maps.debug" || name == "progs.debug" }), err
}

// Tree lists everything below a directory of the box, by path below it; none if it does not exist.
func (b *Box) Tree(dir string) ([]string, error) {
	var names []string
	root := b.Path(dir)
	err := filepath.WalkDir(root, func(name string, _ fs.DirEntry, err error) error {
		if err == nil && name != root {
			names = append(names, strings.TrimPrefix(name, root+"/"))
		}
		return ignoreGone(err)
	})
	return names, err
}

// Cgroups lists all cgroups of the box, by path below its root.
func (b *Box) Cgroups() ([]string, error) {
	var names []string
	root := b.Path("/sys/fs/cgroup")
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && name != root {
			names = append(names, strings.TrimPrefix(name, root+"/"))
		}
		return ignoreGone(err)
	})
	return names, err
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// Journal returns the messages that a unit's processes, and systemd about the unit, have logged so far.
func (b *Box) Journal(unit string) ([]string, error) {
	if _, err := b.Exec("journalctl", "--sync"); err != nil {
		return nil, err
	}
	out, err := b.Exec("journalctl", "--no-pager", "--quiet", "--output=cat", "--unit="+unit)
	return strings.Split(strings.TrimSuffix(out, "\n"), "\n"), err
}
