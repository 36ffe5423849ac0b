// Server is an echo server with bad habits, for the stories of what servers do. It answers as examples/echo does, with the process id that
// its keeper started it with, and takes its sockets as sd_listen_fds(3) says.
//
//	server HABIT…        with several habits it has all of them
//	server ask ADDRESS   is a client: it sends one datagram, and fails if there is no answer within a second
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm"
)

// habits are what the server can do, by name.
var habits = map[string]string{
	"forks":    "lets three workers answer, and does nothing else",
	"closes":   "closes every descriptor that it was not given, and its second listener",
	"few":      "closes all of its sockets but the first",
	"shuts":    "shuts its first socket down",
	"connects": "connects its first socket, or tries to",
	"leaver":   "disconnects its first socket, which takes that out of the group",
	"dups":     "duplicates its sockets, and closes the originals",
	"filters":  "attaches a filter that lets nothing pass to its first socket",
	"steals":   "tries whatever would make its first socket get all packets",
	"daemon":   "goes on in another process, and ends",
	"execs":    "executes itself again at SIGHUP",
	"deaf":     "ignores SIGTERM",
	"loud":     "sends megabytes to the notify socket, all the time",
	"forger":   "has a process that nobody knows send messages that are not its to send",
	"nobody":   "changes its user",
	"hungry":   "takes memory at SIGUSR1, until it is killed",
	"ignorant": "says that it is ready and reads nothing",
	"dies":     "says that it is ready and dies",
	"leaves":   "says that it is ready and ends well",
	"stops":    "stops itself before it is ready",
	"mute":     "never says that it is ready",
	"cookies":  "tells its first socket's cookie after its name (no bad habit: servers whose flows have one do)",
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 2 && args[0] == "ask" {
		return ask(args[1])
	}
	for _, arg := range args {
		name, _, _ := strings.Cut(arg, "=")
		if _, known := habits[name]; !known && name != "answer" && name != "forge" { // those are for its own processes
			return fmt.Errorf("no habit %q", arg)
		}
	}
	has := func(habit string) bool { return slices.Contains(args, habit) }
	if has("forge") {
		return forge()
	}
	sockets, err := inherited()
	if err != nil {
		return err
	}
	name := strconv.Itoa(os.Getpid())
	if given, ok := strings.CutPrefix(args[0], "answer="); ok { // one of a server's other processes
		if given == "" {
			given = name
		}
		return serve(sockets, given)
	}
	if has("deaf") {
		signal.Ignore(unix.SIGTERM)
	}
	if has("hungry") {
		go eat()
	}
	if has("execs") {
		c := make(chan os.Signal, 1)
		signal.Notify(c, unix.SIGHUP)
		go func() {
			<-c
			panic(unix.Exec("/proc/self/exe", os.Args, os.Environ()))
		}()
	}
	if has("nobody") {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
			return err
		}
	}
	if has("closes") {
		if err := unix.CloseRange(uint(3+len(sockets)), ^uint(0), 0); err != nil {
			return err
		}
		for _, s := range sockets[1:] {
			if err := s.Close(); err != nil {
				return err
			}
		}
		sockets = sockets[:1]
	}
	if has("few") {
		for _, s := range sockets[1:] {
			if err := s.Close(); err != nil {
				return err
			}
		}
		sockets = sockets[:1]
	}
	if has("dups") {
		for i, s := range sockets {
			fd, err := unix.FcntlInt(s.Fd(), unix.F_DUPFD_CLOEXEC, 100)
			if err != nil {
				return err
			}
			if err := s.Close(); err != nil {
				return err
			}
			sockets[i] = os.NewFile(uintptr(fd), "socket")
		}
	}
	if has("cookies") {
		cookie, err := grm.Cookie(sockets[0])
		if err != nil {
			return err
		}
		name = fmt.Sprintf("%s:%d", name, cookie)
	}
	for habit, do := range misuses {
		if has(habit) {
			fmt.Fprintf(os.Stderr, "server: %s: %v\n", habit, do(int(sockets[0].Fd())))
		}
	}
	if has("forger") {
		// A child of a child, in a session of its own: nobody's child when it begins.
		middle := exec.Command("/bin/sh", "-c", `/proc/$PPID/exe forge & :`)
		middle.Stderr = os.Stderr
		middle.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := middle.Run(); err != nil {
			return err
		}
	}
	if has("loud") {
		go shout()
	}
	switch {
	case has("stops"):
		if err := unix.Kill(os.Getpid(), unix.SIGSTOP); err != nil {
			return err
		}
	case has("mute"):
		return serve(sockets, name)
	case has("daemon"):
		_, err := start(sockets, "") // that one answers in its own name
		return errors.Join(err, notify("READY=1"))
	}
	if has("forks") {
		for range 3 {
			if _, err := start(sockets, name); err != nil {
				return err
			}
		}
		if err := notify("READY=1"); err != nil {
			return err
		}
		idle() // until SIGTERM, of which the workers are told nothing
	}
	if err := notify("READY=1"); err != nil {
		return err
	}
	switch {
	case has("dies"):
		return unix.Kill(os.Getpid(), unix.SIGKILL)
	case has("leaves"):
		return nil
	case has("ignorant"):
		idle()
	}
	return serve(sockets, name)
}

// misuses are what may be done to a socket, and what comes of it.
var misuses = map[string]func(fd int) error{
	"shuts":    func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) },
	"connects": func(fd int) error { return unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 9}) },
	"leaver": func(fd int) error {
		var unspecified [16]byte
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
		if errno != 0 {
			return errno
		}
		return nil
	},
	"filters": func(fd int) error {
		return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, program())
	},
	"steals": func(fd int) error {
		return errors.Join(
			unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, program()),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, 0),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 0),
			unix.BindToDevice(fd, "lo"),
		)
	},
}

// program is a classic one that returns 0: all to the first socket, or nothing.
func program() *unix.SockFprog {
	return &unix.SockFprog{Len: 1, Filter: &unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}}
}

// inherited are the sockets from the environment.
func inherited() ([]*os.File, error) {
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 1 {
		return nil, fmt.Errorf("LISTEN_FDS=%s: no sockets", os.Getenv("LISTEN_FDS"))
	}
	var files []*os.File
	for fd := 3; fd < 3+n; fd++ {
		files = append(files, os.NewFile(uintptr(fd), "socket"))
	}
	return files, nil
}

// start starts another process that answers in this one's name.
func start(sockets []*os.File, name string) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe", "answer="+name)
	cmd.ExtraFiles, cmd.Stderr = sockets, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd, cmd.Start()
}

// serve answers until it fails. It leaves the descriptors as they are, so that an exec hands them on.
func serve(sockets []*os.File, name string) error {
	ended := make(chan error)
	for _, s := range sockets {
		c, err := net.FilePacketConn(s)
		if err != nil {
			return err
		}
		go func() { ended <- answer(c.(*net.UDPConn), name) }()
	}
	return <-ended
}

func answer(c *net.UDPConn, name string) error {
	buf := make([]byte, 1<<16)
	head := copy(buf, name+" ")
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf[head:])
		if err != nil {
			return err
		}
		_, _ = c.WriteToUDPAddrPort(buf[:head+n], from) // a client that is not there any more
	}
}

// ask sends one datagram and waits for the answer.
func ask(address string) error {
	c, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("0 0 0")); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1<<16))
	return err
}

// notify sends one message to the service manager.
func notify(text string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, []byte(text), 0, &unix.SockaddrUnix{Name: path})
}

// shout sends status lines of every length, and other things in between, as fast as they are taken.
func shout() {
	filler := strings.Repeat("loud ", 1<<12)
	for i := 0; ; i++ {
		text := fmt.Sprintf("STATUS=%d %s", i, filler[:i%len(filler)])
		if i%16 == 15 {
			text = filler // no message at all
		}
		if err := notify(text); err != nil && !errors.Is(err, unix.EMSGSIZE) {
			fmt.Fprintln(os.Stderr, "server: shout:", err)
			return
		}
	}
}

// forge sends what only grm or systemd may say, once its parent has ended, and then waits to be killed.
func forge() error {
	for os.Getppid() != 1 && !adopted() {
		time.Sleep(time.Millisecond)
	}
	for _, text := range []string{
		"MAINPID=1", "MAINPID=" + strconv.Itoa(os.Getpid()), "FDSTOREREMOVE=1\nFDNAME=grm.ctl", "FDSTOREREMOVE=1\nFDNAME=grm.echo.1.0", "FDSTORE=1\nFDNAME=grm.ctl",
		"BARRIER=1", "MAINPIDFDID=1\nMAINPIDFD=1", "X_UNKNOWN=1", "\x00\xff\n=\n\n", "READY=1\nMAINPID=1\nSTATUS=\x1b[31mforged\nERRNO=5",
	} {
		if err := notify(text); err != nil {
			return err
		}
	}
	idle()
	return nil
}

// idle does nothing until the process is ended.
func idle() {
	for {
		time.Sleep(time.Hour)
	}
}

// adopted says whether the shell that started this process has ended: the keeper is the parent now.
func adopted() bool {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", os.Getppid()))
	return err == nil && strings.TrimSpace(string(comm)) == "grm-keeper"
}

// eat takes and uses 16 MiB at a time.
func eat() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGUSR1)
	<-c
	var eaten [][]byte
	for {
		more := make([]byte, 16<<20)
		for i := 0; i < len(more); i += 4096 {
			more[i] = 1
		}
		eaten = append(eaten, more)
		if len(eaten) > 1024 {
			return // 16 GiB, and nobody minds
		}
	}
}
