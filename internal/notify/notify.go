// Package notify speaks systemd's notification protocol, sd_notify(3), from
// both ends: a Conn sends to a service manager, a Listener is one. It carries
// file descriptors both ways and knows the barrier. It does without package
// net, so that a small process stays small.
package notify

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Env names the environment variable that holds the socket's address.
	Env = "NOTIFY_SOCKET"

	maxFDs  = 253     // SCM_MAX_FD: what the kernel lets one message carry
	maxName = 255     // systemd's FDNAME_MAX
	maxText = 4096    // systemd's NOTIFY_BUFFER_MAX: it ignores longer messages
	sendBuf = 8 << 20 // as sd_notify(3): a message must not fail for want of room
)

// Conn sends notifications to the service manager. A nil Conn, which stands
// for no service manager, does nothing and reports no error.
type Conn struct {
	fd int
	to unix.SockaddrUnix
}

// Open connects to the service manager that NOTIFY_SOCKET names. Without one
// it returns nil and no error.
func Open() (*Conn, error) {
	address := os.Getenv(Env)
	if address == "" {
		return nil, nil
	}
	return Dial(address)
}

// Dial is Open for an address of the caller's: a path, or @ and an abstract name.
func Dial(address string) (*Conn, error) {
	if err := checkAddress(address); err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("notify socket: %w", err)
	}
	// More than wmem_max is for root; the default does for all but hundreds of descriptors.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuf) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuf) // as above
	}
	return &Conn{fd: fd, to: unix.SockaddrUnix{Name: address}}, nil
}

func checkAddress(address string) error {
	switch {
	case len(address) < 2 || (address[0] != '/' && address[0] != '@'):
		return fmt.Errorf("%s %q: neither an absolute path nor an abstract name (start it from a unit with Type=notify)", Env, address)
	case len(address) > 107:
		return fmt.Errorf("%s %q: longer than the 107 bytes that a socket's address has", Env, address)
	}
	return nil
}

// Close closes the connection.
func (c *Conn) Close() error {
	if c == nil {
		return nil
	}
	return unix.Close(c.fd)
}

// Send sends one message, lines of KEY=VALUE, with descriptors that stay the
// caller's.
func (c *Conn) Send(state string, fds ...int) error {
	if c == nil {
		return nil
	}
	if len(fds) > maxFDs {
		return fmt.Errorf("notify %s: %d descriptors in one message, which carries %d", c.to.Name, len(fds), maxFDs)
	}
	if len(state) > maxText {
		return fmt.Errorf("notify %s: message of %d bytes, of which %d are read", c.to.Name, len(state), maxText)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	for {
		err := unix.Sendmsg(c.fd, []byte(state), rights, &c.to, unix.MSG_NOSIGNAL)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("notify %s: %w", c.to.Name, err)
		}
	}
}

// Store puts descriptors into the manager's fd store under name, from where
// they go only when Forget is told to: systemd would otherwise drop BPF maps
// at once, and sockets at their first error (FDPOLL=0). The descriptors stay
// the caller's; end with a Barrier before exiting.
func (c *Conn) Store(name string, fds ...int) error {
	if err := CheckName(name); err != nil {
		return err
	}
	for len(fds) > 0 {
		n := min(len(fds), maxFDs)
		if err := c.Send("FDSTORE=1\nFDNAME="+name+"\nFDPOLL=0", fds[:n]...); err != nil {
			return fmt.Errorf("store descriptors %s: %w", name, err)
		}
		fds = fds[n:]
	}
	return nil
}

// Forget removes every descriptor of that name from the fd store.
func (c *Conn) Forget(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if err := c.Send("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
		return fmt.Errorf("remove stored descriptors %s: %w", name, err)
	}
	return nil
}

// Barrier returns once the manager has worked off all messages sent so far.
func (c *Conn) Barrier(timeout time.Duration) error {
	if c == nil {
		return nil
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("notify barrier: %w", err)
	}
	defer unix.Close(p[0])
	err := c.Send("BARRIER=1", p[1])
	_ = unix.Close(p[1]) // never written to: nothing can be lost
	if err != nil {
		return err
	}
	deadline := time.Now().Add(timeout)
	for {
		left := max(0, time.Until(deadline))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p[0])}}, int(left.Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("notify barrier: %w", err)
		case err == nil && left == 0:
			return fmt.Errorf("notify %s: no answer to a barrier within %v (is the service manager busy, or NotifyAccess= too narrow?): %w",
				c.to.Name, timeout, os.ErrDeadlineExceeded)
		}
	}
}

// CheckName says whether systemd takes name for a stored descriptor. It stores
// one with an invalid name as "stored", without a word.
func CheckName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("descriptor name %q: %d bytes (1 to %d are allowed)", name, len(name), maxName)
	}
	for i := range len(name) {
		if c := name[i]; c < ' ' || c > '~' || c == ':' {
			return fmt.Errorf("descriptor name %q: byte %d is %#x (printable ASCII without a colon is allowed)", name, i, c)
		}
	}
	return nil
}

// Field is one line of a message.
type Field struct{ Key, Value string }

// Parse splits a message. It refuses what systemd ignores as a whole, and
// skips what systemd skips: lines that assign nothing.
func Parse(datagram []byte) ([]Field, error) {
	if len(datagram) > maxText {
		return nil, fmt.Errorf("notification of %d bytes (%d are allowed)", len(datagram), maxText)
	}
	text := strings.TrimSuffix(string(datagram), "\x00")
	if strings.ContainsRune(text, 0) {
		return nil, errors.New("notification with a NUL byte in it")
	}
	var fields []Field
	for line := range strings.SplitSeq(text, "\n") {
		if key, value, found := strings.Cut(line, "="); found && key != "" {
			fields = append(fields, Field{key, value})
		}
	}
	return fields, nil
}

// Format makes a message of fields: what Parse takes apart. No key or value
// may contain a newline.
func Format(fields ...Field) string {
	var b strings.Builder
	for i, f := range fields {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(f.Key)
		b.WriteByte('=')
		b.WriteString(f.Value)
	}
	return b.String()
}
