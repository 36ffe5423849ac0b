package proc

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Owner is a bound socket that stands in the way, and who has it open.
type Owner struct {
	UID  int
	Pid  int    // 0: no process that is visible here
	Comm string // "" without Pid
}

func (o Owner) String() string {
	if o.Pid == 0 {
		return fmt.Sprintf("a socket of uid %d that no process here has open", o.UID)
	}
	return fmt.Sprintf("process %d (%s) of uid %d", o.Pid, o.Comm, o.UID)
}

// Holder finds the first socket in this network namespace that stands in the
// way of binding one to address ("udp" or "tcp"), but for those whose inode is
// ours. It is for messages: it may walk over all processes.
func Holder(network string, address netip.AddrPort, ours func(inode uint64) bool) (Owner, bool) {
	return owner(network, func(s socket) bool { return conflicts(network, s, address) && !ours(s.inode) })
}

// Twin is Holder for sockets of exactly that address: those that would be in
// one reuseport group with ours.
func Twin(network string, address netip.AddrPort, ours func(inode uint64) bool) (Owner, bool) {
	return owner(network, func(s socket) bool { return twins(network, s, address) && !ours(s.inode) })
}

// UID is whose the sockets of exactly that address are. In one reuseport group
// all are the same user's.
func UID(network string, address netip.AddrPort) (uid uint32, found bool) {
	s, found := find(network, func(s socket) bool { return twins(network, s, address) })
	return uint32(s.uid), found
}

func twins(network string, s socket, address netip.AddrPort) bool {
	return s.local == address && (network != "tcp" || s.state == tcpListen)
}

// owner is the first socket that matches, with who has it open.
func owner(network string, match func(socket) bool) (Owner, bool) {
	s, found := find(network, match)
	if !found {
		return Owner{}, false
	}
	o := Owner{UID: s.uid, Pid: pidWithSocket(s.inode)}
	if o.Pid != 0 {
		o.Comm = Comm(o.Pid)
	}
	return o, true
}

func find(network string, match func(socket) bool) (socket, bool) {
	for _, family := range []string{"", "6"} {
		text, err := os.ReadFile("/proc/self/net/" + network + family)
		if err != nil {
			continue // no IPv6 here
		}
		for line := range bytes.Lines(text) {
			if s, ok := parseSocket(line); ok && match(s) {
				return s, true
			}
		}
	}
	return socket{}, false
}

func pidWithSocket(inode uint64) int {
	pids, err := All()
	if err != nil {
		return 0
	}
	for _, pid := range pids {
		if inodes, err := SocketInodes(pid); err == nil && slices.Contains(inodes, inode) {
			return pid
		}
	}
	return 0
}

// socket is a line of /proc/net/udp and its like.
type socket struct {
	local netip.AddrPort
	state int
	uid   int
	inode uint64
}

const tcpListen = 10 // TCP_LISTEN

// conflicts says whether binding to address fails on account of s: the same
// port, and the same address or one of them a wildcard.
func conflicts(network string, s socket, address netip.AddrPort) bool {
	if s.local.Port() != address.Port() || network == "tcp" && s.state != tcpListen {
		return false
	}
	a, b := s.local.Addr().Unmap(), address.Addr().Unmap()
	switch {
	case a == b:
		return true
	case a.Is4() == b.Is4():
		return a.IsUnspecified() || b.IsUnspecified()
	}
	// An IPv6 wildcard takes IPv4 as well, unless it is IPv6 only, which the line does not tell.
	return a.Is6() && a.IsUnspecified() || b.Is6() && b.IsUnspecified()
}

// parseSocket reads one line: sl, local, remote, state, queues, timer,
// retransmits, uid, timeout, inode, …
func parseSocket(line []byte) (socket, bool) {
	f := strings.Fields(string(line))
	if len(f) < 10 {
		return socket{}, false
	}
	local, ok := parseAddr(f[1])
	if !ok {
		return socket{}, false
	}
	state, err1 := strconv.ParseUint(f[3], 16, 8)
	uid, err2 := strconv.ParseUint(f[7], 10, 32)
	inode, err3 := strconv.ParseUint(f[9], 10, 64)
	if err1 != nil || err2 != nil || err3 != nil {
		return socket{}, false
	}
	return socket{local: local, state: int(state), uid: int(uid), inode: inode}, true
}

var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// parseAddr reads an address as the kernel prints it: 32-bit words in the
// machine's byte order, in hex.
func parseAddr(text string) (netip.AddrPort, bool) {
	ip, port, ok := strings.Cut(text, ":")
	if !ok {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(ip)
	if err != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(raw, 4) {
		if littleEndian {
			slices.Reverse(word)
		}
	}
	p, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr, uint16(p)), true
}
