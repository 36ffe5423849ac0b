package vm

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
)

// archive writes an initramfs in cpio's "newc" format, which the kernel
// unpacks by itself (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
// Errors stick: close returns the first one.
type archive struct {
	out   io.Writer
	at    int64
	inode int
	dirs  map[string]bool
	err   error
}

func newArchive(out io.Writer) *archive {
	return &archive{out: out, dirs: map[string]bool{".": true}}
}

// file adds a regular file, and the directories above it. The name has no
// leading slash.
func (a *archive) file(name string, mode fs.FileMode, size int64, content io.Reader) {
	a.parents(name)
	a.header(name, 0o100000|uint32(mode.Perm()), size, 0, 0)
	if a.err == nil {
		var n int64
		n, a.err = io.Copy(a.out, io.LimitReader(content, size))
		if a.at += n; a.err == nil && n != size {
			a.err = fmt.Errorf("initramfs file %s: %d bytes where %d were announced", name, n, size)
		}
	}
	a.pad()
}

// copyFile adds the file at source as name.
func (a *archive) copyFile(name, source string) {
	f, err := os.Open(source)
	if err != nil {
		a.fail(err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		a.fail(err)
		return
	}
	a.file(name, info.Mode(), info.Size(), f)
}

// copyTree adds the regular files below the directory source under name.
func (a *archive) copyTree(name, source string) {
	a.fail(filepath.WalkDir(source, func(p string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(source, p)
		if err == nil {
			a.copyFile(path.Join(name, filepath.ToSlash(rel)), p)
		}
		return err
	}))
}

// directory adds a directory, and those above it, once.
func (a *archive) directory(name string) {
	if a.dirs[name] {
		return
	}
	a.dirs[name] = true
	a.parents(name)
	a.header(name, 0o040755, 0, 0, 0)
	a.pad()
}

// console adds /dev/console, which the kernel opens as the standard files of init.
func (a *archive) console() {
	a.parents("dev/console")
	a.header("dev/console", 0o020600, 0, 5, 1)
	a.pad()
}

// close ends the archive and returns the first error of all that was added.
func (a *archive) close() error {
	a.header("TRAILER!!!", 0, 0, 0, 0)
	a.pad()
	return a.err
}

func (a *archive) parents(name string) { a.directory(path.Dir(name)) }

func (a *archive) header(name string, mode uint32, size int64, major, minor int) {
	a.inode++
	a.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0 /* uid */, 0 /* gid */, 1 /* links */, 0, /* mtime */
		size, 0, 0 /* of the device it is on */, major, minor, len(name)+1, 0 /* checksum */, name))
	a.pad()
}

// pad brings headers and contents to a multiple of four bytes.
func (a *archive) pad() { a.write(make([]byte, -a.at&3)) }

func (a *archive) write(b []byte) {
	if a.err == nil {
		var n int
		n, a.err = a.out.Write(b)
		a.at += int64(n)
	}
}

func (a *archive) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}
