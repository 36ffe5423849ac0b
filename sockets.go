package grm

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// inherited holds the descriptors that this process was given and that no
// caller has taken yet.
var inherited struct {
	sync.Mutex
	read  bool
	files []*os.File
}

// readInherited takes the descriptors from the environment, once. LISTEN_* is
// removed, so that a child does not take them for its own.
func readInherited() {
	if inherited.read {
		return
	}
	inherited.read = true
	inherited.files = activation.Files(true)
	_ = os.Unsetenv("LISTEN_PIDFDID") // systemd 258 and later; fails for impossible names only
}

// Names lists the names of the descriptors that nobody has taken yet, in the
// order in which they came: as in the TOML file, then by index.
func Names() []string {
	inherited.Lock()
	defer inherited.Unlock()
	readInherited()
	var names []string
	for _, f := range inherited.files {
		names = append(names, f.Name())
	}
	return names
}

// Files takes the descriptors of a name, of whatever kind; with "" all that
// nobody has taken. They are the caller's from now on: a second call finds
// them no more.
func Files(name string) []*os.File {
	return takeFiles(name, func(*os.File) bool { return true })
}

// UDP takes the UDP sockets of a listener; with "" all UDP sockets. There are
// none in a process that was started without any.
func UDP(name string) ([]*net.UDPConn, error) {
	return convert(takeFiles(name, isSocket(unix.IPPROTO_UDP)), func(f *os.File) (*net.UDPConn, error) {
		c, err := net.FilePacketConn(f)
		if err != nil {
			return nil, err
		}
		return c.(*net.UDPConn), nil
	})
}

// TCP takes the listening TCP sockets of a listener; with "" all of them.
func TCP(name string) ([]*net.TCPListener, error) {
	return convert(takeFiles(name, isSocket(unix.IPPROTO_TCP, unix.IPPROTO_MPTCP)), func(f *os.File) (*net.TCPListener, error) {
		l, err := net.FileListener(f)
		if err != nil {
			return nil, err
		}
		return l.(*net.TCPListener), nil
	})
}

// ListenUDP is UDP, and in a process that got no such socket it binds one to
// address: the same server runs under grm, by a .socket unit and by hand. Got
// sockets but none of that name is an error.
func ListenUDP(name, address string) ([]*net.UDPConn, error) {
	conns, err := UDP(name)
	if err != nil || len(conns) > 0 {
		return conns, err
	}
	if err := nothingElse(name, "UDP"); err != nil {
		return nil, err
	}
	local, err := net.ResolveUDPAddr("udp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	c, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, err
	}
	return []*net.UDPConn{c}, nil
}

// ListenTCP is to TCP what ListenUDP is to UDP.
func ListenTCP(name, address string) ([]*net.TCPListener, error) {
	listeners, err := TCP(name)
	if err != nil || len(listeners) > 0 {
		return listeners, err
	}
	if err := nothingElse(name, "TCP"); err != nil {
		return nil, err
	}
	local, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	l, err := net.ListenTCP("tcp", local)
	if err != nil {
		return nil, err
	}
	return []*net.TCPListener{l}, nil
}

// nothingElse refuses to bind beside sockets under other names, which would go
// unread: most likely the name is misspelt.
func nothingElse(name, kind string) error {
	names := Names()
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("no %s socket is named %q: this process was given %s (take the listener's name from the service's file)",
		kind, name, strings.Join(slices.Compact(names), ", "))
}

func takeFiles(name string, wanted func(*os.File) bool) []*os.File {
	inherited.Lock()
	defer inherited.Unlock()
	readInherited()
	var taken, rest []*os.File
	for _, f := range inherited.files {
		if (name == "" || name == f.Name()) && wanted(f) {
			taken = append(taken, f)
		} else {
			rest = append(rest, f)
		}
	}
	inherited.files = rest
	return taken
}

func isSocket(protocols ...int) func(*os.File) bool {
	return func(f *os.File) bool {
		p, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_PROTOCOL)
		return err == nil && slices.Contains(protocols, p)
	}
}

// convert makes a T of each file and closes the file, so that the T is the
// only one that keeps the socket open. On failure it closes all it was given.
func convert[T interface{ Close() error }](files []*os.File, make func(*os.File) (T, error)) ([]T, error) {
	var made []T
	var failed error
	for _, f := range files {
		if failed == nil {
			t, err := make(f)
			if err != nil {
				failed = fmt.Errorf("socket %s: %w", f.Name(), err)
			} else {
				made = append(made, t)
			}
		}
		_ = f.Close() // a socket that was not written through f has nothing to lose
	}
	if failed == nil {
		return made, nil
	}
	for _, t := range made {
		_ = t.Close() // the failure that is returned says more
	}
	return nil, failed
}
