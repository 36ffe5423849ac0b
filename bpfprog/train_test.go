package bpfprog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// wagon is the size of each datagram in a train, but for the last one.
const wagon = 100

// trainRead is what one call got: one datagram, or a train of several.
type trainRead struct {
	socket    int // of the old generation's, then of the working one's
	datagrams [][]byte
}

// readTrains reads until so many datagrams have come. Sockets with UDP_GRO get
// whole trains.
func readTrains(t *testing.T, conns []*net.UDPConn, datagrams int) (reads []trainRead) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for got := 0; got < datagrams; {
		for i, c := range conns {
			buffer, oob := make([]byte, 1<<16), make([]byte, 64)
			n, oobn, _, _, err := unix.Recvmsg(fd(t, c), buffer, oob, unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				continue
			}
			check(t, err)
			size := max(n, 1)
			for _, m := range must(unix.ParseSocketControlMessage(oob[:oobn]))(t) {
				if m.Header.Level == unix.SOL_UDP && m.Header.Type == unix.UDP_GRO {
					size = int(binary.NativeEndian.Uint32(m.Data))
				}
			}
			r := trainRead{socket: i}
			for rest := buffer[:n]; ; rest = rest[size:] {
				if len(rest) <= size {
					r.datagrams = append(r.datagrams, rest)
					break
				}
				r.datagrams = append(r.datagrams, rest[:size])
			}
			got += len(r.datagrams)
			reads = append(reads, r)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d datagrams have come", got, datagrams)
		}
	}
	return reads
}

// setTrains sets UDP_SEGMENT on senders, or UDP_GRO on receivers.
func setTrains(t *testing.T, option, value int, conns ...*net.UDPConn) {
	t.Helper()
	for _, c := range conns {
		check(t, unix.SetsockoptInt(fd(t, c), unix.SOL_UDP, option, value))
	}
}

// train is n datagrams whose first words are those of first, then of rest.
func train(n int, first, rest uint32) (payload []byte) {
	for i := range n {
		word := rest
		if i == 0 {
			word = first
		}
		payload = binary.BigEndian.AppendUint32(payload, word)
		payload = append(payload, make([]byte, wagon-4)...)
	}
	return payload[:len(payload)-wagon/2]
}

// TestTrains: datagrams that the kernel carries as one packet are one packet to
// the program. All go where the first one goes, whatever is in the others, and
// none is lost; and they are counted as one.
func TestTrains(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5001", "[::1]:5001"} {
		for _, gro := range []int{0, 1} {
			for _, spec := range []GroupSpec{noopSpec(address), flowSpec(address), cbpfSpec(address, 1)} {
				t.Run(fmt.Sprintf("%s, %s, UDP_GRO %d", address, spec.Dissector.Kind, gro), func(t *testing.T) {
					r := newRig(t, spec)
					old := r.generation(0, 1, 2)
					conns := append(old, r.generation(1, 2, 2)...)
					setTrains(t, unix.UDP_GRO, gro, conns...)
					client := func() *net.UDPConn {
						c := dial(t, r.Spec.Address)
						setTrains(t, unix.UDP_SEGMENT, wagon, c)
						return c
					}
					packets := uint64(0)
					send := func(c *net.UDPConn, n int, first, rest uint32) int {
						t.Helper()
						must(c.Write(train(n, first, rest)))(t)
						reads := readTrains(t, conns, n)
						for _, read := range reads {
							want(t, "socket of all", read.socket, reads[0].socket)
						}
						if gro == 1 {
							want(t, "reads", len(reads), 1)
						}
						packets++
						want(t, "packets counted", r.ctl.Stats(0).Packets+r.ctl.Stats(1).Packets, packets)
						return reads[0].socket
					}
					r.ctl.Flip(0)
					known := client()
					home := send(known, 40, noCookie, noCookie)
					r.ctl.Flip(1)
					for _, n := range []int{2, 3, 60} {
						if spec.Dissector.Kind != Noop {
							want(t, "socket of the flow", send(known, n, noCookie, noCookie), home)
						}
						if at := send(client(), n, noCookie, noCookie); at < 2 {
							t.Fatalf("a new flow's train went to the old generation's socket %d", at)
						}
						if spec.Dissector.Kind == CBPF {
							for slot := range 2 {
								want(t, "socket of the first cookie", send(client(), n, r.cookie(0, 0, slot), r.cookie(0, 1, 1-slot)), slot)
							}
						}
					}
				})
			}
		}
	}
}

// TestVethTrains: the same, but it is the receiving side (GRO) that makes trains
// of single datagrams, as a network card's driver has it do. How long they are
// is its own affair; each is a packet.
func TestVethTrains(t *testing.T) {
	needRoot(t)
	needRoot(t)
	for _, network := range []string{"10.66.0.", "fd66::"} {
		t.Run(network, func(t *testing.T) {
			spec := cbpfSpec(netip.AddrPortFrom(netip.MustParseAddr(network+"1"), 5001).String(), 1)
			senders := veth(t, network, spec.Address, 8)
			r := newRig(t, spec)
			conns := append(r.generation(0, 1, 2), r.generation(1, 2, 2)...)
			setTrains(t, unix.UDP_GRO, 1, conns...)
			r.ctl.Flip(0)
			r.ctl.Flip(1)
			homes := map[uint32]int{}
			var cookies []uint32
			for socket := range conns {
				cookies = append(cookies, r.cookie(0, socket/2, socket%2))
				homes[cookies[socket]] = socket
			}
			random := newRandom(t)
			trains, datagrams, packets := 0, 0, uint64(0)
			for i := range 200 {
				n := 2 + random.IntN(40)
				c := senders[i%len(senders)]
				must(c.Write(train(n, cookies[random.IntN(4)], cookies[random.IntN(4)])))(t)
				for _, read := range readTrains(t, conns, n) {
					want(t, "socket of the first cookie", read.socket, homes[binary.BigEndian.Uint32(read.datagrams[0])])
					datagrams += len(read.datagrams)
					packets++
					if len(read.datagrams) > 1 {
						trains++
					}
				}
				want(t, "packets counted", r.ctl.Stats(0).Packets+r.ctl.Stats(1).Packets, packets)
			}
			t.Logf("%d datagrams came in %d packets, %d of them trains", datagrams, packets, trains)
			if trains == 0 {
				t.Error("there was no train at all")
			}
		})
	}
}

// veth makes a network with two ends: address 1 here, with GRO, and address 2 in
// another namespace, which has to cut trains before it sends them. It returns
// sockets there that send trains to an address here.
func veth(t *testing.T, network string, to netip.AddrPort, n int) (senders []*net.UDPConn) {
	t.Helper()
	address := func(host, device string) []string {
		if to.Addr().Is4() {
			return []string{"address", "add", network + host + "/24", "dev", device}
		}
		return []string{"address", "add", network + host + "/64", "dev", device, "nodad"}
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine, and is never here again
		result <- func() error {
			here, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer here.Close()
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			there, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer there.Close()
			if err := errors.Join(
				ipCommand("link", "add", "name", "grm-there", "type", "veth", "peer", "name", "grm-here"),
				ipCommand("link", "set", "grm-here", "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), here.Fd())),
				ipCommand(address("2", "grm-there")...),
				ipCommand("link", "set", "grm-there", "gso_max_segs", "1"),
				ethtool("grm-there", ethtoolSetTSO, 0), // else the driver takes no packet for one that needs GRO
				ipCommand("link", "set", "grm-there", "up"),
				unix.Setns(int(here.Fd()), unix.CLONE_NEWNET),
				ipCommand(address("1", "grm-here")...),
				ethtool("grm-here", ethtoolSetGRO, 1),
				ipCommand("link", "set", "grm-here", "up"),
				unix.Setns(int(there.Fd()), unix.CLONE_NEWNET),
			); err != nil {
				return err
			}
			for range n {
				c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
				if err != nil {
					return err
				}
				senders = append(senders, c)
			}
			return nil
		}()
	}()
	err := <-result
	t.Cleanup(func() {
		for _, c := range senders {
			check(t, c.Close())
		}
		check(t, ipCommand("link", "delete", "grm-here"))
	})
	check(t, err)
	setTrains(t, unix.UDP_SEGMENT, wagon, senders...)
	return senders
}

// ipCommand runs ip(8) in the network namespace of the calling thread.
func ipCommand(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// What ethtool -K says to a device.
const (
	ethtoolSetTSO = 0x1f
	ethtoolSetGRO = 0x2c
)

func ethtool(device string, command, value uint32) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	request := [2]uint32{command, value}
	var ifreq struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(ifreq.name[:], device)
	ifreq.data = unsafe.Pointer(&request)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifreq))); errno != 0 {
		return fmt.Errorf("ethtool %#x of %s: %w", command, device, errno)
	}
	return nil
}
