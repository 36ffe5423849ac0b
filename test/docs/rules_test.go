package docs

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// goCommand is the go command, also where the PATH lacks it.
func goCommand() string {
	if c := os.Getenv("GO"); c != "" {
		return c
	}
	return "go"
}

// packages lists each package of the module with what it imports; with deps,
// with all that is linked into it.
func packages(t *testing.T, what string) map[string][]string {
	t.Helper()
	cmd := exec.Command(goCommand(), "list", "-f", `{{.ImportPath}} {{join .`+what+` " "}}`, "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		all[f[0]] = f[1:]
	}
	return all
}

func under(pkg string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return pkg == d || strings.HasPrefix(pkg, d+"/") })
}

// One package is the door to each large dependency: who reads that one knows
// all that grm asks of the kernel, of systemd and of the TOML library.
func TestOneDoorToEachDependency(t *testing.T) {
	doors := map[string][]string{
		"github.com/cilium/ebpf":                {"grm/bpfprog", "grm/test"},
		"github.com/BurntSushi/toml":            {"grm/config"},
		"github.com/coreos/go-systemd/v22/dbus": {"grm/internal/systemd"},
		"github.com/godbus/dbus":                {"grm/internal/systemd", "grm/test"},
	}
	for pkg, imports := range packages(t, "Imports") {
		for _, i := range imports {
			for dependency, allowed := range doors {
				if under(i, dependency) && !under(pkg, allowed...) {
					t.Errorf("%s imports %s: only %s may", pkg, i, strings.Join(allowed, ", "))
				}
			}
		}
	}
}

// Data flows one way: leaves know nothing of the rooms above them, and what
// runs as root shares no code with what runs as the service's user but leaves.
func TestRoomsDoNotReachIntoEachOther(t *testing.T) {
	rooms := []string{"grm/activate", "grm/decoy", "grm/unitgen", "grm/config", "grm/inspect", "grm/operate"}
	never := map[string][]string{
		"grm/activate": {"grm/decoy", "grm/unitgen"},
		"grm/decoy":    {"grm/activate", "grm/unitgen", "grm/bpfprog"},
		"grm/unitgen":  {"grm/activate", "grm/decoy", "grm/bpfprog"},
		"grm/config":   {"grm/activate", "grm/decoy", "grm/unitgen", "grm/bpfprog"},
		"grm/internal": rooms,
		"grm/control":  rooms,
		"grm/bpfprog":  rooms,
	}
	for pkg, imports := range packages(t, "Imports") {
		for from, to := range never {
			if !under(pkg, from) {
				continue
			}
			for _, i := range imports {
				if under(i, to...) {
					t.Errorf("%s imports %s", pkg, i)
				}
			}
		}
	}
}

// What runs unprivileged beside the server is small, and cannot load programs.
func TestUnprivilegedPartsAreSmall(t *testing.T) {
	deps := packages(t, "Deps")
	for _, pkg := range []string{"grm", "grm/cmd/grm-decoy"} {
		for _, d := range deps[pkg] {
			if under(d, "github.com/cilium/ebpf") {
				t.Errorf("%s is built with %s", pkg, d)
			}
		}
	}
}

// sources gives every file of the repository that we write by hand, with its text.
func sources(t *testing.T, match *regexp.Regexp, yield func(path string, text []byte)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if !d.Type().IsRegular() || !match.MatchString(path) {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(root, path); err == nil {
			path = rel
		}
		yield(path, text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A process ends in main alone, so that whatever was deferred runs; a test
// binary that plays another program ends in its TestMain.
func TestOnlyMainExits(t *testing.T) {
	sources(t, regexp.MustCompile(`\.go$`), func(path string, text []byte) {
		if strings.HasSuffix(path, "_test.go") || filepath.Base(path) == "main.go" || strings.HasPrefix(path, "test/") {
			return
		}
		if bytes.Contains(text, []byte("os.Exit(")) || bytes.Contains(text, []byte("log.Fatal")) {
			t.Errorf("%s ends the process", path)
		}
	})
}

// What is not finished is not here.
func TestNothingIsLeftToDo(t *testing.T) {
	mark := regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX)\b`)
	sources(t, regexp.MustCompile(`\.(go|c|h|md|py|toml|sh|[0-9])$|Makefile$|/tools/`), func(path string, text []byte) {
		if m := mark.Find(text); m != nil {
			t.Errorf("%s has a %s", path, m)
		}
	})
}
