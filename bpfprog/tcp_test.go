package bpfprog

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
)

func (r *rig) listen() *net.TCPListener {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); e != nil {
			return e
		}
		return err
	}}
	lc.SetMultipathTCP(false) // its sockets cannot be in a REUSEPORT_SOCKARRAY
	return must(lc.Listen(context.Background(), "tcp", r.Spec.Address.String()))(r.t).(*net.TCPListener)
}

func (r *rig) tcpGeneration(bank int, generation uint64) *net.TCPListener {
	r.ctl.Assign(bank, generation, control.Prepared)
	check(r.t, r.SetBank(0, bank, generation, 1))
	l := r.listen()
	r.t.Cleanup(func() { _ = l.Close() }) // some tests close it before
	check(r.t, r.Put(0, bank, 0, fd(r.t, l)))
	check(r.t, r.Attach(fd(r.t, l)))
	return l
}

func greet(l *net.TCPListener, text string) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte(text)) // a client that is gone is no matter
			_ = c.Close()
		}
	}()
}

// Connections that the old listener has not accepted go to the working bank when it closes.
func TestTCPConnectionsMigrate(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5003", "[::1]:5003"} {
		t.Run(address, func(t *testing.T) {
			r := newRig(t, GroupSpec{Network: "tcp", Address: addr(address), Dissector: Dissector{Kind: Noop}})
			old := r.tcpGeneration(0, 1) // accepts nothing
			r.ctl.Flip(0)
			var clients []net.Conn
			connect := func() {
				c := must(net.DialTimeout("tcp", address, patience))(t)
				t.Cleanup(func() { _ = c.Close() })
				clients = append(clients, c)
			}
			for range 50 {
				connect()
			}
			greet(r.tcpGeneration(1, 2), "two")
			r.ctl.Flip(1)
			for range 50 {
				connect()
			}
			check(t, old.Close())
			for _, c := range clients {
				check(t, c.SetDeadline(time.Now().Add(patience)))
				want(t, "connection", string(must(io.ReadAll(c))(t)), "two")
			}
			want(t, "packets of the first", r.ctl.Stats(0).Packets, 50)
			want(t, "packets of the second: its own, and the migrated", r.ctl.Stats(1).Packets, 100)
		})
	}
}

func TestTCPSocketMustListen(t *testing.T) {
	r := newRig(t, GroupSpec{Network: "tcp", Address: addr("127.0.0.1:5003"), Dissector: Dissector{Kind: Noop}})
	check(t, r.SetBank(0, 0, 1, 1))
	s := must(unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))(t)
	defer unix.Close(s)
	check(t, unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	check(t, unix.Bind(s, &unix.SockaddrInet4{Port: 5003, Addr: [4]byte{127, 0, 0, 1}}))
	wantErrno(t, "put a socket that does not listen", r.Put(0, 0, 0, s), unix.EINVAL)
}
