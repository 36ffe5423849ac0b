package grm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/internal/notify"
)

// The test binary, run again, is the server that got sockets.
const asServer = "GRM_TEST_SERVER"

func TestMain(m *testing.M) {
	if what := os.Getenv(asServer); what != "" {
		if err := server(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// found is what a server tells the test of itself.
type found struct {
	Before, After []string // names not yet taken
	UDP, TCP      []string // local addresses
	Files         []string // names
	Environment   bool     // LISTEN_* is still there
}

func server(what string) error {
	var f found
	f.Before = Names()
	conns, err := ListenUDP("quic", "127.0.0.1:0")
	if err != nil {
		return err
	}
	for _, c := range conns {
		f.UDP = append(f.UDP, c.LocalAddr().String())
	}
	if what == "all" {
		listeners, err := ListenTCP("web", "127.0.0.1:0")
		if err != nil {
			return err
		}
		for _, l := range listeners {
			f.TCP = append(f.TCP, l.Addr().String())
		}
		for _, file := range Files("") {
			f.Files = append(f.Files, file.Name())
		}
	}
	f.After = Names()
	_, f.Environment = os.LookupEnv("LISTEN_FDS")
	return json.NewEncoder(os.Stdout).Encode(f)
}

// serve runs a server with sockets and the environment of sd_listen_fds(3).
func serve(t *testing.T, what, names string, files ...*os.File) (found, error) {
	t.Helper()
	// A shell knows the pid that LISTEN_PID has to be.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), asServer+"="+what)
	if len(files) > 0 {
		cmd.Env = append(cmd.Env, fmt.Sprint("LISTEN_FDS=", len(files)), "LISTEN_FDNAMES="+names)
	}
	cmd.ExtraFiles = files
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return found{}, errors.New(strings.TrimSpace(stderr.String()))
	}
	var f found
	if err := json.Unmarshal(out, &f); err != nil {
		t.Fatalf("server said %q: %v", out, err)
	}
	return f, nil
}

func file(t *testing.T, f *os.File, err error) *os.File {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // a duplicate that nobody wrote to
	return f
}

func udpSocket(t *testing.T) (*os.File, string) {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f, err := c.File()
	return file(t, f, err), c.LocalAddr().String()
}

func tcpSocket(t *testing.T) (*os.File, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	return file(t, f, err), l.Addr().String()
}

func TestSocketsByName(t *testing.T) {
	u1, a1 := udpSocket(t)
	u2, a2 := udpSocket(t)
	w, aw := tcpSocket(t)
	null, err := os.Open(os.DevNull)
	file(t, null, err)
	f, err := serve(t, "all", "quic:web:quic:other", u1, w, u2, null)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"quic", "web", "quic", "other"}; !slices.Equal(f.Before, want) {
		t.Errorf("names %q, want %q", f.Before, want)
	}
	if want := []string{a1, a2}; !slices.Equal(f.UDP, want) {
		t.Errorf("UDP sockets %q, want %q", f.UDP, want)
	}
	if want := []string{aw}; !slices.Equal(f.TCP, want) {
		t.Errorf("TCP sockets %q, want %q", f.TCP, want)
	}
	if want := []string{"other"}; !slices.Equal(f.Files, want) {
		t.Errorf("files %q, want %q", f.Files, want)
	}
	if len(f.After) != 0 || f.Environment {
		t.Errorf("left over: names %q, LISTEN_FDS set: %v", f.After, f.Environment)
	}
}

func TestWithoutSockets(t *testing.T) {
	f, err := serve(t, "udp", "")
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Before) != 0 || len(f.UDP) != 1 || !strings.HasPrefix(f.UDP[0], "127.0.0.1:") {
		t.Errorf("a server on its own found %+v", f)
	}
}

func TestWrongName(t *testing.T) {
	u, _ := udpSocket(t)
	_, err := serve(t, "udp", "dns", u)
	if err == nil || !strings.Contains(err.Error(), `no UDP socket is named "quic": this process was given dns`) {
		t.Errorf("a socket of another name: %v", err)
	}
}

func TestNotices(t *testing.T) {
	l, err := notify.Listen("@")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv(notify.Env, l.Address())
	for _, c := range []struct {
		send func() error
		want string
	}{
		{Ready, "READY=1"},
		{Stopping, "STOPPING=1"},
		{func() error { return Status("14 connections\nREADY=1") }, "STATUS=14 connections READY=1"},
	} {
		if err := c.send(); err != nil {
			t.Fatal(err)
		}
		m, err := l.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSuffix(string(m.Text), "\n"); got != c.want {
			t.Errorf("sent %q, want %q", got, c.want)
		}
	}
	t.Setenv(notify.Env, "")
	if err := Ready(); err != nil {
		t.Errorf("ready without a service manager: %v", err)
	}
}

func TestDrainContext(t *testing.T) {
	t.Setenv(EnvDrainSignal, "SIGUSR1")
	t.Setenv(EnvStopSignal, "SIGUSR2")
	for _, c := range []struct {
		send        syscall.Signal
		drain, stop error
	}{
		{unix.SIGUSR1, ErrDrain, nil},
		{unix.SIGUSR2, ErrStop, ErrStop},
		{unix.SIGINT, ErrStop, ErrStop},
	} {
		drain, cancelDrain := DrainContext(t.Context())
		stop, cancelStop := StopContext(t.Context())
		for range 2 { // the second one must not kill
			raise(t, c.send)
		}
		if got := ended(drain); !errors.Is(got, c.drain) {
			t.Errorf("%v: DrainContext ended with %v, want %v", c.send, got, c.drain)
		}
		if c.stop == nil {
			if err := stop.Err(); err != nil {
				t.Errorf("%v: StopContext ended with %v", c.send, err)
			}
		} else if got := ended(stop); !errors.Is(got, c.stop) {
			t.Errorf("%v: StopContext ended with %v, want %v", c.send, got, c.stop)
		}
		cancelDrain()
		cancelStop()
		cancelStop() // a second time is harmless
		settle()
	}
}

// raise sends this thread a signal: it is with Go's runtime on return, which one to the process may not be.
func raise(t *testing.T, sig syscall.Signal) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Tgkill(os.Getpid(), unix.Gettid(), sig); err != nil {
		t.Fatal(err)
	}
}

// settle waits until the runtime has handed out the signals that it has, else one of them could be for whoever asks next: signal.Stop does that.
func settle() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGWINCH)
	signal.Stop(c)
}

// ended waits for ctx and returns its cause.
func ended(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(10 * time.Second):
		return errors.New("it did not end in 10 s")
	}
}

// The real-time signals have no names.
func TestDrainSignalByNumber(t *testing.T) {
	t.Setenv(EnvDrainSignal, "40")
	t.Setenv(EnvStopSignal, "64")
	if drain, stop := drainSignal(), stopSignal(); drain != 40 || stop != 64 {
		t.Errorf("drain signal %d, stop signal %d", drain, stop)
	}
	t.Setenv(EnvStopSignal, "none")
	if stop := stopSignal(); stop != unix.SIGTERM {
		t.Errorf("stop signal %d", stop)
	}
}

func TestCancelledDrainContext(t *testing.T) {
	parent, cancelParent := context.WithCancel(t.Context())
	ctx, cancel := DrainContext(parent)
	defer cancel()
	cancelParent()
	if got := ended(ctx); !errors.Is(got, context.Canceled) {
		t.Errorf("ended with %v", got)
	}
}

func TestOptionsOfAForeignSocket(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, identify := Identify(c)
	_, cookie := Cookie(c)
	_, working := WorkingGeneration(c)
	assure := Assure(c, netip.MustParseAddrPort("127.0.0.1:9"))
	for name, err := range map[string]error{"Identify": identify, "Cookie": cookie, "WorkingGeneration": working, "Assure": assure} {
		if !errors.Is(err, ErrNoGroup) {
			t.Errorf("%s: %v, want ErrNoGroup", name, err)
		}
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Identify(c); err == nil || errors.Is(err, ErrNoGroup) {
		t.Errorf("a closed socket: %v", err)
	}
}

func TestSockaddr(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:53":        "\x02\x00\x00\x35\xc0\x00\x02\x01\x00\x00\x00\x00\x00\x00\x00\x00",
		"[2001:db8::1]:443":   "\x0a\x00\x01\xbb\x00\x00\x00\x00\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00",
		"[fe80::1%7]:1":       "\x0a\x00\x00\x01\x00\x00\x00\x00\xfe\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x07\x00\x00\x00",
		"[::ffff:1.2.3.4]:10": "\x0a\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x01\x02\x03\x04\x00\x00\x00\x00",
	} {
		if got := string(sockaddr(netip.MustParseAddrPort(address))); got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}

func ExampleListenUDP() {
	conns, err := ListenUDP("echo", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer conns[0].Close()
	ctx, cancel := DrainContext(context.Background())
	defer cancel()
	if err := Ready(); err != nil {
		fmt.Println(err)
		return
	}
	go func() {
		<-ctx.Done()
		_ = Status("finishing") // whoever reads it has gone as well if this fails
	}()
	fmt.Println("serving", len(conns), "socket")
	// Output: serving 1 socket
}
