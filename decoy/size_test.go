//go:build !race

package decoy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
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
	decoy, keeper := kB(r.cmd.Process.Pid), kB(m.bankOf(1).Keeper)
	t.Logf("resident: decoy %d kB, keeper %d kB", decoy, keeper)
	if decoy > 4<<10 {
		t.Errorf("the decoy has %d kB resident, more than 4 MiB", decoy)
	}
	if keeper > 6<<10 {
		t.Errorf("the keeper has %d kB resident, more than 6 MiB", keeper)
	}
}
