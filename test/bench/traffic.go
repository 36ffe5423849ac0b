package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A client is a number. Its address is made of it, in the loopback range: 2^22
// addresses, then the next port.
const (
	clientNet  = 127<<24 | 1<<22
	clientPort = 40000
	sinkPorts  = 16 // clients that answers can be sent to
)

func (c client) address() (ip uint32, port uint16) {
	return clientNet + uint32(c)&(1<<22-1), clientPort + uint16(c>>22)
}

type client uint32

const (
	batch       = 64 // datagrams of one system call
	payloadSize = 64
	packetSize  = 28 + payloadSize
)

// mmsghdr is struct mmsghdr; x/sys has none.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// messages are arrays for recvmmsg and sendmmsg, which stay where they are.
type messages struct {
	header [batch]mmsghdr
	vector [batch]unix.Iovec
	name   [batch]unix.RawSockaddrInet4
	data   [batch][packetSize]byte
}

func newMessages() *messages {
	m := new(messages)
	for i := range batch {
		m.vector[i].Base = &m.data[i][0]
		m.header[i].hdr.Iov, m.header[i].hdr.Iovlen = &m.vector[i], 1
		m.header[i].hdr.Name = (*byte)(unsafe.Pointer(&m.name[i]))
	}
	return m
}

// send sends the first n messages, and fails if one of them cannot be sent.
func (m *messages) send(fd, n int) error {
	for done := 0; done < n; {
		sent, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.header[done])), uintptr(n-done), 0, 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return fmt.Errorf("sendmmsg: %w", errno)
		default:
			done += int(sent)
		}
	}
	return nil
}

// receive takes up to a batch of messages; 0 if there is none.
func (m *messages) receive(fd, flags int) (int, error) {
	for i := range batch {
		m.vector[i].SetLen(payloadSize)
		m.header[i].hdr.Namelen = unix.SizeofSockaddrInet4
	}
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&m.header[0])), batch, uintptr(flags), 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			return 0, nil
		case errno != 0:
			return 0, fmt.Errorf("recvmmsg: %w", errno)
		default:
			return int(n), nil
		}
	}
}

// traffic plays all clients: it sends from any of their addresses through a
// raw socket, and swallows what is sent to them.
type traffic struct {
	raw   int
	sinks []int
	out   *messages
	in    *messages
	fresh client // the next client that has never been used
	rand  *rand.Rand
}

func newTraffic() (*traffic, error) {
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("raw socket: %w", err)
	}
	t := &traffic{raw: raw, out: newMessages(), in: newMessages(), rand: rand.New(rand.NewPCG(1, 2))}
	for i := range sinkPorts {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		// A full queue is the cheapest way to be rid of answers.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			return nil, fmt.Errorf("sink's SO_RCVBUF: %w", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Port: clientPort + i}); err != nil {
			return nil, fmt.Errorf("bind sink: %w", err)
		}
		t.sinks = append(t.sinks, fd)
	}
	for i := range batch {
		p := t.out.data[i][:]
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(p[2:], packetSize)
		copy(p[16:], []byte{127, 0, 0, 1})
		binary.BigEndian.PutUint16(p[24:], 8+payloadSize)
		fill(p[28:])
		t.out.vector[i].SetLen(packetSize)
		t.out.name[i] = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: [4]byte{127, 0, 0, 1}}
		t.out.header[i].hdr.Namelen = unix.SizeofSockaddrInet4
	}
	return t, nil
}

// fill makes a payload that the cBPF programs accept (see cbpf.go), but for
// the cookie in its first two bytes.
func fill(payload []byte) {
	copy(payload, []byte{0xff, 0xff, 0x40, 0, 1, 2, 3, 0, 0, 0, 1, 0, 2})
}

// newClients are n clients that have not been used before.
func (t *traffic) newClients(n int) []client {
	cs := make([]client, n)
	for i := range cs {
		if t.fresh>>22 == sinkPorts {
			t.fresh = 0 // 64 million later no table knows it any more
		}
		cs[i] = t.fresh
		t.fresh++
	}
	return cs
}

// some are n of the clients at random, with repetitions.
func (t *traffic) some(from []client, n int) []client {
	cs := make([]client, n)
	for i := range cs {
		cs[i] = from[t.rand.IntN(len(from))]
	}
	return cs
}

// send sends one datagram of each client to the port, with the cookies in turn
// if there are any. There are at most a batch of clients.
func (t *traffic) send(port int, clients []client, cookies []uint16) error {
	for i, c := range clients {
		p := t.out.data[i][:]
		ip, source := c.address()
		binary.BigEndian.PutUint32(p[12:], ip)
		binary.BigEndian.PutUint16(p[20:], source)
		binary.BigEndian.PutUint16(p[22:], uint16(port))
		cookie := uint16(0xffff)
		if len(cookies) > 0 {
			cookie = cookies[t.rand.IntN(len(cookies))]
		}
		binary.BigEndian.PutUint16(p[28:], cookie)
	}
	return t.out.send(t.raw, len(clients))
}

// receive empties the sockets; it answers what it receives, if it is to, and
// returns how many datagrams there were.
func (t *traffic) receive(sockets []int, answer bool) (int, error) {
	total := 0
	for _, fd := range sockets {
		for {
			n, err := t.in.receive(fd, unix.MSG_DONTWAIT)
			if err != nil {
				return total, err
			}
			if n == 0 {
				break
			}
			total += n
			if answer {
				if err := t.in.send(fd, n); err != nil {
					return total, fmt.Errorf("answer: %w", err)
				}
			}
		}
	}
	return total, nil
}

// exchange lets every client send one datagram and the sockets take it, and
// answer if they are to. It fails if one does not arrive.
func (t *traffic) exchange(port int, clients []client, cookies []uint16, sockets []int, answer bool) error {
	for rest := clients; len(rest) > 0; rest = rest[min(batch, len(rest)):] {
		sent := min(batch, len(rest))
		if err := t.send(port, rest[:sent], cookies); err != nil {
			return err
		}
		// They are there by now, unless the kernel had to leave some to its
		// own thread.
		for got, deadline := 0, time.Now().Add(5*time.Second); got < sent; {
			n, err := t.receive(sockets, answer)
			if err != nil {
				return err
			}
			if got += n; got < sent && time.Now().After(deadline) {
				return fmt.Errorf("port %d: %d of %d datagrams arrived", port, got, sent)
			}
		}
	}
	return nil
}

// establish makes flows of the target that are known for certain: each client
// sends, is answered, and sends again. It fails if the target knows fewer.
func (t *traffic) establish(at *target, clients []client) error {
	before := 0
	var err error
	if at.assured != nil {
		if before, err = at.assured(); err != nil {
			return err
		}
	}
	for rest := clients; len(rest) > 0; rest = rest[min(batch, len(rest)):] {
		for range 3 {
			if err := t.exchange(at.port, rest[:min(batch, len(rest))], nil, at.sockets, true); err != nil {
				return fmt.Errorf("establish flows: %w", err)
			}
		}
	}
	if at.assured == nil {
		return nil
	}
	after, err := at.assured()
	if err == nil && after-before != len(clients) {
		err = fmt.Errorf("establish flows: %d of %d are assured", after-before, len(clients))
	}
	return err
}

func (t *traffic) close() error {
	err := unix.Close(t.raw)
	for _, fd := range t.sinks {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// key is the client as the programs see it: address and port in the order of
// the network, in the first six bytes.
func (c client) key() uint64 {
	ip, port := c.address()
	var b [8]byte
	binary.BigEndian.PutUint32(b[:], ip)
	binary.BigEndian.PutUint16(b[4:], port)
	return binary.NativeEndian.Uint64(b[:])
}
