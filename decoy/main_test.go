package decoy

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/internal/notify"
)

// The test binary plays all parts: as "decoy OPTIONS" it is grm-decoy with
// those options, as "server STEP..." the server, as "run STEP..." what a server
// starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "decoy":
			var o Options
			if err := json.Unmarshal([]byte(os.Args[2]), &o); err != nil {
				panic(err)
			}
			status, err := Run(o)
			if err != nil {
				fmt.Fprintln(os.Stderr, "grm-decoy:", err)
			}
			os.Exit(status)
		case "server":
			serve(os.Args[2:])
		case "run":
			steps(os.Args[2:])
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// reportVar names the socket on which servers tell the test what they do.
const reportVar = "TEST_REPORT"

// report tells the test one line.
func report(format string, args ...any) {
	c, err := net.Dial("unixgram", os.Getenv(reportVar))
	if err != nil {
		os.Exit(99)
	}
	defer c.Close()
	fmt.Fprintf(c, "%d "+format, append([]any{os.Getpid()}, args...)...)
}

// serve is a server that reports its signals, answers each datagram with its
// generation, and does the steps.
func serve(todo []string) {
	var pass []os.Signal
	for s := syscall.Signal(1); s < 65; s++ {
		if s != syscall.SIGURG && s != syscall.SIGCHLD && s != syscall.SIGPROF && (s < 32 || s > 34) {
			pass = append(pass, s)
		}
	}
	fatal := slices.Contains(todo, "default-signals")
	signals := make(chan os.Signal, 100)
	if !fatal {
		signal.Notify(signals, pass...)
	}
	go func() {
		for s := range signals {
			report("signal %d", int(s.(syscall.Signal)))
			switch {
			case slices.Contains(todo, "ignore-term"):
			case s == syscall.SIGTERM && slices.Contains(todo, "urg-on-term"):
				_ = syscall.Kill(os.Getppid(), syscall.SIGURG)
			case s == syscall.SIGTERM, s == syscall.SIGQUIT:
				signal.Reset(syscall.SIGTERM)
				_ = syscall.Kill(os.Getpid(), syscall.SIGTERM)
			}
		}
	}()
	n, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	report("start %s", strings.Join(os.Environ(), "\x01"))
	for i := range n {
		f := os.NewFile(uintptr(3+i), "")
		c, err := net.FilePacketConn(f)
		if err != nil {
			continue
		}
		if slices.Contains(todo, "deaf") {
			continue
		}
		if slices.Contains(todo, "shut") {
			_ = c.Close()
			_ = f.Close()
			continue
		}
		go func() {
			buf := make([]byte, 2000)
			for {
				_, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteTo([]byte(os.Getenv(envGeneration)), from)
			}
		}()
	}
	steps(todo)
	select {}
}

func say2systemd(text string, fds ...int) {
	c, err := notify.Open()
	if err != nil || c == nil {
		report("no notify socket: %v", err)
		return
	}
	if err := c.Send(text, fds...); err != nil {
		report("send: %v", err)
	}
}

// steps does what is told.
func steps(todo []string) {
	for _, step := range todo {
		what, arg, _ := strings.Cut(step, "=")
		switch what {
		case "say":
			say2systemd(strings.ReplaceAll(arg, "|", "\n"))
		case "barrier":
			c, _ := notify.Open()
			report("barrier %v", c.Barrier(10*time.Second))
		case "store":
			f, _ := os.Open("/dev/null")
			say2systemd("FDSTORE=1\nFDNAME="+arg, int(f.Fd()))
		case "flood":
			n, _ := strconv.Atoi(arg)
			c, _ := notify.Open()
			for i := range n {
				_ = c.Send("STATUS=" + strings.Repeat("x", 3000) + strconv.Itoa(i))
			}
		case "report":
			report("%s", arg)
		case "who": // says whether this process takes one outside of its pid namespace for its own
			report("outside: %v", descends(0, os.Getpid()))
		case "exit":
			n, _ := strconv.Atoi(arg)
			os.Exit(n)
		case "kill":
			n, _ := strconv.Atoi(arg)
			signal.Reset(syscall.Signal(n))
			_ = syscall.Kill(os.Getpid(), syscall.Signal(n))
			time.Sleep(time.Hour)
		case "urg":
			_ = syscall.Kill(os.Getppid(), syscall.SIGURG)
		case "wait": // for a file to appear
			waitFor(arg)
		case "peer": // is a client that this server has a socket for, until a file appears
			sa, _ := unix.Getsockname(3)
			fd, _ := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			if err := errors.Join(unix.Bind(fd, sa), unix.Connect(fd, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{127, 0, 0, 1}})); err != nil {
				report("peer: %v", err)
			}
			go func() {
				waitFor(arg)
				_ = unix.Close(fd)
			}()
		case "child": // a process that does these steps, in this session
			start(strings.Split(arg, ";"), false)
		case "daemon":
			start(strings.Split(arg, ";"), true)
		case "forever":
			for {
				time.Sleep(time.Hour)
			}
		}
	}
}

func waitFor(file string) {
	for range 6000 {
		if _, err := os.Stat(file); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func start(args []string, session bool) {
	p, err := os.StartProcess("/proc/self/exe", append([]string{"worker", "run"}, args...),
		&os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{Setsid: session}})
	if err != nil {
		report("start: %v", err)
		return
	}
	_ = p.Release()
}
