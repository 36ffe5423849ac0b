// Package examples_test runs the examples as servers that know nothing of grm: by hand, and with sockets handed over.
package examples_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"grm/config"
	"grm/internal/notify"
	"grm/test/install"
	"grm/test/load"
)

// bin has the built servers.
var bin string

// activate makes this program what a service manager is to the server: it becomes the server with descriptor 3 handed over.
const activate = "GRM_TEST_ACTIVATE"

func TestMain(m *testing.M) {
	if os.Getenv(activate) != "" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		fmt.Fprintln(os.Stderr, syscall.Exec(os.Args[1], os.Args[1:], os.Environ()))
		os.Exit(127)
	}
	os.Exit(build(m))
}

func build(m *testing.M) int {
	var err error
	if bin, err = os.MkdirTemp("", "grm-examples-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(bin)
	if err := install.Build(context.Background(), bin, "./examples/..."); err != nil {
		panic(err)
	}
	return m.Run()
}

func TestFilesAreValid(t *testing.T) {
	files, err := filepath.Glob("*/*.toml")
	if err != nil || len(files) < 6 {
		t.Fatalf("%q, %v", files, err)
	}
	names, ports, users := map[string]string{}, map[string]string{}, map[string]string{}
	for _, file := range files {
		s, err := config.Load(file)
		if err != nil {
			t.Error(err)
			continue
		}
		if s.Name+".toml" != filepath.Base(file) {
			t.Errorf("%s is service %s", file, s.Name)
		}
		unique := func(seen map[string]string, what string) {
			if other := seen[what]; other != "" {
				t.Errorf("%s and %s: both %s", file, other, what)
			}
			seen[what] = file
		}
		unique(names, s.Name)
		unique(users, s.User)
		for _, l := range s.Listen {
			unique(ports, strconv.Itoa(int(l.Address.Port())))
		}
	}
}

// start runs a server with a notify socket and, if there is one, a socket to take over. It returns when the server is ready.
func start(t *testing.T, socket *net.UDPConn, args ...string) *exec.Cmd {
	t.Helper()
	ready, err := notify.Listen(filepath.Join(t.TempDir(), "notify"))
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+ready.Address())
	cmd.Stderr = os.Stderr
	if socket != nil {
		f, err := socket.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Path, cmd.Args = "/proc/self/exe", append([]string{"activate"}, args...)
		cmd.ExtraFiles = []*os.File{f}
		cmd.Env = append(cmd.Env, activate+"=1", "LISTEN_FDS=1")
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if err := ready.Wait(30_000); err != nil {
		t.Fatal(err)
	}
	m, err := ready.Receive()
	if err != nil || string(m.Text) != "READY=1" {
		t.Fatalf("%v: notified %q, %v", args, m.Text, err)
	}
	m.Close()
	return cmd
}

// drive puts a load on a server and returns an account in which nothing is lost.
func drive(t *testing.T, o load.Options) load.Result {
	t.Helper()
	// Little enough for the smallest socket queue and the busiest machine.
	o.Flows, o.Pace, o.Length, o.Duration = 10, 50*time.Millisecond, 10, 500*time.Millisecond
	g, err := load.Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Err(); err != nil || r.Sent == 0 {
		t.Errorf("%v: %v", r, err)
	}
	return r
}

func bind(t *testing.T) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// freePort is a port that was free a moment ago.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	c, at := bind(t)
	c.Close()
	return at
}

func TestUDPServers(t *testing.T) {
	for _, server := range []struct {
		args     []string
		protocol load.Protocol
		byHand   bool // can listen elsewhere than at its fixed port
	}{
		{[]string{filepath.Join(bin, "echo")}, load.Echo{}, true},
		{[]string{filepath.Join(bin, "dns")}, load.DNS{}, true},
		{[]string{filepath.Join(bin, "established")}, load.Echo{}, true},
		{[]string{"/usr/bin/python3", "echo-python/echo.py"}, load.Echo{}, false},
	} {
		t.Run(filepath.Base(server.args[len(server.args)-1]), func(t *testing.T) {
			if _, err := os.Stat(server.args[0]); err != nil {
				t.Skip(err)
			}
			socket, at := bind(t)
			cmd := start(t, socket, server.args...)
			socket.Close()
			r := drive(t, load.Options{Targets: []netip.AddrPort{at}, Protocol: server.protocol})
			if name := strconv.Itoa(cmd.Process.Pid); len(r.Instances) != 1 || r.Instances[name].Answers != r.Sent {
				t.Errorf("not all answers are from process %s: %v", name, r)
			}
			if !server.byHand {
				return
			}
			at = freePort(t)
			cmd = start(t, nil, append(server.args, "-listen", at.String())...)
			drive(t, load.Options{Targets: []netip.AddrPort{at}, Protocol: server.protocol})
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("after SIGTERM: %v", err)
			}
		})
	}
}

func TestTCPServer(t *testing.T) {
	at := freePort(t) // of UDP; for TCP it is as good as any
	cmd := start(t, nil, filepath.Join(bin, "tcp"), "-listen", at.String())
	c, err := net.DialTimeout("tcp", at.String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewScanner(c)
	for i := range 10 {
		fmt.Fprintf(c, "line %d\n", i)
		if want := fmt.Sprintf("%d line %d", cmd.Process.Pid, i); !answers.Scan() || answers.Text() != want {
			t.Fatalf("got %q (%v), want %q", answers.Text(), answers.Err(), want)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if answers.Scan() {
		t.Errorf("an answer after SIGTERM: %q", answers.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// TestReadme checks that every example is listed, and nothing else.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*/*.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		dir := filepath.Dir(file)
		if !strings.Contains(string(readme), fmt.Sprintf("[%s](%s)", dir, dir)) {
			t.Errorf("README.md does not list %s", dir)
		}
	}
	if n := strings.Count(string(readme), "| ["); n != len(files) {
		t.Errorf("README.md lists %d examples of %d", n, len(files))
	}
}
