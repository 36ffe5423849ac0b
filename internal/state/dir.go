package state

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrUnsafe says that a file or directory is not root's alone, or not what it
// must be: root neither reads nor writes there.
var ErrUnsafe = errors.New("not safe to use")

// Dir is the directory of all services' state. Nothing is reached through a
// symbolic link, and nothing is used that another user could have put there.
type Dir struct {
	path string
	fd   int
}

// Open opens the directory, and makes it if it is not there. It is for root.
func Open(path string) (*Dir, error) {
	if err := makeDir(unix.AT_FDCWD, path); err != nil {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	return open(path)
}

func open(path string) (*Dir, error) {
	fd, err := openDir(unix.AT_FDCWD, path, path, owner(path))
	if err != nil {
		return nil, err
	}
	return &Dir{path: path, fd: fd}, nil
}

// owner is whose the files must be: root's, and elsewhere than in Root, where
// tests work, the caller's.
func owner(path string) uint32 {
	if path == Root {
		return 0
	}
	return uint32(os.Geteuid())
}

// makeDir makes a directory that all may read, whatever the umask is: a unit's
// UMask= is for its root commands too. One that is there stays as it is.
func makeDir(at int, name string) error {
	const mode = 0o755
	err := unix.Mkdirat(at, name, mode)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return err
	}
	return unix.Fchmodat(at, name, mode, 0)
}

// Close closes the directory.
func (d *Dir) Close() error { return unix.Close(d.fd) }

// Path is where the state file of a service is.
func (d *Dir) Path(service string) string { return filepath.Join(d.path, service, fileName) }

// Read reads the state of a service as anybody may. There is none:
// fs.ErrNotExist.
func Read(path, service string) (*State, error) {
	d, err := open(path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Read(service)
}

// Read reads the state of a service: fs.ErrNotExist if there is none.
func (d *Dir) Read(service string) (*State, error) {
	dir, err := openDir(d.fd, service, filepath.Join(d.path, service), owner(d.path))
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	name := d.Path(service)
	fd, err := openBeneath(dir, fileName, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, refused(name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := checkOwned(fd, name, unix.S_IFREG, owner(d.path)); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxSize {
		return nil, fmt.Errorf("%s: %w: more than %d bytes", name, ErrInvalid, maxSize)
	}
	s, err := parse(text, service)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// Write replaces the state of a service as a whole: whoever reads sees the old
// one or the new one, also after a crash.
func (d *Dir) Write(s *State) error {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false) // addresses have & in them, and people read this
	e.SetIndent("", "\t")
	if err := e.Encode(s); err != nil {
		return fmt.Errorf("state of %s: %w", s.Service, err)
	}
	if err := makeDir(d.fd, s.Service); err != nil {
		return fmt.Errorf("make %s: %w", filepath.Join(d.path, s.Service), err)
	}
	dir, err := openDir(d.fd, s.Service, filepath.Join(d.path, s.Service), owner(d.path))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	name := d.Path(s.Service)
	const temporary = fileName + ".new"
	_ = unix.Unlinkat(dir, temporary, 0) // left by a run that was killed; the lock is ours
	fd, err := unix.Openat(dir, temporary, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(text.Bytes())
	if err == nil {
		err = f.Chmod(0o644) // whatever the umask is
	}
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = unix.Renameat(dir, temporary, dir, fileName)
	}
	if err == nil {
		err = unix.Fsync(dir)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, temporary, 0) // the write's own error says more
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// Remove removes the state of a service, if there is any.
func (d *Dir) Remove(service string) error {
	dir, err := openDir(d.fd, service, filepath.Join(d.path, service), owner(d.path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range []string{fileName, fileName + ".new"} {
		if e := unix.Unlinkat(dir, name, 0); e != nil && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", filepath.Join(d.path, service, name), e))
		}
	}
	_ = unix.Close(dir) // nothing was written through it
	if err == nil {
		// Keepers' notes and the like may be in it: those are not ours to remove.
		if e := unix.Unlinkat(d.fd, service, unix.AT_REMOVEDIR); e != nil && !errors.Is(e, unix.ENOTEMPTY) {
			err = fmt.Errorf("remove %s: %w", filepath.Join(d.path, service), e)
		}
	}
	return err
}

// Lock is held by who changes a service: one start, stop or delete at a time.
type Lock struct {
	dir  *Dir
	name string
	fd   int
}

// GroupsLock is the lock, named as no service can be, with which services join
// and leave the groups that they share.
const GroupsLock = "+groups"

// Lock waits for the lock of a service, or GroupsLock, as long as ctx lets it.
func (d *Dir) Lock(ctx context.Context, service string) (*Lock, error) {
	name := service + ".lock"
	for {
		fd, err := unix.Openat(d.fd, name, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, refused(filepath.Join(d.path, name), err)
		}
		held, err := d.take(ctx, fd, name)
		if held {
			return &Lock{dir: d, name: name, fd: fd}, nil
		}
		_ = unix.Close(fd) // nothing was written through it
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", filepath.Join(d.path, name), err)
		}
	}
}

// take says false without an error if the file is not the one of that name any
// more: whoever had it before removed it.
func (d *Dir) take(ctx context.Context, fd int, name string) (bool, error) {
	if err := checkOwned(fd, filepath.Join(d.path, name), unix.S_IFREG, owner(d.path)); err != nil {
		return false, err
	}
	for {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return false, err
		}
		select {
		case <-ctx.Done():
			return false, fmt.Errorf("another start or stop is under way: %w (see which one holds it: lslocks; then try again)", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	var ours, named unix.Stat_t
	if err := unix.Fstat(fd, &ours); err != nil {
		return false, err
	}
	err := unix.Fstatat(d.fd, name, &named, unix.AT_SYMLINK_NOFOLLOW)
	return err == nil && ours.Ino == named.Ino && ours.Dev == named.Dev, nil
}

// Unlock gives the lock back.
func (l *Lock) Unlock() error { return unix.Close(l.fd) }

// Remove gives the lock back and removes its file: the service is no more.
func (l *Lock) Remove() error {
	err := unix.Unlinkat(l.dir.fd, l.name, 0)
	return errors.Join(err, l.Unlock())
}

// openDir opens a directory that must be owner's alone.
func openDir(at int, name, path string, owner uint32) (int, error) {
	fd, err := openBeneath(at, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return -1, refused(path, err)
	}
	if err := checkOwned(fd, path, unix.S_IFDIR, owner); err != nil {
		_ = unix.Close(fd) // nothing was written through it
		return -1, err
	}
	return fd, nil
}

func openBeneath(at int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat2(at, name, &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
		if errors.Is(err, unix.ENOSYS) {
			// RestrictSUIDSGID= takes openat2 away from the decoy, which only reads. All names but Root's have one part,
			// and what leads to Root is root's.
			fd, err = unix.Openat(at, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// refused puts into words what open(2) says of a symbolic link.
func refused(path string, err error) error {
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%s is %w: it is, or is reached through, a symbolic link or no directory (remove it)", path, ErrUnsafe)
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

func checkOwned(fd int, path string, kind uint32, owner uint32) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != kind:
		return fmt.Errorf("%s is %w: it is of another kind (remove it)", path, ErrUnsafe)
	case st.Uid != owner:
		return fmt.Errorf("%s is %w: it belongs to uid %d, not to %d (see who made it, then remove it)", path, ErrUnsafe, st.Uid, owner)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s is %w: its mode %#o lets others write (see who did, then chmod go-w)", path, ErrUnsafe, st.Mode&0o7777)
	}
	return nil
}
