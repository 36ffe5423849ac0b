package bpfprog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"grm/internal/testenv"
)

// wire puts packets onto the loopback interface as they are, whatever is wrong
// with them, so that the kernel takes them for received ones.
type wire struct {
	t      *testing.T
	fd     int
	marker [2]int // sender and receiver of a datagram that follows the others
}

// newWire opens a wire for the rest of the test, which has to stay on one CPU:
// a CPU takes what came first first.
func newWire(t *testing.T) *wire {
	t.Cleanup(testenv.OneCPU(t))
	for name, value := range map[string]string{"route_localnet": "1", "accept_local": "1", "rp_filter": "0"} {
		for _, device := range []string{"all", "lo"} {
			check(t, os.WriteFile("/proc/sys/net/ipv4/conf/"+device+"/"+name, []byte(value), 0))
		}
	}
	w := &wire{t: t}
	w.fd = must(unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(t)
	for i := range w.marker {
		w.marker[i] = must(unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(t)
	}
	t.Cleanup(func() { check(t, errors.Join(unix.Close(w.fd), unix.Close(w.marker[0]), unix.Close(w.marker[1]))) })
	check(t, unix.Bind(w.marker[1], &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	check(t, unix.Connect(w.marker[0], must(unix.Getsockname(w.marker[1]))(t)))
	check(t, unix.SetsockoptTimeval(w.marker[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())}))
	return w
}

// send puts one packet of that Ethernet type onto the wire.
func (w *wire) send(etherType uint16, packet []byte) {
	w.t.Helper()
	lo := must(net.InterfaceByName("lo"))(w.t)
	to := &unix.SockaddrLinklayer{Protocol: etherType<<8 | etherType>>8, Ifindex: lo.Index, Halen: 6}
	check(w.t, unix.Sendto(w.fd, packet, 0, to))
}

// deliver puts packets onto the wire and returns once the kernel is done with them.
func (w *wire) deliver(packets ...[]byte) {
	w.t.Helper()
	for _, p := range packets {
		etherType := uint16(unix.ETH_P_IP)
		if p[0]>>4 == 6 {
			etherType = unix.ETH_P_IPV6
		}
		w.send(etherType, p)
	}
	w.settle()
}

// settle waits until the kernel has dealt with all that was sent before.
func (w *wire) settle() {
	w.t.Helper()
	must(unix.Write(w.marker[0], []byte{1}))(w.t)
	must(unix.Read(w.marker[1], make([]byte, 1)))(w.t)
}

// checksum is the internet checksum.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, p := range parts {
		for ; len(p) > 1; p = p[2:] {
			sum += uint32(p[0])<<8 | uint32(p[1])
		}
		if len(p) == 1 {
			sum += uint32(p[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// udpChecksum sets the checksum of a UDP datagram between two addresses.
func udpChecksum(datagram, from, to []byte) {
	binary.BigEndian.PutUint16(datagram[6:], 0)
	rest := []byte{0, unix.IPPROTO_UDP, byte(len(datagram) >> 8), byte(len(datagram))}
	sum := checksum(from, to, rest, datagram)
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(datagram[6:], sum)
}

// udp is a datagram without the IP header.
func udp(from, to netip.AddrPort, payload []byte) []byte {
	var d []byte
	d = binary.BigEndian.AppendUint16(d, from.Port())
	d = binary.BigEndian.AppendUint16(d, to.Port())
	d = binary.BigEndian.AppendUint16(d, uint16(8+len(payload)))
	d = append(append(d, 0, 0), payload...)
	udpChecksum(d, from.Addr().AsSlice(), to.Addr().AsSlice())
	return d
}

// ip puts an IP header with that protocol, and options if it is IPv4, in front of a body.
func ip(from, to netip.Addr, protocol byte, body []byte, options ...byte) []byte {
	var p []byte
	if from.Is6() {
		p = append(p, 0x60, 0, 0, 0)
		p = binary.BigEndian.AppendUint16(p, uint16(len(body)))
		p = append(p, protocol, 64)
		p = append(append(p, from.AsSlice()...), to.AsSlice()...)
		return append(p, body...)
	}
	header := 20 + len(options)
	p = append(p, 0x40|byte(header/4), 0)
	p = binary.BigEndian.AppendUint16(p, uint16(header+len(body)))
	p = append(p, 0, 0, 0, 0, 64, protocol, 0, 0)
	p = append(append(append(p, from.AsSlice()...), to.AsSlice()...), options...)
	fixHeader(p)
	return append(p, body...)
}

// fixHeader sets the checksum of an IPv4 header.
func fixHeader(p []byte) {
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], checksum(p[:min(len(p), int(p[0]&15)*4)]))
}

// datagram is a whole packet.
func datagram(from, to netip.AddrPort, payload []byte) []byte {
	return ip(from.Addr(), to.Addr(), unix.IPPROTO_UDP, udp(from, to, payload))
}

// piece is a part of a packet's body, from and to in bytes; from must be a
// multiple of eight, and so must the length of all but the last one.
type piece struct{ from, to int }

// fragments are pieces of a packet without options or extension headers.
func fragments(packet []byte, id uint32, pieces ...piece) [][]byte {
	var all [][]byte
	for _, at := range pieces {
		if packet[0]>>4 == 6 {
			body := packet[40:]
			offset := uint16(at.from)
			if at.to < len(body) {
				offset |= 1
			}
			header := []byte{packet[6], 0, byte(offset >> 8), byte(offset)}
			header = binary.BigEndian.AppendUint32(header, id)
			from, to := netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
			all = append(all, ip(from, to, unix.IPPROTO_FRAGMENT, append(header, body[at.from:at.to]...)))
			continue
		}
		body := packet[20:]
		p := append(bytes.Clone(packet[:20]), body[at.from:at.to]...)
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		binary.BigEndian.PutUint16(p[4:], uint16(id))
		offset := uint16(at.from / 8)
		if at.to < len(body) {
			offset |= 1 << 13
		}
		binary.BigEndian.PutUint16(p[6:], offset)
		fixHeader(p)
		all = append(all, p)
	}
	return all
}

// mail is a datagram that was read.
type mail struct {
	from    netip.AddrPort
	payload string
}

// mailbox reads what has arrived at some sockets, without waiting.
func mailbox(t *testing.T, conns []*net.UDPConn) []mail {
	t.Helper()
	var all []mail
	buffer := make([]byte, 1<<16)
	for _, c := range conns {
		socket := fd(t, c)
		for {
			n, from, err := unix.Recvfrom(socket, buffer, unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				break
			}
			check(t, err)
			all = append(all, mail{addressOf(from), string(buffer[:n])})
		}
	}
	return all
}

func addressOf(from unix.Sockaddr) netip.AddrPort {
	switch from := from.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(from.Addr), uint16(from.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(from.Addr).Unmap(), uint16(from.Port))
	}
	return netip.AddrPort{}
}

// checksumErrors is how many datagrams the kernel has found broken after it had
// chosen their socket.
func checksumErrors(t *testing.T) (sum int) {
	t.Helper()
	number := func(text string) {
		sum += must(strconv.Atoi(text))(t)
	}
	lines := strings.Split(string(must(os.ReadFile("/proc/thread-self/net/snmp"))(t)), "\n")
	for i, line := range lines {
		if names := strings.Fields(line); i > 0 && len(names) > 0 && names[0] == "Udp:" && strings.HasPrefix(lines[i-1], "Udp: In") {
			for j, name := range strings.Fields(lines[i-1]) {
				if name == "InCsumErrors" {
					number(names[j])
				}
			}
		}
	}
	for line := range strings.Lines(string(must(os.ReadFile("/proc/thread-self/net/snmp6"))(t))) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == "Udp6InCsumErrors" {
			number(fields[1])
		}
	}
	return sum
}

// newRandom is a source of random numbers; $GRM_SEED repeats a run.
func newRandom(t *testing.T) *rand.Rand {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("GRM_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("GRM_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}
