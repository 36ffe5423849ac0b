package rig

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"grm/config"
	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
)

func TestExample(t *testing.T) {
	text, err := Example("echo", "udp://0.0.0.0:5201", "udp://[::1]:5201")
	if err != nil || !strings.Contains(text, `address = "udp://[::1]:5201"`) {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := Example("echo", "what is not there", "x"); err == nil {
		t.Error("a change of nothing is no error")
	}
	if _, err := Example("none"); err == nil {
		t.Error("no example, but no error")
	}
}

// TestPlain runs the harness without grm: a service that binds for itself answers everything, as long as it is not restarted.
// When it is, the load notices that its flows have moved.
func TestPlain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	bin := t.TempDir()
	if err := install.Build(t.Context(), bin+"/examples", "./examples/echo"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := New(t.Context(), bin, box.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	}()
	toml, err := Example("echo")
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.InstallPlain(toml, "-listen", "0.0.0.0:5201")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	g, err := s.Load(context.Background(), load.Options{Flows: 20, Length: 1_000_000})
	if err != nil {
		t.Fatal(err)
	}
	before := g.Snapshot()
	if before.Lost+before.Moved+before.Strange != 0 || len(before.Instances) != 1 {
		t.Error(before)
	}
	took, err := s.Restart()
	if err != nil || took <= 0 || took > time.Minute {
		t.Errorf("took %v, %v", took, err)
	}
	if err := g.Until("all flows have moved", time.Minute, func(r load.Result) bool { return r.Moved == 20 }); err != nil {
		t.Error(err)
	}
	if r, err := g.Stop(); err != nil || len(r.Instances) != 2 {
		t.Errorf("%v, %v", r, err)
	}
	procs, err := s.Processes()
	if err != nil || procs.Decoy != nil || len(procs.Servers) != 1 || procs.Servers[0].Comm != "echo" {
		t.Errorf("processes %+v, %v", procs, err)
	}
	if err := r.InstallUnits(map[string]string{s.Unit + ".d/pre.conf": "[Service]\nExecStartPre=/bin/sleep 0.02\n"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	if took, err := s.Activation(); err != nil || took < 20*time.Millisecond {
		t.Errorf("activation took %v, %v", took, err)
	}
	if err := r.InstallUnits(map[string]string{s.Unit + ".d/pre.conf": "[Service]\nExecStartPre=/bin/sh -c 'echo it is broken >&2; exit 3'\n"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Restart(); err == nil || !strings.Contains(err.Error(), "status=3") {
		t.Errorf("a failed restart: %v", err)
	}
}

func TestWithoutGrm(t *testing.T) {
	s := &Service{Service: &config.Service{Exec: []string{"/bin/server", "-x"}}}
	got := s.withoutGrm("[Service]\nUser=me\nExecStartPre=+/a b\nExecStart=/decoy \\\n    --name echo \\\n    -- /bin/server\nExecStop=+/a\nKillMode=process\nUMask=0077\n", []string{"-listen", "here"})
	if want := "[Service]\nUser=me\nExecStart=/bin/server -x -listen here\nUMask=0077\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
