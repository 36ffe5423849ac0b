package activate

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/systemd"
	"grm/internal/testenv"
)

// The service's user writes whatever it likes into the control map: no process
// outside of the unit's cgroup is touched, nothing panics, and a stop leaves nothing.
func TestForgedControlMap(t *testing.T) {
	f := newFixture(t, "echo", "udp://127.0.0.1:5201")
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	f.mustStart()
	f.serve(0)
	svc := f.service()
	mem, err := unix.Mmap(svc.ControlFD(), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(mem)

	bystanders := []*process{f.spawn(keeperComm), f.spawn("bystander")}
	for _, p := range bystanders {
		must(t, os.WriteFile(cgroupRoot+"/cgroup.procs", []byte(strconv.Itoa(p.pid())), 0))
	}
	for round := range testenv.Scale(40) {
		// All but magic, layout and epoch, without which it is no control map.
		for at := 16; at < len(mem); at += 8 {
			var word uint64
			switch random.IntN(4) {
			case 0:
				word = random.Uint64()
			case 1:
				word = uint64(random.IntN(32))
			case 2:
				word = uint64(control.Now())
			case 3: // in the place of a bank's keeper and server, or state and keeper
				pid := bystanders[random.IntN(len(bystanders))].pid()
				word = uint64(pid)<<32 | uint64(pid)
			}
			binary.NativeEndian.PutUint64(mem[at:], word)
		}
		f.nextRun()
		f.setUnit(func(u *systemd.Unit) { u.Restarts = uint32(round % 2) })
		if err := f.start(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if random.IntN(2) == 0 {
			f.stopPost("start", "exit-code", "exited", "1")
		}
		for _, p := range bystanders {
			if p.ended() {
				t.Fatalf("round %d: a process of somebody else's was ended", round)
			}
		}
		if random.IntN(4) == 0 {
			must(t, os.RemoveAll("/run/grm"))
		}
	}
	f.stopPost("stop", "success", "exited", "0")
	for _, p := range bystanders {
		if p.ended() {
			t.Error("a process of somebody else's was ended")
		}
	}
	if names := f.names(); slices.ContainsFunc(names, func(s string) bool { return !strings.HasPrefix(s, "grm.") }) {
		t.Errorf("stored: %v", names)
	}
	if _, err := os.Stat(path(t, "services", "echo")); !os.IsNotExist(err) {
		t.Errorf("pins after the stop: %v", err)
	}
}
