// Established serves as many QUIC and DTLS servers do: the first datagram of a client comes by the shared socket, and from then on the client
// has a socket of its own, bound to the same address and connected to it. The kernel prefers a connected socket before it asks any group.
//
// Between its bind and its connect such a socket is one more of the address, which other clients' datagrams may reach. Not so in a group of
// grm's, whose program chooses among the sockets that grm made. Without grm, all clients stay on the shared socket.
//
// What grm cannot help: connect gives a socket of a wildcard address a local one, and while the kernel moves it in its hash table
// (udp_lib_rehash, seen on Linux 6.18) a look-up that has come to that socket misses all after it. Now and then a datagram is refused, and its
// sender told that the port is unreachable. A shared socket of one address is no way out: what is bound there after a connect makes a group
// with the connected socket, which has left that of the shared one (udp_reuseport_add_sock), and gets all other clients' datagrams.
//
// Each answer is the process id, a space and what was sent, as in examples/echo. A client that was silent for a while loses its socket.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"grm"
)

func main() {
	listen := flag.String("listen", "0.0.0.0:5203", "where to listen when started without sockets")
	idle := flag.Duration("idle", 30*time.Second, "close a client's socket when it was silent for so long")
	flag.Parse()
	if err := run(*listen, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "established:", err)
		os.Exit(1)
	}
}

func run(listen string, idle time.Duration) error {
	conns, err := grm.ListenUDP("", listen)
	if err != nil {
		return err
	}
	ctx, cancel := grm.StopContext(context.Background())
	defer cancel()
	ended := make(chan error)
	for _, c := range conns {
		_, err := grm.Identify(c)
		if err != nil && !errors.Is(err, grm.ErrNoGroup) {
			return err
		}
		s := &server{shared: c, grouped: err == nil, idle: idle, clients: map[netip.AddrPort]bool{}}
		go func() { ended <- s.accept() }()
	}
	if err := grm.Ready(); err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

type server struct {
	shared  *net.UDPConn
	grouped bool // shared is in a group of grm's
	idle    time.Duration

	mu      sync.Mutex
	clients map[netip.AddrPort]bool // those with a socket of their own
}

// accept reads the shared socket, and gives each client that is new a socket of its own.
func (s *server) accept() error {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := s.shared.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		// Also to a client that has a socket: this datagram came before that was connected.
		_, _ = s.shared.WriteToUDPAddrPort(answer(buf[:n]), from) // a client that is gone is no reason to stop serving the others
		if !s.grouped {
			continue
		}
		s.mu.Lock()
		known := s.clients[from]
		s.clients[from] = true
		s.mu.Unlock()
		if known {
			continue
		}
		c, err := s.dial(from)
		if err != nil {
			fmt.Fprintf(os.Stderr, "established: client %s stays on the shared socket: %v\n", from, err)
			continue
		}
		go s.serve(c, from)
	}
}

// dial makes a socket from the shared socket's address to the client's.
func (s *server) dial(to netip.AddrPort) (*net.UDPConn, error) {
	d := net.Dialer{
		LocalAddr: s.shared.LocalAddr(),
		Control: func(_, _ string, c syscall.RawConn) error {
			var failed error
			err := c.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			})
			return errors.Join(err, failed)
		},
	}
	c, err := d.Dial("udp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// serve answers one client until it has been silent for too long.
func (s *server) serve(c *net.UDPConn, client netip.AddrPort) {
	defer func() {
		s.mu.Lock()
		delete(s.clients, client)
		s.mu.Unlock()
		c.Close()
	}()
	buf := make([]byte, 1<<16)
	for {
		if err := c.SetReadDeadline(time.Now().Add(s.idle)); err != nil {
			return
		}
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		_, _ = c.Write(answer(buf[:n])) // the next read tells if the client is gone
	}
}

func answer(request []byte) []byte {
	return append(strconv.AppendInt(nil, int64(os.Getpid()), 10), append([]byte{' '}, request...)...)
}
