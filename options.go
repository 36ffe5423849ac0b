package grm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The socket options at level IPPROTO_UDP that grm answers on the sockets it
// made; 200 to 204 are those of udpgrm, with its sizes, values and errors.
const (
	OptWorkingGen = 200 // get and set a u32
	OptSocketGen  = 201 // get {generation, index u32, cookie, pad u16}; set a u32
	OptDissector  = 202 // get the group's dissector
	OptFlowAssure = 203 // set the sockaddr of a flow's other end
	OptSocketApp  = 204 // get a u32
	OptKey        = 205 // get an Identity: epoch, generation u64, bank, index, app, cookie u32
)

// ErrNoGroup says that a socket is in no group of grm's: it was bound by the
// server itself, or the server runs without grm.
var ErrNoGroup = errors.New("socket is in no grm group")

// Identity says what a socket is. The epoch is made anew each time that the
// service starts from nothing, so that (epoch, generation, index) never comes
// again; app and bank are where the kernel side keeps the socket.
type Identity struct {
	Epoch      uint64
	Generation uint64
	Bank       uint32
	Index      uint32
	App        uint32
	Cookie     uint32 // 0: none
}

// Identify asks which generation's socket c is. Like the other options it is
// there for UDP sockets only.
func Identify(c syscall.Conn) (Identity, error) {
	var b [32]byte
	if err := getOption(c, OptKey, b[:]); err != nil {
		return Identity{}, err
	}
	order := binary.NativeEndian
	return Identity{
		Epoch:      order.Uint64(b[0:]),
		Generation: order.Uint64(b[8:]),
		Bank:       order.Uint32(b[16:]),
		Index:      order.Uint32(b[20:]),
		App:        order.Uint32(b[24:]),
		Cookie:     order.Uint32(b[28:]),
	}, nil
}

// Cookie is the 16-bit name of c's socket that a server puts into what clients
// send back, such as a connection id, for a dissector that reads it there. It
// comes again after many generations; Identify's answer never does.
func Cookie(c syscall.Conn) (uint16, error) {
	var b [12]byte
	if err := getOption(c, OptSocketGen, b[:]); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint16(b[8:]), nil
}

// WorkingGeneration is the generation that takes new flows now, as option 200
// counts: its low 32 bits.
func WorkingGeneration(c syscall.Conn) (uint32, error) {
	var b [4]byte
	if err := getOption(c, OptWorkingGen, b[:]); err != nil {
		return 0, err
	}
	return binary.NativeEndian.Uint32(b[:]), nil
}

// Assure says that remote is known to be real, so that its flow stays with
// this socket and no stranger's packets can push it out. With the default
// assurance a flow is assured once it was answered and its client came back;
// with assure = "explicit" only this does it. Calling it again refreshes the
// flow. It fails with EEXIST if the flow lives at another socket.
func Assure(c syscall.Conn, remote netip.AddrPort) error {
	err := control(c, func(fd int) error {
		return unix.SetsockoptString(fd, unix.IPPROTO_UDP, OptFlowAssure, string(sockaddr(remote)))
	})
	if err != nil {
		return fmt.Errorf("assure flow of %s: %w", remote, err)
	}
	return nil
}

// sockaddr is a as sockaddr_in or sockaddr_in6.
func sockaddr(a netip.AddrPort) []byte {
	port := binary.BigEndian.AppendUint16(nil, a.Port())
	if a.Addr().Is4() {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = append(b, port...)
		b = append(b, a.Addr().AsSlice()...)
		return append(b, make([]byte, 8)...)
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = append(b, port...)
	b = append(b, 0, 0, 0, 0) // flow info
	b = append(b, a.Addr().WithZone("").AsSlice()...)
	return binary.NativeEndian.AppendUint32(b, scopeID(a.Addr().Zone()))
}

func getOption(c syscall.Conn, option int, into []byte) error {
	err := control(c, func(fd int) error {
		size := uint32(len(into))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_UDP, uintptr(option),
			uintptr(unsafe.Pointer(&into[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return errno
		}
		if int(size) != len(into) {
			return fmt.Errorf("%d bytes in place of %d", size, len(into))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("socket option %d: %w", option, err)
	}
	return nil
}

// control runs f on c's descriptor, which stays c's. What the kernel says of a
// socket that no hook knows becomes ErrNoGroup.
func control(c syscall.Conn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	if errors.Is(failed, unix.ENOPROTOOPT) || errors.Is(failed, unix.EBADF) || errors.Is(failed, unix.EBADFD) {
		return fmt.Errorf("%w (%w)", ErrNoGroup, failed)
	}
	return failed
}

// scopeID is the number of the interface that an address' zone names, by
// number or by name; 0 for none.
func scopeID(zone string) uint32 {
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n)
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	return 0
}
