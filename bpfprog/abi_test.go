package bpfprog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/reuseport"
)

// The options at level IPPROTO_UDP, as c/hooks.bpf.c has them.
const (
	optWorkingGen = 200 + iota
	optSocketGen
	optDissector
	optFlowAssure
	optSocketApp
	optKey
)

func setOption(t testing.TB, c *net.UDPConn, level, option int, value []byte) error {
	var b *byte
	if len(value) > 0 {
		b = &value[0]
	}
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd(t, c)), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(b)), uintptr(len(value)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func getOption(t testing.TB, c *net.UDPConn, level, option, room int) ([]byte, error) {
	value := make([]byte, max(room, 1))
	size := uint32(room)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd(t, c)), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return nil, errno
	}
	return value[:size], nil
}

func u32(values ...uint32) []byte {
	var b []byte
	for _, v := range values {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

func setUDP(t testing.TB, c *net.UDPConn, option int, value []byte) error {
	return setOption(t, c, unix.IPPROTO_UDP, option, value)
}

func getUDP(t testing.TB, c *net.UDPConn, option, room int) []byte {
	t.Helper()
	v, err := getOption(t, c, unix.IPPROTO_UDP, option, room)
	if err != nil {
		t.Fatalf("getsockopt %d: %v", option, err)
	}
	return v
}

func wantErrno(t testing.TB, what string, got error, want unix.Errno) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, not %v", what, got, want)
	}
}

func TestABIOfRegisteredSockets(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	one := r.generation(0, 1, 2)
	serve(one, "one")
	want(t, "working generation before the first", string(getUDP(t, one[0], optWorkingGen, 4)), string(u32(0)))
	r.ctl.Flip(0)
	want(t, "working generation", string(getUDP(t, one[0], optWorkingGen, 4)), string(u32(1)))
	two := r.generation(5, 2, 3)
	serve(two, "two")

	v := getUDP(t, two[2], optSocketGen, 12)
	want(t, "size", len(v), 12)
	want(t, "generation", binary.NativeEndian.Uint32(v), 2)
	want(t, "index", binary.NativeEndian.Uint32(v[4:]), 2)
	cookie := binary.NativeEndian.Uint16(v[8:])
	want(t, "cookie", uint32(cookie), r.cookie(0, 5, 2))
	want(t, "cookie's index", cookie>>8, 2)
	want(t, "size of the short form", len(getUDP(t, two[2], optSocketGen, 8)), 8)
	want(t, "app", string(getUDP(t, two[0], optSocketApp, 4)), string(u32(0)))

	key := getUDP(t, two[2], optKey, 64)
	want(t, "size of the key", len(key), 32)
	want(t, "epoch", binary.NativeEndian.Uint64(key), r.ctl.Epoch())
	want(t, "generation of the key", binary.NativeEndian.Uint64(key[8:]), 2)
	want(t, "app, bank, index, cookie", string(key[16:]), string(u32(0, 5, 2, uint32(cookie))))

	// What a server written for udpgrm does with what it was given.
	check(t, setUDP(t, two[0], optSocketGen, u32(2)))
	wantErrno(t, "another generation", setUDP(t, two[0], optSocketGen, u32(7)), unix.EPERM)
	want(t, "new flow before the flip", ask(t, dial(t, r.Spec.Address)), "one")
	check(t, setUDP(t, two[0], optWorkingGen, u32(2)))
	want(t, "new flow after the flip", ask(t, dial(t, r.Spec.Address)), "two")
	want(t, "order", fmt.Sprint(r.ctl.Order().Banks()), "[5 0]")
	want(t, "state", r.ctl.Bank(5).State, control.Serving)
	wantErrno(t, "a generation that nobody has", setUDP(t, two[0], optWorkingGen, u32(9)), unix.ENOENT)
	r.ctl.SetState(0, control.Draining)
	wantErrno(t, "a generation that drains", setUDP(t, two[0], optWorkingGen, u32(1)), unix.EPERM)
	wantErrno(t, "app", setUDP(t, two[0], optSocketApp, u32(0)), unix.EEXIST)
	wantErrno(t, "app beyond max_apps", setUDP(t, two[0], optSocketApp, u32(1)), unix.EOVERFLOW)
	wantErrno(t, "short value", setUDP(t, two[0], optWorkingGen, []byte{1}), unix.EINVAL)
	wantErrno(t, "the key", setUDP(t, two[0], optKey, u32(1)), unix.EPERM)
	_, err := getOption(t, two[0], unix.IPPROTO_UDP, optFlowAssure, 16)
	wantErrno(t, "flow assure is only set", err, unix.ENOPROTOOPT)
	want(t, "refusals are counted", must(r.Counters())(t)[ABIError], 7)
}

func TestABIOfParkedSockets(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 1), "one")
	r.ctl.Flip(0)
	conns := r.generation(1, 2, 2)
	r.ctl.Park(1)
	serve(conns, "two")
	v := getUDP(t, conns[0], optSocketGen, 12)
	want(t, "index before it is registered", binary.NativeEndian.Uint32(v[4:]), 0xffffffff)
	wantErrno(t, "flip before it is registered", setUDP(t, conns[0], optWorkingGen, u32(77)), unix.ENOENT)
	for i, c := range conns {
		check(t, setUDP(t, c, optSocketGen, u32(77)))
		v := getUDP(t, c, optSocketGen, 12)
		want(t, "generation", binary.NativeEndian.Uint32(v), 77)
		want(t, "index", binary.NativeEndian.Uint32(v[4:]), uint32(i))
	}
	check(t, setUDP(t, conns[0], optWorkingGen, u32(77)))
	want(t, "new flow", ask(t, dial(t, r.Spec.Address)), "two")
	want(t, "working generation", string(getUDP(t, conns[0], optWorkingGen, 4)), string(u32(77)))
	want(t, "name", r.ctl.Bank(1).Name, 77)
}

// The flip of a server keeps the order's other banks, however many there are.
func TestABIOrder(t *testing.T) {
	r := newHookedRig(t, noopSpec("127.0.0.1:5001"))
	conns := make([]*net.UDPConn, control.Banks)
	for b := range conns {
		conns[b] = r.generation(b, uint64(b+1), 1)[0]
	}
	model := []int{}
	for i := range 60 {
		b := i * 7 % 17
		check(t, setUDP(t, conns[3], optWorkingGen, u32(uint32(b+1))))
		model = slices.DeleteFunc(model, func(x int) bool { return x == b })
		model = append([]int{b}, model...)
		model = model[:min(len(model), control.Fallback)]
		want(t, "order", fmt.Sprint(r.ctl.Order().Banks()), fmt.Sprint(model))
		want(t, "alive", r.ctl.Alive(b), true)
	}
}

func sockaddr(a netip.AddrPort) []byte {
	port := binary.BigEndian.AppendUint16(nil, a.Port())
	if a.Addr().Is4() {
		b := append(binary.NativeEndian.AppendUint16(nil, unix.AF_INET), port...)
		return append(append(b, a.Addr().AsSlice()...), make([]byte, 8)...)
	}
	b := append(binary.NativeEndian.AppendUint16(nil, unix.AF_INET6), port...)
	return append(append(append(b, 0, 0, 0, 0), a.Addr().AsSlice()...), 0, 0, 0, 0)
}

func TestABIFlowAssure(t *testing.T) {
	spec := flowSpec("[::]:5001")
	spec.DualStack = true
	spec.Dissector.Assure = Explicit
	r := newHookedRig(t, spec)
	one := r.generation(0, 1, 2)
	serve(one, "one")
	r.ctl.Flip(0)
	two := r.generation(1, 2, 1)
	serve(two, "two")
	client := dial(t, addr("127.0.0.1:5001"))
	local := client.LocalAddr().(*net.UDPAddr).AddrPort()
	mapped := netip.AddrPortFrom(netip.AddrFrom16(local.Addr().As16()), local.Port())

	check(t, setUDP(t, one[0], optFlowAssure, sockaddr(mapped)))
	check(t, setUDP(t, one[0], optFlowAssure, sockaddr(local)))
	wantErrno(t, "flow of another socket", setUDP(t, one[1], optFlowAssure, sockaddr(local)), unix.EEXIST)
	wantErrno(t, "flow of another generation", setUDP(t, two[0], optFlowAssure, sockaddr(mapped)), unix.EEXIST)
	wantErrno(t, "family", setUDP(t, one[0], optFlowAssure, make([]byte, 28)), unix.EINVAL)
	wantErrno(t, "short", setUDP(t, one[0], optFlowAssure, sockaddr(local)[:8]), unix.EINVAL)
	r.ctl.Flip(1)
	want(t, "assured flow", ask(t, client), "one")
	want(t, "assured", r.ctl.Stats(0).Assured, 1)

	// An embryo belongs to whoever proves that it is real.
	embryo := dial(t, addr("[::1]:5001"))
	want(t, "embryo", ask(t, embryo), "two")
	check(t, setUDP(t, one[0], optFlowAssure, sockaddr(embryo.LocalAddr().(*net.UDPAddr).AddrPort())))
	want(t, "embryo that an older generation claims", ask(t, embryo), "one")
	// And so does what is left of a generation that is gone.
	r.ctl.Withdraw(0)
	check(t, setUDP(t, two[0], optFlowAssure, sockaddr(local)))
	want(t, "flow of a dead generation", ask(t, client), "two")
}

func TestABIFlowAssureTableFull(t *testing.T) {
	spec := flowSpec("127.0.0.1:5001")
	spec.Dissector.Flows = 1
	r := newHookedRig(t, spec)
	conns := r.generation(0, 1, 1)
	r.ctl.Flip(0)
	assured := 0
	for i := range 64 {
		err := setUDP(t, conns[0], optFlowAssure, sockaddr(netip.AddrPortFrom(addr("10.0.0.1:1").Addr(), uint16(i+1))))
		if err == nil {
			assured++
			continue
		}
		wantErrno(t, "full", err, unix.ENOSPC)
	}
	want(t, "assured flows in two buckets of eight", assured, 16)
	want(t, "counted", must(r.Counters())(t)[TableFull], 48)
}

func TestABIDissector(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	c := r.generation(0, 1, 1)[0]
	pad := func(size int, values ...uint32) []byte { return append(u32(values...), make([]byte, size)...)[:size] }
	for _, size := range []int{4, 8, 12, 16, 28, 116, 376, 632} {
		check(t, setUDP(t, c, optDissector, pad(size, 0, 124, 1)))
	}
	check(t, setUDP(t, c, optDissector, u32(0x8000)))
	wantErrno(t, "another type", setUDP(t, c, optDissector, u32(4)), unix.EPERM)
	wantErrno(t, "another timeout", setUDP(t, c, optDissector, u32(0, 125)), unix.EPERM)
	wantErrno(t, "more apps", setUDP(t, c, optDissector, u32(0, 124, 4)), unix.EPERM)
	wantErrno(t, "digest", setUDP(t, c, optDissector, u32(0, 124, 1, 0xdead)), unix.EPERM)
	wantErrno(t, "size", setUDP(t, c, optDissector, make([]byte, 20)), unix.EINVAL)
	v := getUDP(t, c, optDissector, 632)
	want(t, "size", len(v), 632)
	want(t, "type, timeout, apps", string(v[:12]), string(u32(0, 124, 1)))
}

func TestABIOfStrangers(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	r.generation(0, 1, 1)
	member := r.bind() // in the group, but not ours
	defer member.Close()
	wantErrno(t, "set by a stranger in the group", setUDP(t, member, optWorkingGen, u32(1)), unix.EBADF)
	_, err := getOption(t, member, unix.IPPROTO_UDP, optSocketGen, 12)
	wantErrno(t, "get by a stranger in the group", err, unix.EBADFD)
	other := must(net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr("127.0.0.1:0"))))(t)
	defer other.Close()
	wantErrno(t, "set by a stranger", setUDP(t, other, optWorkingGen, u32(1)), unix.ENOPROTOOPT)
}

// Options that are not ours are the kernel's, long ones too.
func TestOtherOptionsAreLeftAlone(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	c := r.generation(0, 1, 1)[0]
	for i, size := range []int{4, 8192} {
		priority := append(u32(uint32(2+i)), make([]byte, size-4)...)
		check(t, setOption(t, c, unix.SOL_SOCKET, unix.SO_PRIORITY, priority))
		v, err := getOption(t, c, unix.SOL_SOCKET, unix.SO_PRIORITY, 2*size)
		check(t, err)
		want(t, "priority", string(v), string(priority[:4]))
	}
	wantErrno(t, "unknown option", setOption(t, c, unix.IPPROTO_UDP, 199, u32(1)), unix.ENOPROTOOPT)
	check(t, setOption(t, c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, u32(1000)))
}

// A server may not replace the group's program, not even as root; it is told that it did.
func TestGuard(t *testing.T) {
	r := newHookedRig(t, noopSpec("127.0.0.1:5001"))
	one := r.generation(0, 1, 1)
	serve(one, "one")
	two := r.generation(1, 2, 1)
	serve(two, "two")
	r.ctl.Flip(1)
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}} // all to the first member
	program := unix.SockFprog{Len: 1, Filter: &filter[0]}
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&program)), unsafe.Sizeof(program))
	steal := func(uid int) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		check(t, setEUID(uid))
		defer func() { check(t, setEUID(0)) }()
		check(t, setOption(t, one[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, raw))
		check(t, setOption(t, one[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, u32(0)))
		check(t, setOption(t, one[0], unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, u32(0)))
	}
	steal(0)
	steal(65534)
	for range 20 {
		want(t, "packet after the program was to be stolen", ask(t, dial(t, r.Spec.Address)), "two")
	}
	want(t, "counted", must(r.Counters())(t)[Guarded], 6)
	check(t, r.Attach(fd(t, one[0]))) // root's own way goes on working

	// A group that the server made for itself is its own affair.
	own := &rig{t: t, Group: &Group{Spec: noopSpec("127.0.0.1:5009")}}
	c := own.bind()
	defer c.Close()
	check(t, setOption(t, c, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, raw))
	check(t, setOption(t, c, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, u32(0)))
	wantErrno(t, "detach twice", setOption(t, c, unix.SOL_SOCKET, unix.SO_DETACH_REUSEPORT_BPF, u32(0)), unix.ENOENT)
}

// Of a socket that has left the group, but not the address, the kernel would be
// the first to find, and give it the packets of all flows and generations. So
// what a server may do to a socket it was given stays with that socket.
func TestTakeover(t *testing.T) {
	option := func(name, value int) func(fd int) error {
		return func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, name, value) }
	}
	filter := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}} // nothing
	for _, misuse := range []struct {
		what    string
		do      func(fd int) error
		err     error
		guarded bool
		deaf    bool // the socket itself gets nothing any more
	}{
		{"SO_REUSEPORT 0", option(unix.SO_REUSEPORT, 0), nil, true, false},
		{"SO_REUSEPORT 1", option(unix.SO_REUSEPORT, 1), nil, true, false},
		{"device", func(fd int) error { return unix.BindToDevice(fd, "lo") }, unix.EPERM, true, false},
		{"interface", option(unix.SO_BINDTOIFINDEX, 1), unix.EPERM, true, false},
		{"no interface", reuseport.Leave, nil, false, true},
		{"connect", connect, unix.EPERM, true, false},
		{"shutdown", func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }, unix.ENOTCONN, false, false},
		{"filter", func(fd int) error {
			return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &filter[0]})
		}, nil, false, true},
		{"SO_INCOMING_CPU", option(unix.SO_INCOMING_CPU, 0), nil, false, false},
		{"SO_REUSEADDR", option(unix.SO_REUSEADDR, 1), nil, false, false},
	} {
		addresses := []string{"127.0.0.1:5001", "0.0.0.0:5001", "[::1]:5001", "[::]:5001"}
		if !misuse.guarded {
			addresses = addresses[:1] // it is the kernel's affair
		}
		for _, address := range addresses {
			t.Run(misuse.what+", "+address, func(t *testing.T) {
				spec := flowSpec(address)
				spec.DualStack = address == "[::]:5001"
				r := newHookedRig(t, spec)
				w := newWire(t)
				old := r.generation(0, 1, 2)
				r.ctl.Flip(0)
				var flows []*net.UDPConn
				for range 10 {
					flows = append(flows, dial(t, r.reach()))
					send(t, flows[len(flows)-1], "hello")
				}
				working := r.generation(1, 2, 2)
				r.ctl.Flip(1)
				w.settle()
				want(t, "packets before", len(mailbox(t, old)), 10)
				for i, c := range working { // the first and the last that the kernel knows of the address
					if err := misuse.do(fd(t, c)); !errors.Is(err, misuse.err) {
						t.Fatalf("error %v, not %v", err, misuse.err)
					}
					if misuse.deaf && i == 1 {
						break
					}
					for _, c := range flows {
						send(t, c, "hello")
					}
					w.settle()
					want(t, "packets of the old flows", len(mailbox(t, old)), 10)
					for range 30 {
						send(t, dial(t, r.reach()), "hello")
					}
					w.settle()
					got := [2]int{len(mailbox(t, working[:1])), len(mailbox(t, working[1:]))}
					if deaf := got[0] == 0; got[1] == 0 || deaf != misuse.deaf || !deaf && got[0]+got[1] != 30 {
						t.Fatalf("the working generation's sockets got %v", got)
					}
				}
				want(t, "counted", must(r.Counters())(t)[Guarded] > 0, misuse.guarded)
				_ = r.bind().Close() // the next generation can come
			})
		}
	}
}

// connect connects a socket to the discard port of its own host.
func connect(fd int) error {
	local, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	switch to := local.(type) {
	case *unix.SockaddrInet4:
		to.Port = 9
	case *unix.SockaddrInet6:
		to.Port = 9
	}
	return unix.Connect(fd, local)
}

// No hook is asked when a socket gives up a connection, even one that it never
// had; if it is bound to any address, the kernel takes it out of its group. That
// can be seen, no more.
func TestDisconnect(t *testing.T) {
	for address, leaves := range map[string]bool{"127.0.0.1:5001": false, "0.0.0.0:5001": true, "[::1]:5001": false, "[::]:5001": true} {
		t.Run(address, func(t *testing.T) {
			r := newHookedRig(t, flowSpec(address))
			c := r.generation(0, 1, 2)[0]
			unspecified := [16]byte{}
			_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd(t, c)), uintptr(unsafe.Pointer(&unspecified)), unsafe.Sizeof(unspecified))
			want(t, "error of disconnect", errno, 0)
			want(t, "slot is empty", must(r.Slots(0, 0))(t)[0] == 0, leaves)
		})
	}
}

// Servers that connect a socket for each client connect others than they were given.
func TestOwnSocketsMayConnect(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	r.generation(0, 1, 1)
	own := r.bind()
	defer own.Close()
	check(t, connect(fd(t, own)))
	want(t, "counted", must(r.Counters())(t)[Guarded], 0)
}

// setEUID changes the calling thread's effective uid only.
func setEUID(uid int) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
	if errno != 0 {
		return errno
	}
	return nil
}

// What cannot be attached says why, and nothing else.
func TestHooksOnNoCgroup(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	dir := must(os.Open(t.TempDir()))(t)
	defer func() { check(t, dir.Close()) }()
	if err := r.service.AttachHooks(dir, []*Group{r.Group}); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("hooks on no cgroup: %v", err)
	}
}

// A socket keeps the hooks of its cgroup when its process moves, and an upgrade reaches them there.
func TestHooksOfOlderCgroups(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	conns := r.generation(0, 1, 1)
	other := cgroupRoot + "/other"
	check(t, os.Mkdir(other, 0o755))
	dir := must(os.Open(other))(t)
	defer func() { check(t, dir.Close()); check(t, os.Remove(other)) }()
	check(t, r.service.AttachHooks(dir, []*Group{r.Group}))
	check(t, r.service.AttachHooks(dir, []*Group{r.Group}))
	var ids []uint64
	check(t, r.service.PruneHooks(func(id uint64) bool { ids = append(ids, id); return true }))
	want(t, "cgroups with hooks", len(ids), 2)
	want(t, "option of a socket of the older cgroup", string(getUDP(t, conns[0], optSocketApp, 4)), string(u32(0)))
	var st unix.Stat_t
	check(t, unix.Stat(other, &st))
	check(t, r.service.PruneHooks(func(id uint64) bool { return id == st.Ino }))
	eventually(t, "the hooks of the older cgroup are gone", func() bool {
		_, err := getOption(t, conns[0], unix.IPPROTO_UDP, optSocketApp, 4)
		return errors.Is(err, unix.ENOPROTOOPT)
	})
}
