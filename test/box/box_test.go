package box

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// hostState is what a box could leave behind, or change, on its host.
func hostState(t *testing.T) []string {
	t.Helper()
	state := strings.Split(string(must[[]byte](t)(os.ReadFile("/proc/self/mountinfo"))), "\n")
	for _, name := range []string{"/proc/sys/kernel/hostname", "/etc/passwd", "/etc/machine-id", "/proc/sys/fs/file-max", "/proc/sys/fs/nr_open"} {
		data, _ := os.ReadFile(name)
		state = append(state, name+": "+string(data))
	}
	for _, pattern := range []string{"/usr/lib/grm", "/run/systemd/*", "/dev/*", "/sys/fs/bpf/*"} {
		state = append(state, must[[]string](t)(filepath.Glob(pattern))...)
	}
	return append(state, must[[]string](t)(filepath.Glob(filepath.Join(must[string](t)(cgroupBase()), ownCgroups())))...)
}

func ownCgroups() string { return cgroupPrefix + strconv.Itoa(os.Getpid()) + "-*" }

func TestLeavesNothing(t *testing.T) {
	needRoot(t)
	before := hostState(t)
	b := must[*Box](t)(Start(context.Background(), Options{Journal: true, DBus: true}))
	if err := b.InstallUnits(map[string]string{"left.service": "[Service]\nExecStart=/bin/sleep infinity\nKillMode=process\nDelegate=yes\n"}); err != nil {
		t.Fatal(err)
	}
	must[string](t)(b.Systemctl("start", "left.service"))
	procs := must[[]Process](t)(b.Processes("left.service"))
	if len(procs) != 1 {
		t.Fatalf("processes of the service: %v", procs)
	}
	must[int](t)(b.AddUser("somebody"))
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(procs[0].Pid, 0); err != unix.ESRCH {
		t.Errorf("a process of the box lives on: %v", err)
	}
	if after := hostState(t); !slices.Equal(before, after) {
		t.Errorf("the host changed:\n%q\n%q", before, after)
	}
	if err := b.Stop(); err != nil {
		t.Errorf("second stop: %v", err)
	}
}

// ownerEnv makes this test program boot a box, tell its number and wait to be killed.
const ownerEnv = "GRM_BOX_TEST_OWNER"

func TestMain(m *testing.M) {
	if os.Getenv(ownerEnv) != "" {
		b, err := Start(context.Background(), Options{})
		if err != nil {
			panic(err)
		}
		fmt.Println(b.Pid())
		time.Sleep(time.Minute)
		return
	}
	os.Exit(m.Run())
}

func TestOwnerKilled(t *testing.T) {
	needRoot(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), ownerEnv+"=1")
	out := must[io.ReadCloser](t)(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	_, err := fmt.Fscan(out, &pid)
	if err := errors.Join(err, cmd.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	wait := &Box{opts: Options{Timeout: defaultTimeout}}
	if err := wait.Wait("PID 1 of the orphaned box ends", func() (bool, error) { return unix.Kill(pid, 0) == unix.ESRCH, nil }); err != nil {
		t.Error(err)
	}
	base := must[string](t)(cgroupBase())
	left := filepath.Join(base, cgroupPrefix+strconv.Itoa(cmd.Process.Pid)+"-1")
	if err := wait.Wait("a sweep removes its cgroup", func() (bool, error) {
		sweep(base)
		_, err := os.Stat(left)
		return errors.Is(err, os.ErrNotExist), nil
	}); err != nil {
		t.Error(err)
	}
}

func TestServices(t *testing.T) {
	needRoot(t)
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "hello"), []byte("#!/bin/sh\necho \"hello from $(id -un)\"\nexec sleep infinity\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	b := ForTest(t, Options{Journal: true, Bin: bin})
	uid := must[int](t)(b.AddUser("alice"))
	if _, err := b.AddUser("alice"); err == nil {
		t.Error("the same user twice")
	}
	if other := must[int](t)(b.AddUser("bob")); other == uid {
		t.Error("two users have one number")
	}
	if err := b.InstallUnits(map[string]string{"hello.service": "[Service]\nExecStart=" + BinDir + "/hello\nUser=alice\nPrivateTmp=yes\nProtectSystem=strict\nPrivateDevices=yes\nProtectControlGroups=yes\nFileDescriptorStoreMax=3\n"}); err != nil {
		t.Fatal(err)
	}
	must[string](t)(b.Systemctl("start", "hello.service"))
	if err := b.WaitActive("hello.service", "active"); err != nil {
		t.Fatal(err)
	}
	if n := must[int](t)(b.FDStore("hello.service")); n != 0 {
		t.Errorf("fd store: %d", n)
	}
	if err := b.Wait("its line is in the journal", func() (bool, error) {
		lines, err := b.Journal("hello.service")
		return slices.Contains(lines, "hello from alice"), err
	}); err != nil {
		t.Error(err)
	}

	procs := must[[]Process](t)(b.Processes("hello.service"))
	main := must[string](t)(b.Property("hello.service", "MainPID"))
	if len(procs) != 1 || strconv.Itoa(procs[0].BoxPid) != main || procs[0].BoxPPid != 1 || procs[0].Comm != "sleep" || !slices.Equal(procs[0].Args, []string{"sleep", "infinity"}) {
		t.Fatalf("processes %+v, main %s", procs, main)
	}
	if err := procs[0].Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := b.WaitProperty("hello.service", "Result", "signal"); err != nil {
		t.Error(err)
	}
	if procs := must[[]Process](t)(b.Processes("hello.service")); procs != nil {
		t.Errorf("processes of a failed unit: %v", procs)
	}

	if names := must[[]string](t)(b.BPFFS()); len(names) != 0 {
		t.Errorf("a new box has pins: %q", names)
	}
	must[string](t)(b.Exec("mkdir", "/sys/fs/bpf/mine"))
	if names := must[[]string](t)(b.BPFFS()); !slices.Equal(names, []string{"mine"}) {
		t.Errorf("pins: %q", names)
	}
	if _, err := b.Exec("sh", "-c", "echo oh >&2; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3: oh") {
		t.Errorf("error of a command: %v", err)
	}
	if _, err := b.Exec("sh", "-c", "echo x > /proc/sys/kernel/hostname || exit 1"); err == nil {
		t.Error("the box can write the host's /proc/sys")
	}
	if _, err := b.Exec("sh", "-c", "echo 2048 > /proc/sys/net/ipv4/ip_local_port_range; sysctl -qw net.ipv4.ip_local_port_range='10000 65000'"); err != nil {
		t.Errorf("the box cannot set up its own network: %v", err)
	}
	if _, err := b.Exec("touch", BinDir+"/x"); err == nil {
		t.Error("the box can write to the directory of binaries")
	}
}

func TestDBus(t *testing.T) {
	needRoot(t)
	b := ForTest(t, Options{DBus: true})
	out := must[string](t)(b.Exec("busctl", "--system", "get-property", "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", "Version"))
	if !strings.HasPrefix(out, "s ") {
		t.Errorf("version over the bus: %q", out)
	}
}

func TestTwoBoxesAndTheirNetworks(t *testing.T) {
	needRoot(t)
	const listen = "[Service]\nType=exec\nExecStart=/usr/bin/python3 -c 'import socket,time; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind((\"127.0.0.1\",5201)); d,a=s.recvfrom(99); s.sendto(d,a); time.sleep(60)'\n"
	boxes := []*Box{ForTest(t, Options{}), ForTest(t, Options{})}
	for _, b := range boxes {
		if err := b.InstallUnits(map[string]string{"one.service": listen}); err != nil {
			t.Fatal(err)
		}
		must[string](t)(b.Systemctl("start", "one.service"))
		if err := b.WaitActive("one.service", "active"); err != nil {
			t.Error(err)
		}
	}
	here := must[string](t)(os.Readlink("/proc/self/ns/net"))
	one, two := must[string](t)(os.Readlink(boxes[0].NetNS())), must[string](t)(os.Readlink(boxes[1].NetNS()))
	if one == two || one == here || two == here {
		t.Errorf("network namespaces: %s, %s and here %s", one, two, here)
	}
}

func TestFailuresAreClear(t *testing.T) {
	needRoot(t)
	for what, o := range map[string]Options{
		"bind /nonexistent":  {Bin: "/nonexistent"},
		"is systemd install": {Root: t.TempDir()},
	} {
		if b, err := Start(context.Background(), o); err == nil {
			t.Errorf("%s: no error (%v)", what, b.Stop())
		} else if !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Start(ctx, Options{}); err == nil {
		t.Error("booted although it was cancelled")
	}
	b := ForTest(t, Options{Timeout: 3 * time.Second})
	if err := b.WaitActive("no.service", "active"); err == nil || !strings.Contains(err.Error(), "inactive") {
		t.Errorf("wait for a unit that does not exist: %v", err)
	}
	if left := must[[]string](t)(filepath.Glob(filepath.Join(must[string](t)(cgroupBase()), ownCgroups()))); len(left) != 1 {
		t.Errorf("cgroups: %q", left)
	}
}
