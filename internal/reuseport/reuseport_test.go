package reuseport

import (
	"context"
	"fmt"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func bind(t *testing.T, network, address string) net.PacketConn {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		_ = c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		return err
	}}
	c, err := lc.ListenPacket(context.Background(), network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // some are closed before
	return c
}

func leave(t *testing.T, c syscall.Conn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var left error
	if err := raw.Control(func(fd uintptr) { left = Leave(int(fd)) }); err != nil || left != nil {
		t.Fatal(err, left)
	}
}

// What came before can be read, and what comes afterwards goes to the others.
func TestLeave(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		first := bind(t, "udp", address)
		send := func(n int) {
			for range n { // each from another port
				c, err := net.Dial("udp", first.LocalAddr().String())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := fmt.Fprint(c, "x"); err != nil {
					t.Fatal(err)
				}
				if err := c.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
		read := func(c net.PacketConn) (n int) {
			for buf := make([]byte, 8); ; n++ {
				// Loopback has delivered what was sent.
				if err := c.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
					t.Fatal(err)
				}
				if _, _, err := c.ReadFrom(buf); err != nil {
					return n
				}
			}
		}
		send(50)
		second := bind(t, "udp", first.LocalAddr().String())
		third := bind(t, "udp", first.LocalAddr().String())
		leave(t, first.(syscall.Conn))
		leave(t, third.(syscall.Conn))
		send(100)
		if a, b, c := read(first), read(second), read(third); a != 50 || b != 100 || c != 0 {
			t.Errorf("%s: %d, %d and %d packets, not 50, 100 and 0", address, a, b, c)
		}
	}
}

func TestLeaveNot(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	leave(t, l.(syscall.Conn))
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Errorf("a TCP listener is left as it is: %v", err)
	} else if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := Leave(-1); err == nil {
		t.Error("left what is no socket")
	}
}
