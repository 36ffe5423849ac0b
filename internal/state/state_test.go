package state

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testDir(t *testing.T) *Dir {
	t.Helper()
	d, err := Open(filepath.Join(t.TempDir(), "grm"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func sample() *State {
	s := New("echo")
	s.Unit, s.User, s.UID, s.Generation, s.Restarts = "echo.service", "echo", 998, 7, 2
	s.Plan = &Plan{Verb: "start", Bank: 3, Generation: 7, Invocation: "abc", At: 12 * time.Second}
	s.Failed = &Failed{Generation: 7, Reason: "exit status 1", At: time.Unix(1700000000, 0).UTC()}
	s.Banks[3] = Bank{Bank: 3, Generation: 6, Created: time.Unix(1600000000, 0).UTC(), Cgroups: []uint64{4711},
		Listeners: []Listener{{Name: "quic", Address: "udp://0.0.0.0:443?name=quic&sockets=2", Inodes: []uint64{11, 12}}}}
	return s
}

func TestWriteRead(t *testing.T) {
	d := testDir(t)
	if _, err := d.Read("echo"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("state of nothing: %v", err)
	}
	for range 2 { // the second time over the first
		if err := d.Write(sample()); err != nil {
			t.Fatal(err)
		}
		s, err := Read(d.path, "echo")
		if err != nil || !reflect.DeepEqual(s, sample()) {
			t.Fatalf("%v\n%+v\n%+v", err, s, sample())
		}
	}
	info, err := os.Stat(d.Path("echo"))
	if err != nil || info.Mode() != 0o644 {
		t.Fatalf("%v, mode %v", err, info.Mode())
	}
	if b, found := sample().Find(6); !found || b.Bank != 3 || b.Sockets() != 2 || len(b.Inodes()) != 2 {
		t.Fatalf("found %v, %+v", found, b)
	}
	if err := d.Remove("echo"); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(d.path); len(names) != 0 {
		t.Fatalf("left: %v", names)
	}
	if err := d.Remove("echo"); err != nil {
		t.Fatalf("remove nothing: %v", err)
	}
}

// A unit's UMask=0077 must not hide the record from those who may read it.
func TestUmask(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	d := testDir(t)
	if err := d.Write(sample()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{d.path, filepath.Join(d.path, "echo")} {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, mode %v", dir, err, info.Mode())
		}
	}
}

func TestAfterAKilledWrite(t *testing.T) {
	d := testDir(t)
	if err := d.Write(sample()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Path("echo")+".new", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := sample()
	s.Generation = 9
	if err := d.Write(s); err != nil {
		t.Fatal(err)
	}
	if s, err := d.Read("echo"); err != nil || s.Generation != 9 {
		t.Fatalf("%v, %+v", err, s)
	}
}

// What another user could have put there is neither read nor written.
func TestUnsafe(t *testing.T) {
	chown := func(t *testing.T, path string) {
		if os.Geteuid() != 0 {
			t.Skip("only root can give files away")
		}
		if err := os.Lchown(path, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		spoil func(t *testing.T, d *Dir)
		says  string
	}{
		"file of another user":      {func(t *testing.T, d *Dir) { chown(t, d.Path("echo")) }, "belongs to uid 65534"},
		"directory of another user": {func(t *testing.T, d *Dir) { chown(t, filepath.Dir(d.Path("echo"))) }, "belongs to uid 65534"},
		"root of another user":      {func(t *testing.T, d *Dir) { chown(t, d.path) }, "belongs to uid 65534"},
		"writable file":             {func(t *testing.T, d *Dir) { os.Chmod(d.Path("echo"), 0o666) }, "mode 0666"},
		"writable directory":        {func(t *testing.T, d *Dir) { os.Chmod(filepath.Dir(d.Path("echo")), 0o777) }, "mode 0777"},
		"symbolic link to a file": {func(t *testing.T, d *Dir) {
			os.Rename(d.Path("echo"), d.path+"/x")
			os.Symlink(d.path+"/x", d.Path("echo"))
		}, "symbolic link"},
		"symbolic link to a directory": {func(t *testing.T, d *Dir) {
			os.Rename(filepath.Dir(d.Path("echo")), d.path+"/x")
			os.Symlink(d.path+"/x", d.path+"/echo")
		}, "symbolic link"},
		"fifo": {func(t *testing.T, d *Dir) {
			os.Remove(d.Path("echo"))
			unix.Mkfifo(d.Path("echo"), 0o644)
		}, "another kind"},
	} {
		t.Run(name, func(t *testing.T) {
			d := testDir(t)
			if err := d.Write(sample()); err != nil {
				t.Fatal(err)
			}
			c.spoil(t, d)
			if _, err := Read(d.path, "echo"); !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("read: %v", err)
			}
		})
	}
}

// A write goes through no link, neither to the directory nor to the temporary file.
func TestWriteThroughLinks(t *testing.T) {
	d := testDir(t)
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Dir(victim), d.path+"/echo"); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(sample()); !errors.Is(err, ErrUnsafe) {
		t.Fatalf("wrote through a link: %v", err)
	}
	if err := os.Remove(d.path + "/echo"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.path+"/echo", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"state.json", "state.json.new"} {
		if err := os.Symlink(victim, d.path+"/echo/"+name); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Write(sample()); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(victim); err != nil || string(text) != "precious" {
		t.Fatalf("%v: %q", err, text)
	}
}

func TestGarbage(t *testing.T) {
	for text, says := range map[string]string{
		"":                               "unexpected end",
		"{":                              "unexpected end",
		"garbage":                        "invalid character",
		"[]":                             "cannot unmarshal",
		`{"version":1}`:                  `of service ""`,
		`{"version":2,"service":"echo"}`: "version 2",
		`{"version":1,"service":"echo","generation":18446744073709551615}`:                        "generation 18446744073709551615",
		`{"version":1,"service":"echo","generation":1,"banks":{"40":{"bank":40,"generation":1}}}`: "bank 40",
		`{"version":1,"service":"echo","generation":1,"banks":{"4":{"bank":5,"generation":1}}}`:   "bank 5 under number 4",
		`{"version":1,"service":"echo","generation":1,"banks":{"4":{"bank":4,"generation":2}}}`:   "generation 2",
		`{"version":1,"service":"echo","generation":1,"banks":{"4":{"bank":4,"generation":0}}}`:   "generation 0",
		`{"version":1,"service":"echo","plan":{"bank":-1}}`:                                       "plan for bank -1",
		`{"version":1,"service":"echo","restarts":-1}`:                                            "cannot unmarshal",
		`{"version":1,"service":"echo","pending":{"bank":99,"generation":1}}`:                     "bank 99",
	} {
		d := testDir(t)
		if err := d.Write(sample()); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d.Path("echo"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Read("echo"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), d.Path("echo")) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestLock(t *testing.T) {
	d := testDir(t)
	first, err := d.Lock(t.Context(), "echo")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := d.Lock(ctx, "echo"); !errors.Is(err, context.DeadlineExceeded) ||
		!strings.Contains(err.Error(), "echo.lock: another start or stop is under way") || !strings.Contains(err.Error(), "(see which one holds it: lslocks; then try again)") {
		t.Fatalf("a second lock: %v", err)
	}
	other, err := d.Lock(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Unlock(); err != nil {
		t.Fatal(err)
	}
	// One who waits on a file that is removed gets the lock of the next one.
	got := make(chan error)
	go func() {
		l, err := d.Lock(context.Background(), "echo")
		if err == nil {
			err = l.Remove()
		}
		got <- err
	}()
	if err := first.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.path + "/echo.lock"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the lock file is left: %v", err)
	}
	if err := os.Symlink("/etc/passwd", d.path+"/echo.lock"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Lock(t.Context(), "echo"); !errors.Is(err, ErrUnsafe) {
		t.Fatalf("a lock that is a link: %v", err)
	}
}

// FuzzParse: what is accepted has only numbers in their range, and is accepted
// again, unchanged, when written.
func FuzzParse(f *testing.F) {
	d, err := Open(f.TempDir() + "/grm")
	if err != nil {
		f.Fatal(err)
	}
	if err := d.Write(sample()); err != nil {
		f.Fatal(err)
	}
	text, err := os.ReadFile(d.Path("echo"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"service":"echo","banks":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := parse(text, "echo")
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		for n, b := range s.Banks {
			if n < 0 || n >= banks || b.Generation == 0 || b.Generation > s.Generation || b.Sockets() > len(b.Listeners)*slots {
				t.Fatalf("bank %d: %+v", n, b)
			}
		}
		if err := d.Write(s); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Read("echo"); err != nil {
			t.Fatal(err)
		}
	})
}
