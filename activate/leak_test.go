package activate

import (
	"errors"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of what a group has in the kernel: the names of its maps, and those of programs that go with each group or service.
var (
	ourMaps     = []string{"meta", "slots", "counters", "control", "controls", "flows", "sockets"}
	ourPrograms = []string{"steer_noop", "steer_flow", "send4", "send6", "connect4", "connect6", "set_option", "get_option"}
)

// kernelObjects is how many BPF maps and programs with those names the whole kernel has, held by whatever: bpf(2).
func kernelObjects(t *testing.T) (n struct{ maps, programs int }) {
	t.Helper()
	count := func(next, open, nameAt int, names []string) (n int) {
		for id := uint32(0); ; {
			attr := [3]uint32{id}
			if _, err := callBPF(next, unsafe.Pointer(&attr), unsafe.Sizeof(attr)); errors.Is(err, unix.ENOENT) {
				return n
			} else if err != nil {
				t.Fatal(err)
			}
			id = attr[1]
			fd, err := callBPF(open, unsafe.Pointer(&[3]uint32{id}), 12)
			if errors.Is(err, unix.ENOENT) {
				continue // gone meanwhile
			} else if err != nil {
				t.Fatal(err)
			}
			var info [80]byte // struct bpf_map_info and struct bpf_prog_info, as far as their names
			about := struct {
				fd, size uint32
				info     unsafe.Pointer
			}{uint32(fd), uint32(len(info)), unsafe.Pointer(&info)}
			_, err = callBPF(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&about), unsafe.Sizeof(about))
			if err := errors.Join(err, unix.Close(fd)); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(names, unix.ByteSliceToString(info[nameAt:nameAt+unix.BPF_OBJ_NAME_LEN])) {
				n++
			}
		}
	}
	n.maps = count(unix.BPF_MAP_GET_NEXT_ID, unix.BPF_MAP_GET_FD_BY_ID, 24, ourMaps)
	n.programs = count(unix.BPF_PROG_GET_NEXT_ID, unix.BPF_PROG_GET_FD_BY_ID, 64, ourPrograms)
	return n
}

func callBPF(command int, attr unsafe.Pointer, size uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}
