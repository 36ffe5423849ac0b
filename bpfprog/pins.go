package bpfprog

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	bpffs = "/sys/fs/bpf"

	// Root is where everything is pinned, by network namespace.
	Root = bpffs + "/grm"

	// MinimumKernel is the oldest kernel that has everything the programs need.
	MinimumKernel = "6.1"

	building = "new-" // prefix of what is not published yet
)

// ErrLayout says that the maps were pinned by a version of grm whose layout is
// another one. They go on working; only that version can change them.
var ErrLayout = errors.New("pinned by a grm of another layout (stop the service, then start it again)")

// Mount makes sure that there is a bpffs at /sys/fs/bpf, and that the kernel
// is not too old.
func Mount() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	var major, minor int
	release := unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major < 6 || major == 6 && minor < 1) {
		return fmt.Errorf("kernel %s: too old (grm needs Linux %s or newer)", release, MinimumKernel)
	}
	if isBPFFS() {
		return nil
	}
	if err := mountBPFFS(); err != nil {
		return fmt.Errorf("mount bpffs at %s: %w (have an administrator mount it before: mount -t bpf bpf %s)", bpffs, err, bpffs)
	}
	return nil
}

// mountBPFFS mounts it so that it stays. The mount namespace of a unit's command
// ends with that command, whatever privileges it has: in a process that the
// service manager has started it is mounted where that one sees it, and then here.
func mountBPFFS() error {
	const own, manager = "/proc/self/ns/mnt", "/proc/1/ns/mnt"
	here, err1 := os.Readlink(own)
	there, err2 := os.Readlink(manager)
	if os.Getppid() != 1 || err1 != nil || err2 != nil || here == there {
		return mountHere()
	}
	mounted := -1
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		done <- func() error {
			ns, err := os.Open(manager)
			if err != nil {
				return err
			}
			defer ns.Close()
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return err
			}
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("enter the service manager's mount namespace: %w", err)
			}
			if isBPFFS() {
				return errors.New("it is mounted, but hidden from this unit by its settings")
			}
			if err := mountHere(); err != nil {
				return err
			}
			mounted, err = unix.OpenTree(unix.AT_FDCWD, bpffs, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
			return err
		}()
	}()
	if err := <-done; err != nil {
		return err
	}
	defer unix.Close(mounted)
	if isBPFFS() { // it has come here by itself: what is shared depends on how the machine was booted
		return nil
	}
	return unix.MoveMount(mounted, "", unix.AT_FDCWD, bpffs, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func mountHere() error {
	return unix.Mount("bpf", bpffs, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
}

func isBPFFS() bool {
	var st unix.Statfs_t
	return unix.Statfs(bpffs, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// Dir is where the groups and services of the caller's network namespace are
// pinned. It need not exist.
func Dir() (string, error) {
	cookie, err := netnsCookie()
	if err != nil {
		return "", fmt.Errorf("network namespace: %w", err)
	}
	return filepath.Join(Root, fmt.Sprint(cookie)), nil
}

// netnsCookie names the calling thread's network namespace.
func netnsCookie() (uint64, error) {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(s) }() // nothing was written
	cookie, err := unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("getsockopt SO_NETNS_COOKIE: %w", err)
	}
	return cookie, nil
}

// entries lists a directory's names but those that are being built. A missing
// directory has none.
func entries(dir string) ([]string, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range list {
		if !strings.HasPrefix(e.Name(), building) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// lock keeps others out of what is pinned below dir until unlock is called.
func lock(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), d.Close())
	}
	// Whoever had the lock before may have removed the directory.
	ours, err := d.Stat()
	named, err2 := os.Stat(dir)
	if err = errors.Join(err, err2); err == nil && !os.SameFile(ours, named) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), d.Close())
	}
	return func() { _ = d.Close() }, nil // closing a directory releases the lock, and has nothing to lose
}

// enter makes dir, if it is not there, and keeps others out of it until unlock
// is called.
func enter(dir string) (unlock func(), err error) {
	for range 100 {
		err = os.MkdirAll(dir, 0o700)
		if err == nil {
			unlock, err = lock(dir)
		}
		if !errors.Is(err, fs.ErrNotExist) { // tidied up meanwhile
			return unlock, err
		}
	}
	return nil, err
}

// tidy removes what is empty of dir and the two directories above it, which
// enter makes anew. That is all that may fail, and no matter.
func tidy(dir string) {
	unlock, err := lock(dir)
	if err != nil {
		return
	}
	defer unlock()
	for range 3 {
		if os.Remove(dir) != nil {
			return
		}
		dir = filepath.Dir(dir)
	}
}

// publish pins everything that pin puts into a new directory, and gives it its
// name in one step. Nothing is left if anything fails. The caller has the lock
// of the parent.
func publish(parent, name string, pin func(dir string) error) error {
	dir := filepath.Join(parent, building+name)
	if err := os.RemoveAll(dir); err != nil { // of one that was killed while it built
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	err := pin(dir)
	if err == nil {
		err = beforePublish(name)
	}
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, filepath.Join(parent, name), unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return nil
}

// beforePublish lets a test fail the last step.
var beforePublish = func(name string) error { return nil }

// ensureProgram opens the program of that build pinned in dir as prefix-build,
// or loads it, pins it, and only then unpins those of other builds.
func ensureProgram(dir, prefix, build string, load func() (*ebpf.Program, error)) (p *ebpf.Program, loaded bool, err error) {
	path := filepath.Join(dir, prefix+"-"+build)
	p, err = ebpf.LoadPinnedProgram(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		if p, err = load(); err != nil {
			return nil, false, explain(err)
		}
		loaded = true
		err = p.Pin(path)
	}
	if err == nil {
		err = unpinOthers(dir, prefix, build)
	}
	if err != nil {
		if p != nil {
			err = errors.Join(err, p.Close())
		}
		return nil, false, err
	}
	return p, loaded, nil
}

func unpinOthers(dir, prefix, build string) error {
	names, err := entries(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if rest, ok := strings.CutPrefix(name, prefix+"-"); ok && rest != build && len(rest) == len(build) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
	}
	return err
}

// explain adds the verifier's log to an error, if there is one.
func explain(err error) error {
	if v, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		return fmt.Errorf("%w; the verifier says:\n%+v", err, v)
	}
	return err
}
