package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/bpfprog/cbpf"
	"grm/control"
)

// kind is what dissects packets.
type kind int

const (
	noop kind = iota
	flow
	cbpf2
	cbpf20
)

func (k kind) String() string { return [...]string{"noop", "flow", "cbpf 2", "cbpf 20"}[k] }

func (k kind) program() cbpf.Program {
	switch k {
	case cbpf2:
		return cookie2
	case cbpf20:
		return cookie20
	}
	return nil
}

// flows is the size of flow tables that no curve is about.
const flows = 65536

// target is a reuseport group of one system under test.
type target struct {
	port    int
	sockets []int // of all generations, oldest first
	system
	// advance binds n sockets as the next generation and makes it the working one.
	advance func(n int) error
	// assured counts the flows that are known for certain; nil where that cannot be asked.
	assured func() (int, error)
	close   func() error
}

// options of a target.
type options struct {
	kind
	flows int  // size of the flow table
	hooks bool // with what watches the sending side
}

// subject makes targets.
type subject interface {
	target(o options) (*target, error)
}

// room is where targets live: a cgroup directory of the benchmark's own, and
// ports of its own network namespace.
type room struct {
	cgroup string
	port   int
	made   int
}

func (r *room) nextPort() int {
	r.port++
	return r.port
}

// newCgroup makes a cgroup below the benchmark's.
func (r *room) newCgroup(name string) (*os.File, error) {
	r.made++
	dir := filepath.Join(r.cgroup, fmt.Sprintf("%s-%d", name, r.made))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	return os.Open(dir)
}

// join moves the process into the cgroup, so that the sockets it makes next
// belong to it.
func join(cgroup string) error {
	return os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// bind makes a socket of a group in the cgroup.
func bind(cgroup string, port int) (int, error) {
	if err := join(cgroup); err != nil {
		return -1, fmt.Errorf("enter cgroup: %w", err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// Room for a few batches that all go to one socket.
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20),
		unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}))
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("bind 127.0.0.1:%d: %w", port, err)
	}
	return fd, nil
}

func closeAll(fds []int) (err error) {
	for _, fd := range fds {
		err = errors.Join(err, unix.Close(fd))
	}
	return err
}

// plain is the kernel by itself, or with programs that do nothing, or as
// little as can be done for a flow.
type plain struct {
	*room
	reuseport func(socket int) (int, error) // loads the steering program, if there is to be one
}

func (p plain) target(o options) (*target, error) {
	cgroup, err := p.newCgroup("plain")
	if err != nil {
		return nil, err
	}
	t := &target{port: p.nextPort()}
	extra := []int{}
	if o.hooks {
		program, link, err := attachEmptySendmsg(cgroup)
		if err != nil {
			return nil, err
		}
		t.tx, extra = []object{ownObject(program)}, append(extra, program, link)
	}
	t.advance = func(n int) error {
		for range n {
			fd, err := bind(cgroup.Name(), t.port)
			if err != nil {
				return err
			}
			t.sockets = append(t.sockets, fd)
		}
		if p.reuseport == nil || len(t.rx) > 0 {
			return nil
		}
		program, err := p.reuseport(t.sockets[0])
		if err != nil {
			return err
		}
		t.rx, extra = []object{ownObject(program)}, append(extra, program)
		return os.NewSyscallError("attach program", unix.SetsockoptInt(t.sockets[0], unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, program))
	}
	t.close = func() error { return errors.Join(closeAll(t.sockets), closeAll(extra), cgroup.Close()) }
	return t, nil
}

// grm is what all this is about.
type grm struct{ *room }

func (g grm) target(o options) (*target, error) {
	cgroup, err := g.newCgroup("grm")
	if err != nil {
		return nil, err
	}
	before, err := pins(bpfprog.Root)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	t := &target{port: g.nextPort()}
	spec := bpfprog.GroupSpec{
		Network: "udp", Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(t.port)),
		Dissector: dissector(o), MaxApps: 1,
	}
	group, err := bpfprog.CreateGroup(spec)
	if err != nil {
		return nil, err
	}
	service, err := bpfprog.CreateService("bench-" + strconv.Itoa(t.port))
	if err != nil {
		return nil, errors.Join(err, group.Remove())
	}
	t.close = func() error {
		return errors.Join(closeAll(t.sockets), t.system.close(), group.Remove(), service.Remove(), group.Close(), service.Close(), cgroup.Close())
	}
	err = group.Join(0, service)
	if err == nil && o.hooks {
		err = service.AttachHooks(cgroup, []*bpfprog.Group{group})
	}
	if err != nil {
		return nil, errors.Join(err, t.close())
	}
	after, err := pins(bpfprog.Root)
	if err != nil {
		return nil, errors.Join(err, t.close())
	}
	var made []string
	for path := range after {
		if !before[path] {
			made = append(made, path)
		}
	}
	if err := t.addPins(made); err != nil {
		return nil, errors.Join(err, t.close())
	}
	t.assured = func() (n int, err error) {
		err = group.Flows(func(e bpfprog.FlowEntry) bool {
			if e.Assured {
				n++
			}
			return true
		})
		return n, err
	}
	generation := 0
	t.advance = func(n int) error {
		bank := generation % control.Banks
		generation++
		c := service.Control()
		c.Assign(bank, uint64(generation), control.Prepared)
		if err := group.SetBank(0, bank, uint64(generation), n); err != nil {
			return err
		}
		for i := range n {
			fd, err := bind(cgroup.Name(), t.port)
			if err != nil {
				return err
			}
			t.sockets = append(t.sockets, fd)
			if err := errors.Join(group.Attach(fd), group.Put(0, bank, i, fd)); err != nil {
				return err
			}
		}
		c.Flip(bank)
		return nil
	}
	return t, nil
}

// udpgrm is the original, run from its own binaries. It has one steering
// program and one set of hooks for all.
type udpgrm struct {
	*room
	cgroup *os.File
	daemon *exec.Cmd
	log    *os.File
	system
}

// The socket options that udpgrm and grm share.
const (
	optWorkingGen = 200
	optSocketGen  = 201
	optDissector  = 202
)

// startUdpgrm runs dir's daemon in a cgroup of its own until ctx is done.
func startUdpgrm(ctx context.Context, r *room, dir string) (*udpgrm, error) {
	cgroup, err := r.newCgroup("udpgrm")
	if err != nil {
		return nil, err
	}
	u := &udpgrm{room: r, cgroup: cgroup}
	u.daemon = exec.CommandContext(ctx, filepath.Join(dir, "udpgrm"), "--daemon", "--install="+cgroup.Name())
	log, err := os.CreateTemp("", "grm-bench-udpgrm-")
	if err != nil {
		return nil, err
	}
	u.log = log
	u.daemon.Stdout, u.daemon.Stderr = log, log
	u.daemon.Cancel = func() error { return u.daemon.Process.Signal(unix.SIGTERM) }
	u.daemon.WaitDelay = 5 * time.Second
	if err := u.daemon.Start(); err != nil {
		return nil, fmt.Errorf("udpgrm: %w", err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if u.installed() {
			break
		}
		if time.Now().After(deadline) {
			return nil, u.complain(errors.New("its hooks did not come"))
		}
	}
	own, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", u.daemon.Process.Pid))
	if err != nil {
		return nil, err
	}
	for _, path := range own {
		if err := u.add(object(path)); err != nil {
			return nil, err
		}
	}
	memory := u.memory
	// Its links are only pinned; their programs are counted already.
	links, err := filepath.Glob("/sys/fs/bpf/udpgrm/*_udp4_sendmsg")
	if err != nil {
		return nil, err
	}
	if err := u.addPins(links); err != nil {
		return nil, err
	}
	u.memory = memory
	if len(u.rx) != 1 || len(u.tx) != 1 {
		return nil, fmt.Errorf("udpgrm: found %d steering programs and %d sendmsg hooks, want one each", len(u.rx), len(u.tx))
	}
	return u, nil
}

// complain adds the end of what the daemon wrote to an error.
func (u *udpgrm) complain(err error) error {
	text, _ := os.ReadFile(u.log.Name()) // without it the error has to do
	return fmt.Errorf("udpgrm: %w; its log ends with: %s", err, text[max(0, len(text)-400):])
}

// stop ends the daemon, which takes its pins along.
func (u *udpgrm) stop() error {
	err := u.daemon.Process.Signal(unix.SIGTERM)
	_ = u.daemon.Wait() // it was told to end, how does not matter
	return errors.Join(err, u.system.close(), u.log.Close(), os.Remove(u.log.Name()))
}

// installed asks a socket in the cgroup for udpgrm's options.
func (u *udpgrm) installed() bool {
	if err := join(u.cgroup.Name()); err != nil {
		return false
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	_, err = unix.GetsockoptInt(fd, unix.IPPROTO_UDP, optWorkingGen)
	return err == nil
}

func (u *udpgrm) target(o options) (*target, error) {
	t := &target{port: u.nextPort(), system: u.system}
	t.close = func() error { return closeAll(t.sockets) } // what it has loaded stays: it serves all targets
	generation := 0
	t.advance = func(n int) error {
		for range n {
			fd, err := bind(u.cgroup.Name(), t.port)
			if err != nil {
				return err
			}
			t.sockets = append(t.sockets, fd)
			if len(t.sockets) == 1 {
				if err := unix.SetsockoptString(fd, unix.IPPROTO_UDP, optDissector, udpgrmDissector(o.kind)); err != nil {
					return fmt.Errorf("udpgrm's dissector: %w", err)
				}
			}
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, optSocketGen, generation); err != nil {
				return fmt.Errorf("udpgrm's socket generation: %w", err)
			}
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
				if _, index, err := cookie(fd); err == nil && index != 1<<32-1 {
					break
				} else if time.Now().After(deadline) {
					return u.complain(errors.Join(errors.New("a socket was not registered"), err))
				}
			}
		}
		if err := unix.SetsockoptInt(t.sockets[len(t.sockets)-1], unix.IPPROTO_UDP, optWorkingGen, generation); err != nil {
			return fmt.Errorf("udpgrm's working generation: %w", err)
		}
		generation++
		return nil
	}
	return t, nil
}

// udpgrmDissector is the value of udpgrm's dissector option: type, timeout,
// apps, digest, label, number of instructions, instructions.
func udpgrmDissector(k kind) string {
	number := map[kind]uint32{flow: 0, cbpf2: 1, cbpf20: 1, noop: 4}[k]
	b := binary.NativeEndian.AppendUint32(nil, number)
	b = binary.NativeEndian.AppendUint32(b, 124)
	b = append(b, make([]byte, 8+100)...)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(k.program())))
	for _, op := range k.program() {
		b = binary.NativeEndian.AppendUint16(b, op.Op)
		b = append(b, op.JT, op.JF)
		b = binary.NativeEndian.AppendUint32(b, op.K)
	}
	return string(append(b, make([]byte, 632-len(b))...))
}

// cookie reads a socket's cookie and index in its generation, which grm and
// udpgrm answer alike.
func cookie(fd int) (cookie uint16, index uint32, err error) {
	var value [12]byte
	size := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_UDP, optSocketGen,
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, 0, fmt.Errorf("socket's generation option: %w", errno)
	}
	return binary.NativeEndian.Uint16(value[8:]), binary.NativeEndian.Uint32(value[4:]), nil
}

func (t *target) cookies() ([]uint16, error) {
	var all []uint16
	for _, fd := range t.sockets {
		c, _, err := cookie(fd)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

func dissector(o options) bpfprog.Dissector {
	d := bpfprog.Dissector{Kind: bpfprog.Noop}
	switch o.kind {
	case flow:
		d.Kind = bpfprog.Flow
	case cbpf2, cbpf20:
		d.Kind, d.Program = bpfprog.CBPF, o.program()
	}
	if d.Kind != bpfprog.Noop {
		d.Timeout, d.Flows = time.Hour, uint32(o.flows) // nothing is to expire while a big table is filled
	}
	return d
}
