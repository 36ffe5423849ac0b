package box

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A program that imports this package is also the box's first process: run under the name bootArg it builds the box's file system around
// itself and becomes systemd. Like this a box needs no helper program, no shell and no privilege beyond what its parent has.
const (
	bootArg = "grm-box-init"
	bootEnv = "GRM_BOX"
)

// bootSpec is what the parent tells the first process.
type bootSpec struct {
	Options
	Console string // the host's path of the terminal that becomes /dev/console
}

func init() {
	if os.Args[0] != bootArg {
		return
	}
	var spec bootSpec
	err := json.Unmarshal([]byte(os.Getenv(bootEnv)), &spec)
	if err == nil {
		err = spec.become()
	}
	fmt.Fprintln(os.Stderr, bootArg+":", err)
	os.Exit(1)
}

// The file system is built here, on the mount point of a tmpfs that only this mount namespace sees.
const (
	stage   = "/tmp"
	newRoot = stage + "/root"
)

// vendorUnits are the ones kept of the root file system's: enough to boot, to log, to have a bus and to shut down.
var vendorUnits = []string{
	"-.slice", "system.slice", "shutdown.target", "umount.target", "final.target", "slices.target", "dbus.service", "dbus.socket",
	"systemd-journald.service", "systemd-journald.socket", "poweroff.target", "reboot.target", "halt.target", "exit.target",
	"systemd-exit.service", "systemd-poweroff.service", "systemd-reboot.service", "systemd-halt.service",
}

// hollowTargets exist, so that default dependencies on them hold, but pull nothing in: no udev, no remounts, no tmpfiles.
var hollowTargets = []string{"sysinit", "basic", "multi-user", "sockets", "paths", "timers", "network", "network-online", "local-fs", "remote-fs"}

// become turns this process, PID 1 of new namespaces, into the box's systemd. It only returns on failure.
//
// It runs in an init function, that is on the main thread, which the mounts, the namespaces and the exec all refer to.
func (s *bootSpec) become() error {
	// From inside the new cgroup, so that it is the root of what the box sees.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("unshare cgroup namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("grm-box")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	binds, err := s.openBinds() // before the tmpfs hides what is in /tmp
	if err != nil {
		return err
	}
	for _, step := range []func() error{s.mountRoot, mountDev, mountAPI, s.writeUnits} {
		if err := step(); err != nil {
			return err
		}
	}
	for _, b := range binds {
		if err := b.attach(); err != nil {
			return err
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root to %s: %w", newRoot, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	// systemd must neither load modules nor set the clock of the machine that it is a guest of.
	for _, c := range []uintptr{unix.CAP_SYS_MODULE, unix.CAP_SYS_TIME} {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	target := "console"
	if s.Journal {
		target = "journal"
	}
	const systemd = "/usr/lib/systemd/systemd"
	err = unix.Exec(systemd,
		[]string{systemd, "--system", "--unit=box.target", "--log-target=" + target, "--log-level=" + s.LogLevel, "--show-status=0"},
		[]string{"container=grm-box", "PATH=" + searchPath})
	return fmt.Errorf("exec %s: %w (is systemd installed?)", systemd, err)
}

// mountRoot puts the overlay root together. Separate mounts of the host that hold parts of its system get overlays of their own.
func (s *bootSpec) mountRoot() error {
	root, err := unix.Open(s.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) // it may be below what the tmpfs hides
	if err != nil {
		return fmt.Errorf("root of the box %s: %w", s.Root, err)
	}
	defer unix.Close(root)
	lower := map[string]string{"/": fmt.Sprintf("/proc/self/fd/%d", root)}
	if s.Root == "/" {
		for _, dir := range []string{"/usr", "/etc", "/var", "/opt", "/srv", "/root", "/home"} {
			if isMountPoint(dir) {
				lower[dir] = dir
			}
		}
	}
	if err := mount("tmpfs", stage, "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	for i, dir := range slices.Sorted(maps.Keys(lower)) {
		up, work := fmt.Sprintf("%s/up%d", stage, i), fmt.Sprintf("%s/work%d", stage, i)
		if err := mount("overlay", newRoot+dir, "overlay", 0, "lowerdir="+lower[dir]+",upperdir="+up+",workdir="+work, up, work); err != nil {
			return err
		}
	}
	return nil
}

// mountDev makes a /dev of the usual harmless devices: nothing in the box can reach, or leave something in, the host's.
func mountDev() error {
	dev := newRoot + "/dev"
	if err := mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID, "mode=0755"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		if err := touch(filepath.Join(dev, name)); err != nil {
			return err
		}
		if err := mount("/dev/"+name, filepath.Join(dev, name), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(to, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return errors.Join(
		mount("devpts", dev+"/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"),
		mount("tmpfs", dev+"/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"))
}

// mountAPI mounts the kernel's file systems for the new namespaces. Of /proc/sys only the network's part can be written: it is the box's own.
func mountAPI() error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		fs, at string
		flags  uintptr
		opts   string
	}{
		{"proc", "/proc", safe, ""},
		{"sysfs", "/sys", safe, ""},
		{"cgroup2", "/sys/fs/cgroup", safe, ""},
		{"bpf", "/sys/fs/bpf", safe, "mode=0700"},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/var/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := mount(m.fs, newRoot+m.at, m.fs, m.flags, m.opts); err != nil {
			return err
		}
	}
	sys, net := newRoot+"/proc/sys", newRoot+"/proc/sys/net"
	return errors.Join(
		mount(net, net, "", unix.MS_BIND, ""),
		mount(sys, sys, "", unix.MS_BIND|unix.MS_REC, ""),
		mount("", sys, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|safe, ""),
		os.MkdirAll(newRoot+"/run/lock", 0o755))
}

// writeUnits leaves systemd with a minimal set of units and no generators.
func (s *bootSpec) writeUnits() error {
	const vendor = "/usr/lib/systemd/system"
	kept := map[string][]byte{}
	for _, name := range vendorUnits {
		if data, err := os.ReadFile(newRoot + vendor + "/" + name); err == nil {
			kept[name] = data
		}
	}
	for _, name := range hollowTargets {
		kept[name+".target"] = []byte("[Unit]\nDefaultDependencies=no\nConflicts=shutdown.target\nBefore=shutdown.target\n")
	}
	wants := ""
	if s.DBus {
		wants += "Wants=dbus.socket\n"
	}
	if s.Journal {
		wants += "Wants=systemd-journald.service\n"
	}
	kept["box.target"] = []byte("[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n" + wants)
	for _, dir := range []string{vendor, "/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system-generators", "/etc/systemd/system-generators"} {
		if err := mount("tmpfs", newRoot+dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return err
		}
	}
	for name, data := range kept {
		if err := os.WriteFile(newRoot+vendor+"/"+name, data, 0o644); err != nil {
			return err
		}
	}
	conf := newRoot + "/run/systemd/journald.conf.d"
	if err := os.MkdirAll(conf, 0o755); err != nil {
		return err
	}
	return os.WriteFile(conf+"/box.conf",
		[]byte("[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nForwardToConsole=no\nForwardToSyslog=no\nForwardToWall=no\nRateLimitIntervalSec=0\n"), 0o644)
}

// bind is something of the host's on its way into the box.
type bind struct {
	tree   int // a detached mount
	isDir  bool
	target string
}

// openBinds takes hold of everything that the box is to show of the host's, by detached mounts that no later mount can hide.
func (s *bootSpec) openBinds() ([]bind, error) {
	want := map[string]string{"/dev/console": s.Console}
	for to, from := range s.Binds {
		want[to] = from
	}
	if s.Bin != "" {
		want[BinDir] = s.Bin
	}
	var binds []bind
	for to, from := range want {
		st, err := os.Stat(from)
		if err != nil {
			return nil, fmt.Errorf("bind %s into the box: %w", from, err)
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("bind %s into the box: open_tree: %w", from, err)
		}
		if st.Mode()&os.ModeDevice == 0 {
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
				return nil, fmt.Errorf("bind %s into the box: make read-only: %w", from, err)
			}
		}
		binds = append(binds, bind{fd, st.IsDir(), to})
	}
	return binds, nil
}

func (b bind) attach() error {
	target := newRoot + b.target
	err := os.MkdirAll(filepath.Dir(target), 0o755)
	if b.isDir {
		err = errors.Join(err, os.MkdirAll(target, 0o755))
	} else {
		err = errors.Join(err, touch(target))
	}
	if err != nil {
		return fmt.Errorf("bind to %s in the box: %w", b.target, err)
	}
	if err := unix.MoveMount(b.tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("bind to %s in the box: move_mount: %w", b.target, err)
	}
	return unix.Close(b.tree)
}

// loopbackUp brings up the new network namespace's only interface.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// mount mounts, after making the mount point, and any directories given, where they are missing.
func mount(source, target, fs string, flags uintptr, opts string, dirs ...string) error {
	if flags&unix.MS_BIND == 0 {
		dirs = append(dirs, target)
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("mount %s at %s: %w", source, target, err)
		}
	}
	if err := unix.Mount(source, target, fs, flags, opts); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, strings.TrimPrefix(target, newRoot), err)
	}
	return nil
}

func isMountPoint(dir string) bool {
	var here, above unix.Stat_t
	return unix.Stat(dir, &here) == nil && unix.Stat(dir+"/..", &above) == nil && here.Dev != above.Dev
}

func touch(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDONLY, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}
