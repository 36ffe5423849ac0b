package unitgen

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInstallFails is a disk that fails at the second of three units: nothing has changed, nothing is left behind.
func TestInstallFails(t *testing.T) {
	dir := t.TempDir()
	old := mustRender(t, mustParse(t, ""), Options{SystemdVersion: 252})
	if _, err := Install(dir, []Unit{{"a.service", old}}); err != nil {
		t.Fatal(err)
	}
	next := mustRender(t, mustParse(t, "sockets = 2\n"), Options{SystemdVersion: 252})
	// The longest name that a file can have leaves no room for a temporary one.
	long := strings.Repeat("b", 247) + ".service"
	if _, err := Install(dir, []Unit{{"a.service", next}, {long, next}, {"c.service", next}}); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Errorf("error %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name() != "a.service" {
		t.Errorf("left behind: %v", entries)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "a.service")); err != nil || !slices.Equal(text, old) {
		t.Errorf("the first unit was changed, or is gone: %v", err)
	}
}
