package decoy

import (
	"net"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// descriptor is a socket's, which stays the connection's.
func descriptor(t *testing.T, c syscall.Conn) (fd int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(n uintptr) { fd = int(n) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// Each oddity is seen, in sockets that have it, and in no others.
func TestOddities(t *testing.T) {
	accept := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff}
	for name, c := range map[string]struct {
		network string
		do      func(fd int) error
		text    string
	}{
		"nothing": {"udp", func(int) error { return nil }, ""},
		"option":  {"udp", func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PRIORITY, 1) }, ""},
		"shutdown": {"udp", func(fd int) error {
			if err := unix.Shutdown(fd, unix.SHUT_RD); err != unix.ENOTCONN { // it works all the same
				return err
			}
			return nil
		}, "was shut down by its server"},
		"filter": {"udp", func(fd int) error {
			return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &accept})
		}, "has a filter of its server's, which decides what it gets"},
		"connect": {"udp", func(fd int) error {
			return unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 9})
		}, "is connected, and gets nothing from others"},
		"listener":      {"tcp", func(int) error { return nil }, ""},
		"deaf listener": {"tcp", func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RD) }, "does not listen any more"},
	} {
		var s syscall.Conn
		if c.network == "tcp" {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			s = l.(syscall.Conn)
		} else {
			p, err := net.ListenPacket("udp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			s = p.(syscall.Conn)
		}
		fd := descriptor(t, s)
		if err := c.do(fd); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, oddity := range oddities {
			if got := oddity.is(fd); got != (oddity.text == c.text) {
				t.Errorf("%s: %q is %v", name, oddity.text, got)
			}
		}
	}
}

// What waits is told apart, and left where it is.
func TestPeek(t *testing.T) {
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	fd := descriptor(t, server.(syscall.Conn))
	if got := peek(fd); got != "" {
		t.Errorf("an empty queue has %q", got)
	}
	client, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, text := range []string{"", "one", "two"} {
		if _, err := client.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[string]bool{}
	for range 3 {
		first, again := peek(fd), peek(fd)
		if first == "" || first != again || seen[first] {
			t.Errorf("%q, then %q, after %v", first, again, seen)
		}
		seen[first] = true
		if _, _, err := server.ReadFrom(make([]byte, 8)); err != nil {
			t.Fatal(err)
		}
	}
	if got := peek(fd); got != "" {
		t.Errorf("an empty queue has %q", got)
	}
}
