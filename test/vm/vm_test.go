package vm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"grm/internal/testenv"
)

// The packages whose tests depend on what the kernel does, and which of their
// tests. Everything is about a hundred times slower here than on a CPU.
var suites = []struct{ dir, run, skip string }{
	{dir: "bpfprog", run: ".", skip: skip},
	{dir: "bpfprog/cbpf", run: "."},
	{dir: "control", run: "."},
	{dir: "activate", run: "^Test(FirstStart|RestartAndStop|Crash|StandIn|SharedGroup|ManySockets|BPFFSAbsent|Clamped.*)$"},
	{dir: "internal/proc", run: "Cgroup|Holder|SocketInodes"},
}

// skip leaves out what cannot run here (emulated CPUs hardly ever meet, without
// which TestInsertRace proves nothing; veth is a module of these kernels), what
// no kernel has a part in, and repetitions: each group that a test makes takes
// seconds in the newest kernel's verifier.
const skip = `^Test(InsertRace|VethTrains|Mutated|Truncated|Lengths|IPv4Options|AsModel|ToMany)` +
	`|^TestABI(Dissector|FlowAssureTableFull|OfStrangers)$` +
	`|^TestTakeover$/(SO_|interface|device|filter|0\.0\.0\.0|\[::1\])` +
	`|^TestAssurePolicies$/(packet|1_packets)`

// A machine that takes longer hangs. Each binary gets its own, shorter
// deadline, so that Go says what hangs as long as Go can.
const (
	machineDeadline = 11 * time.Minute
	suiteDeadline   = 9 * time.Minute
)

// TestKernels runs other packages' tests as root on the kernels that grm
// supports. It fails if one fails, or is skipped, or if there are none.
func TestKernels(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("takes minutes and downloads kernels: part of the tests that run as root")
	}
	bin := t.TempDir()
	build(t, "build", "-o", filepath.Join(bin, "init"), "grm/test/vm/init")
	machine := Machine{Init: filepath.Join(bin, "init"), Files: map[string]string{}}
	for _, s := range suites {
		binary := path.Base("grm/"+s.dir) + ".test"
		build(t, "test", "-c", "-o", filepath.Join(bin, binary), "grm/"+s.dir)
		machine.Files["tests/"+binary] = filepath.Join(bin, binary)
		home := path.Join("src", s.dir)
		if data := filepath.Join("../..", s.dir, "testdata"); exists(data) {
			machine.Files[path.Join(home, "testdata")] = data
		}
		machine.Commands = append(machine.Commands, Command{
			Args: []string{"/tests/" + binary, "-test.v", "-test.run=" + s.run, "-test.skip=" + s.skip, "-test.timeout=" + suiteDeadline.String()},
			Dir:  "/" + home,
			Env:  []string{testenv.ScaleVariable + "=100"},
		})
	}
	for _, series := range Kernels {
		t.Run(series.Name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), machineDeadline)
			defer cancel()
			image, err := series.Image(ctx)
			if err != nil {
				t.Fatal(err)
			}
			m := machine
			m.Kernel = image.Path
			began := time.Now()
			result, err := m.Run(ctx)
			if err != nil {
				t.Fatalf("kernel %s: %v; its console:\n%s", image.Release, err, result.Console)
			}
			for i, status := range result.Statuses {
				out := result.output(i)
				if complaint := judge(status, out); complaint != "" {
					t.Errorf("kernel %s, %s: %s; its console:\n%s", image.Release, suites[i].dir, complaint, out)
				}
				t.Logf("kernel %s, %s: %d tests", image.Release, suites[i].dir, strings.Count(out, "\n--- PASS"))
			}
			t.Logf("kernel %s: %s", image.Release, time.Since(began).Round(time.Second))
		})
	}
}

// judge says what is wrong with a test binary's run, or nothing.
func judge(status int, out string) string {
	switch {
	case status != 0:
		return fmt.Sprintf("exit status %d", status)
	case strings.Contains("\n"+out, "\n--- SKIP"):
		return "a test was skipped"
	case !strings.Contains("\n"+out, "\n--- PASS"):
		return "no test ran"
	}
	return ""
}

// build runs the go command for a small static program.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", slices.Insert(args, 1, "-trimpath", "-ldflags=-s -w")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestMachine has the outcomes that TestKernels hopes not to see.
func TestMachine(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("downloads a kernel: part of the tests that run as root")
	}
	image, err := Kernels[0].Image(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "init")
	build(t, "build", "-o", bin, "grm/test/vm/init")
	m := Machine{Kernel: image.Path, Init: bin}
	fails := Command{Args: []string{"/init"}, Dir: "/some/where"} // refuses to be anything but process 1
	for _, c := range []struct {
		name     string
		commands []Command
		deadline time.Duration
		statuses []int
		message  string
	}{
		{"status", []Command{fails, fails}, machineDeadline, []int{1, 1}, ""},
		{"no such program", []Command{fails, {Args: []string{"/absent"}, Dir: "/"}, fails}, machineDeadline, []int{1}, "/absent"},
		{"too slow", []Command{fails}, time.Millisecond, nil, "still running"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), c.deadline)
			defer cancel()
			m := m
			m.Commands = c.commands
			result, err := m.Run(ctx)
			if !slices.Equal(result.Statuses, c.statuses) {
				t.Errorf("exit statuses %v, want %v; the console:\n%s", result.Statuses, c.statuses, result.Console)
			}
			if (err == nil) != (c.message == "") || err != nil && !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %q", err, c.message)
			}
		})
	}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		status int
		out    string
		good   bool
	}{
		{0, "=== RUN   TestA\n--- PASS: TestA (0.00s)\nPASS\n", true},
		{1, "--- PASS: TestA (0.00s)\n--- FAIL: TestB (0.00s)\nFAIL\n", false},
		{0, "--- PASS: TestA (0.00s)\n--- SKIP: TestB (0.00s)\nPASS\n", false},
		{0, "testing: warning: no tests to run\nPASS\n", false},
		{137, "", false},
	} {
		if complaint := judge(c.status, c.out); (complaint == "") != c.good {
			t.Errorf("judge(%d, %q) = %q", c.status, c.out, complaint)
		}
	}
}

func TestParse(t *testing.T) {
	r := Result{Console: "boot\nfirst\n" + ExitMark + "0 0\nunfinished" + ExitMark + "1 137\n" + FailMark + "no more\n"}
	statuses, failure := r.parse()
	if !slices.Equal(statuses, []int{0, 137}) || failure != "no more" {
		t.Errorf("parse = %v, %q", statuses, failure)
	}
	if got := r.output(0); got != "boot\nfirst\n" {
		t.Errorf("output(0) = %q", got)
	}
	if got := r.output(1); got != "unfinished" {
		t.Errorf("output(1) = %q", got)
	}
}

func TestNewest(t *testing.T) {
	names := []string{
		"linux-image-6.12.107+deb13-cloud-amd64", "linux-image-6.12.117+deb13-cloud-amd64-dbg",
		"linux-image-6.12.117+deb13-cloud-amd64", "linux-image-6.12.120+deb13-cloud-amd64-unsigned",
		"linux-image-6.1.0-50-cloud-amd64", "linux-image-6.1.0-7-cloud-amd64", "linux-image-7.3.4+deb13-amd64",
		"linux-image-7.2.11+deb13-cloud-amd64", "linux-binary-7.2.11+deb13-cloud-amd64", "linux-image-cloud-amd64",
	}
	for i, want := range []string{
		"linux-image-6.1.0-50-cloud-amd64",
		"linux-image-6.12.117+deb13-cloud-amd64",
		"linux-binary-7.2.11+deb13-cloud-amd64",
	} {
		for range 2 {
			if name, _ := Kernels[i].newest(names); name != want {
				t.Errorf("newest of %s is %s, want %s", Kernels[i].Name, name, want)
			}
			slices.Reverse(names)
		}
	}
}

// TestArchive takes an archive apart again.
func TestArchive(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	if err := os.MkdirAll(filepath.Join(source, "deep/er"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"a": "12345", "deep/er/b": "", "deep/c": strings.Repeat("x", 4097)} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	a := newArchive(&out)
	a.copyTree("tree", source)
	a.copyFile("alone", filepath.Join(source, "a"))
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	entries := read(t, out.Bytes())
	want := map[string]string{
		"tree": "", "tree/deep": "", "tree/deep/er": "", "alone": "12345",
		"tree/a": "12345", "tree/deep/er/b": "", "tree/deep/c": strings.Repeat("x", 4097),
	}
	if len(entries) != len(want) {
		t.Errorf("archive has %d entries, want %d", len(entries), len(want))
	}
	for name, content := range want {
		if got, found := entries[name]; !found || got != content {
			t.Errorf("entry %s: found %v, %d bytes, want %d", name, found, len(got), len(content))
		}
	}
}

// read takes a newc archive apart, by the format's description and not by what
// the writer does.
func read(t *testing.T, b []byte) map[string]string {
	t.Helper()
	entries := map[string]string{}
	for at := 0; ; {
		if at+110 > len(b) || string(b[at:at+6]) != "070701" {
			t.Fatalf("no header at byte %d of %d", at, len(b))
		}
		var field [13]int
		for i := range field {
			if _, err := fmt.Sscanf(string(b[at+6+8*i:at+14+8*i]), "%x", &field[i]); err != nil {
				t.Fatalf("field %d of the header at byte %d: %v", i, at, err)
			}
		}
		name := string(b[at+110 : at+110+field[11]-1])
		body := (at + 110 + field[11] + 3) &^ 3
		if name == "TRAILER!!!" {
			return entries
		}
		if _, again := entries[name]; again {
			t.Errorf("%s is there twice", name)
		}
		if i := strings.LastIndexByte(name, '/'); i >= 0 {
			if _, found := entries[name[:i]]; !found {
				t.Errorf("%s comes before its directory", name)
			}
		}
		entries[name] = string(b[body : body+field[6]])
		at = (body + field[6] + 3) &^ 3
	}
}
