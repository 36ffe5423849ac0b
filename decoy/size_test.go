//go:build !race

package decoy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"grm/control"
)

// The real binary: the test's own has package testing in it.
func TestResidentMemory(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "grm-decoy")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "grm/cmd/grm-decoy")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := newManager(t, "say=READY=1", "flood=300", "report=said").withControl()
	m.binary, m.args = binary, []string{"--name", "decoytest", "--listen", "echo", "--watch", "0s", "--", self(), "server", "say=READY=1", "flood=300", "report=said"}
	r, _ := m.begun()
	m.report("said")
	m.hears("gen 1 serving")
	kB := func(pid int) (n int) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(text), "VmRSS:")
		if _, err := fmt.Sscan(rest, &n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	var decoy, keeper int
	m.until("decoy within 4 MiB, keeper within 6", func() bool {
		decoy, keeper = kB(r.cmd.Process.Pid), kB(m.bankOf(1).Keeper)
		return decoy <= 4<<10 && keeper <= 6<<10
	})
	// Also later, when all that is rare has been done once.
	for end := control.Now() + 2*look; control.Now() < end; m.serve(10) {
	}
	m.until("still", func() bool {
		decoy, keeper = kB(r.cmd.Process.Pid), kB(m.bankOf(1).Keeper)
		return decoy <= 4<<10 && keeper <= 6<<10
	})
	t.Logf("resident: decoy %d kB, keeper %d kB", decoy, keeper)
}
