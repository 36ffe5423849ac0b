package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The little of bpf(2) that a benchmark needs: the programs that grm's are
// compared with, which are a few instructions each, and the counters of any
// program. What is measured itself comes from package bpfprog.

func bpf(command int, attr []byte) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// pointer is the address of b for the kernel. It is good until pins.Unpin.
func pointer(pins *runtime.Pinner, b []byte) uint64 {
	pins.Pin(&b[0])
	return uint64(uintptr(unsafe.Pointer(&b[0])))
}

// enableStats makes the kernel time every program until the descriptor is closed.
func enableStats() (int, error) {
	attr := make([]byte, 4) // BPF_STATS_RUN_TIME
	fd, err := bpf(unix.BPF_ENABLE_STATS, attr)
	if err != nil {
		return -1, fmt.Errorf("bpf: enable statistics: %w", err)
	}
	return fd, nil
}

type instruction struct {
	code     uint8
	dst, src uint8
	off      int16
	imm      int32
}

// loadProgram loads instructions as a program of the type and attach type.
func loadProgram(kind, attach uint32, program []instruction) (int, error) {
	var code []byte
	for _, i := range program {
		code = append(code, i.code, i.dst|i.src<<4)
		code = binary.NativeEndian.AppendUint16(code, uint16(i.off))
		code = binary.NativeEndian.AppendUint32(code, uint32(i.imm))
	}
	var keep runtime.Pinner
	defer keep.Unpin()
	license, log := []byte("GPL\x00"), make([]byte, 1<<16)
	attr := make([]byte, 72)
	binary.NativeEndian.PutUint32(attr[0:], kind)
	binary.NativeEndian.PutUint32(attr[4:], uint32(len(program)))
	binary.NativeEndian.PutUint64(attr[8:], pointer(&keep, code))
	binary.NativeEndian.PutUint64(attr[16:], pointer(&keep, license))
	binary.NativeEndian.PutUint32(attr[24:], 1)
	binary.NativeEndian.PutUint32(attr[28:], uint32(len(log)))
	binary.NativeEndian.PutUint64(attr[32:], pointer(&keep, log))
	binary.NativeEndian.PutUint32(attr[68:], attach)
	fd, err := bpf(unix.BPF_PROG_LOAD, attr)
	if err != nil {
		return -1, fmt.Errorf("bpf: load program of type %d: %w: %s", kind, err, strings.TrimRight(string(log), "\x00"))
	}
	return fd, nil
}

var (
	returnOne = []instruction{{code: 0xb7, imm: 1}, {code: 0x95}} // r0 = 1; exit

	// selectFirst selects the socket in a map's first place: the least that a
	// steering program can do. The map goes into the first instruction.
	selectFirst = []instruction{
		{code: 0x18, dst: 2, src: unix.BPF_PSEUDO_MAP_FD}, // r2 = map, two instructions
		{},
		{code: 0x62, dst: 10, off: -4, imm: 0}, // key = 0
		{code: 0xbf, dst: 3, src: 10},          //
		{code: 0x07, dst: 3, imm: -4},          // r3 = &key
		{code: 0xb7, dst: 4, imm: 0},           // no flags
		{code: 0x85, imm: 82},                  // bpf_sk_select_reuseport
		{code: 0xb7, imm: 1},                   // pass
		{code: 0x95},
	}

	// lookUp asks a plain map for the packet's source: what any flow table
	// costs at least, cache misses included. The map's descriptor goes into
	// the instruction mapOperand.
	lookUp = []instruction{
		{code: 0xbf, dst: 6, src: 1},                      // r6 = context
		{code: 0x7a, dst: 10, off: -8, imm: 0},            // key = 0
		{code: 0xb7, dst: 2, imm: 12},                     // offset of the source address
		{code: 0xbf, dst: 3, src: 10},                     //
		{code: 0x07, dst: 3, imm: -8},                     // into the key
		{code: 0xb7, dst: 4, imm: 4},                      // four bytes
		{code: 0xb7, dst: 5, imm: 1},                      // from the network header
		{code: 0x85, imm: 68},                             // bpf_skb_load_bytes_relative
		{code: 0x79, dst: 2, src: 6, off: 0},              // r2 = data
		{code: 0x79, dst: 3, src: 6, off: 8},              // r3 = data_end
		{code: 0xbf, dst: 4, src: 2},                      //
		{code: 0x07, dst: 4, imm: 8},                      //
		{code: 0x2d, dst: 4, src: 3, off: 7},              // no UDP header: out
		{code: 0x69, dst: 5, src: 2, off: 0},              // source port
		{code: 0x6b, dst: 10, src: 5, off: -4},            //
		{code: 0x18, dst: 1, src: unix.BPF_PSEUDO_MAP_FD}, // r1 = map, two instructions
		{},
		{code: 0xbf, dst: 2, src: 10}, //
		{code: 0x07, dst: 2, imm: -8}, //
		{code: 0x85, imm: 1},          // bpf_map_lookup_elem
		{code: 0xb7, imm: 1},          // pass
		{code: 0x95},
	}
)

const mapOperand = 15

func loadEmptyReuseport(int) (int, error) {
	return loadProgram(unix.BPF_PROG_TYPE_SK_REUSEPORT, unix.BPF_SK_REUSEPORT_SELECT, returnOne)
}

// createMap creates a map without anything special about it.
func createMap(kind, key, value, entries uint32) (int, error) {
	attr := make([]byte, 20)
	for i, v := range []uint32{kind, key, value, entries} {
		binary.NativeEndian.PutUint32(attr[4*i:], v)
	}
	fd, err := bpf(unix.BPF_MAP_CREATE, attr)
	if err != nil {
		return -1, fmt.Errorf("bpf: create map of type %d with %d entries: %w", kind, entries, err)
	}
	return fd, nil
}

// store puts values under keys.
func store(table int, entries func(yield func(key, value []byte) bool)) error {
	for key, value := range entries {
		var keep runtime.Pinner
		update := make([]byte, 32)
		binary.NativeEndian.PutUint32(update[0:], uint32(table))
		binary.NativeEndian.PutUint64(update[8:], pointer(&keep, key))
		binary.NativeEndian.PutUint64(update[16:], pointer(&keep, value))
		_, err := bpf(unix.BPF_MAP_UPDATE_ELEM, update)
		keep.Unpin()
		if err != nil {
			return fmt.Errorf("bpf: fill map: %w", err)
		}
	}
	return nil
}

// loadSelect loads the program that selects the given socket.
func loadSelect(socket int) (int, error) {
	table, err := createMap(unix.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, 4, 8, 1)
	if err != nil {
		return -1, err
	}
	defer unix.Close(table) // the program keeps it
	err = store(table, func(yield func(key, value []byte) bool) {
		yield(make([]byte, 4), binary.NativeEndian.AppendUint64(nil, uint64(socket)))
	})
	if err != nil {
		return -1, err
	}
	program := append([]instruction(nil), selectFirst...)
	program[0].imm = int32(table)
	return loadProgram(unix.BPF_PROG_TYPE_SK_REUSEPORT, unix.BPF_SK_REUSEPORT_SELECT, program)
}

// loadLookUp loads the program that asks an LRU map with the clients in it.
func loadLookUp(clients []client) (int, error) {
	table, err := createMap(unix.BPF_MAP_TYPE_LRU_HASH, 8, 16, uint32(2*len(clients))) // none is to be evicted
	if err != nil {
		return -1, err
	}
	defer unix.Close(table) // the program keeps it
	err = store(table, func(yield func(key, value []byte) bool) {
		key, value := make([]byte, 8), make([]byte, 16)
		for _, c := range clients {
			binary.NativeEndian.PutUint64(key, c.key())
			if !yield(key, value) {
				return
			}
		}
	})
	if err != nil {
		return -1, err
	}
	program := append([]instruction(nil), lookUp...)
	program[mapOperand].imm = int32(table)
	return loadProgram(unix.BPF_PROG_TYPE_SK_REUSEPORT, unix.BPF_SK_REUSEPORT_SELECT, program)
}

// attachEmptySendmsg puts an empty sendmsg hook for IPv4 on a cgroup. The hook
// goes with the link, the second descriptor.
func attachEmptySendmsg(cgroup *os.File) (program, link int, err error) {
	program, err = loadProgram(unix.BPF_PROG_TYPE_CGROUP_SOCK_ADDR, unix.BPF_CGROUP_UDP4_SENDMSG, returnOne)
	if err != nil {
		return -1, -1, err
	}
	attr := make([]byte, 16)
	binary.NativeEndian.PutUint32(attr[0:], uint32(program))
	binary.NativeEndian.PutUint32(attr[4:], uint32(cgroup.Fd()))
	binary.NativeEndian.PutUint32(attr[8:], unix.BPF_CGROUP_UDP4_SENDMSG)
	link, err = bpf(unix.BPF_LINK_CREATE, attr)
	if err != nil {
		return -1, -1, fmt.Errorf("bpf: attach an empty sendmsg hook: %w", err)
	}
	return program, link, nil
}

// object is a BPF program, map or link, as /proc/PID/fdinfo tells of it. It is
// read anew each time.
type object string

func ownObject(fd int) object { return object(fmt.Sprintf("/proc/self/fdinfo/%d", fd)) }

// fields reads the lines "name: number".
func (o object) fields() (map[string]uint64, error) {
	f, err := os.Open(string(o))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fields := map[string]uint64{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if n, err := strconv.ParseUint(strings.TrimSpace(value), 0, 64); err == nil {
			fields[name] = n
		}
	}
	return fields, lines.Err()
}

// runs is how often a program ran, and for how long in total.
type runs struct{ count, ns uint64 }

func (o object) runs() (runs, error) {
	fields, err := o.fields()
	return runs{fields["run_cnt"], fields["run_time_ns"]}, err
}

func totalRuns(programs []object) (total runs, err error) {
	for _, p := range programs {
		r, err := p.runs()
		if err != nil {
			return total, err
		}
		total.count += r.count
		total.ns += r.ns
	}
	return total, nil
}

// pins are the paths of all objects pinned below root.
func pins(root string) (map[string]bool, error) {
	found := map[string]bool{}
	err := filepath.WalkDir(root, func(p string, entry fs.DirEntry, err error) error {
		// maps.debug and progs.debug are the file system's own.
		if err == nil && !entry.IsDir() && entry.Type() != fs.ModeSymlink && !strings.HasSuffix(p, ".debug") {
			found[p] = true
		}
		return err
	})
	return found, err
}

// openPin opens the object at a path.
func openPin(path string) (int, error) {
	var keep runtime.Pinner
	defer keep.Unpin()
	name := append([]byte(path), 0)
	attr := make([]byte, 16)
	binary.NativeEndian.PutUint64(attr, pointer(&keep, name))
	fd, err := bpf(unix.BPF_OBJ_GET, attr)
	if err != nil {
		return -1, fmt.Errorf("bpf: open pin %s: %w", path, err)
	}
	return fd, nil
}

// openProgram opens the program with the number.
func openProgram(id uint64) (int, error) {
	attr := make([]byte, 12)
	binary.NativeEndian.PutUint32(attr, uint32(id))
	fd, err := bpf(unix.BPF_PROG_GET_FD_BY_ID, attr)
	if err != nil {
		return -1, fmt.Errorf("bpf: open program %d: %w", id, err)
	}
	return fd, nil
}

// system is what one system under test has loaded into the kernel.
type system struct {
	rx, tx []object // steering programs, sendmsg hooks for IPv4
	memory uint64   // bytes that the kernel accounts to its maps and programs
	open   []int    // descriptors of ours, without which objects cannot be read
}

// addPins adds what is pinned at the paths.
func (s *system) addPins(paths []string) error {
	for _, path := range paths {
		fd, err := openPin(path)
		if err != nil {
			return err
		}
		s.open = append(s.open, fd)
		if err := s.add(ownObject(fd)); err != nil {
			return err
		}
	}
	return nil
}

// add sorts an object into s. A link stands for its program.
func (s *system) add(o object) error {
	fields, err := o.fields()
	if err != nil {
		return err
	}
	s.memory += fields["memlock"]
	kind, isProgram := fields["prog_type"]
	attach, isLink := fields["attach_type"]
	switch {
	case isLink:
		fd, err := openProgram(fields["prog_id"])
		if err != nil {
			return err
		}
		s.open = append(s.open, fd)
		o = ownObject(fd)
		if fields, err = o.fields(); err != nil {
			return err
		}
		s.memory += fields["memlock"]
		if attach == unix.BPF_CGROUP_UDP4_SENDMSG {
			s.tx = append(s.tx, o)
		}
	case isProgram && kind == unix.BPF_PROG_TYPE_SK_REUSEPORT:
		s.rx = append(s.rx, o)
	}
	return nil
}

func (s *system) close() error { return closeAll(s.open) }
