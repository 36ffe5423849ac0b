package inspect

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// healthy is a host on which all is well.
func healthy(t *testing.T) host {
	root := t.TempDir()
	for path, text := range map[string]string{
		"/proc/sys/net/core/bpf_jit_enable": "1\n",
		"/proc/sys/net/core/rmem_max":       "33554432\n",
		"/run/systemd/system/x":             "",
	} {
		if err := os.MkdirAll(filepath.Dir(root+path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(root+path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return host{
		root:    root,
		release: func() string { return "6.1.0-49-cloud-amd64" },
		magic: func(path string) (int64, error) {
			if strings.HasSuffix(path, "/bpf") {
				return unix.BPF_FS_MAGIC, nil
			}
			return unix.CGROUP2_SUPER_MAGIC, nil
		},
		systemd: func() (string, error) { return "systemd 252 (252.39-1~deb12u2)", nil },
		caps:    func() (uint64, error) { return 1<<64 - 1, nil },
	}
}

func TestExamine(t *testing.T) {
	for _, f := range healthy(t).examine() {
		if f.Level != Fine || f.Advice != "" {
			t.Errorf("on a healthy host: %+v", f)
		}
	}
	for name, c := range map[string]struct {
		change func(h *host)
		check  string
		level  Level
		found  string
		advice string
	}{
		"old kernel":     {func(h *host) { h.release = func() string { return "5.15.0" } }, "kernel", Bad, "5.15.0", "6.1 or later"},
		"strange kernel": {func(h *host) { h.release = func() string { return "x" } }, "kernel", Bad, "x", "6.1 or later"},
		"no bpffs": {func(h *host) {
			magic := h.magic
			h.magic = func(path string) (int64, error) {
				if strings.HasSuffix(path, "/bpf") {
					return unix.SYSFS_MAGIC, nil
				}
				return magic(path)
			}
		}, "bpffs", Note, "not mounted", "mount -t bpf bpf /sys/fs/bpf"},
		"cgroup v1": {func(h *host) {
			h.magic = func(string) (int64, error) { return unix.TMPFS_MAGIC, nil }
		}, "cgroup v2", Bad, "not cgroup v2", "systemd.unified_cgroup_hierarchy=1"},
		"hybrid cgroups": {func(h *host) {
			magic := h.magic
			h.magic = func(path string) (int64, error) {
				if strings.HasSuffix(path, "/cgroup") {
					return unix.TMPFS_MAGIC, nil
				}
				return magic(path)
			}
		}, "cgroup v2", Fine, "/sys/fs/cgroup/unified", ""},
		"no cgroups":  {func(h *host) { h.magic = func(string) (int64, error) { return 0, unix.ENOENT } }, "cgroup v2", Bad, "not cgroup v2", "systemd.unified_cgroup_hierarchy=1"},
		"old systemd": {func(h *host) { h.systemd = func() (string, error) { return "systemd 247 (x)", nil } }, "systemd", Bad, "247", "252 or later"},
		"no systemd":  {func(h *host) { h.systemd = func() (string, error) { return "", errors.New("not found") } }, "systemd", Bad, "not found", "install systemd"},
		"systemd does not run": {func(h *host) {
			_ = os.RemoveAll(h.root + "/run")
		}, "systemd", Bad, "does not run", "process 1"},
		"no rights": {func(h *host) {
			h.caps = func() (uint64, error) { return 1<<64 - 1 - 1<<unix.CAP_NET_ADMIN - 1<<unix.CAP_SYS_ADMIN, nil }
		}, "capabilities", Bad, "missing CAP_NET_ADMIN, CAP_SYS_ADMIN", "as root"},
		"small rmem": {func(h *host) { _ = os.WriteFile(h.root+"/proc/sys/net/core/rmem_max", []byte("212992\n"), 0o644) }, "rmem_max", Note, "212992", "net.core.rmem_max=16777216"},
		"no jit":     {func(h *host) { _ = os.WriteFile(h.root+"/proc/sys/net/core/bpf_jit_enable", []byte("0\n"), 0o644) }, "bpf jit", Note, "off", "bpf_jit_enable=1"},
		"udpgrm": {func(h *host) {
			_ = os.MkdirAll(h.root+"/sys/fs/bpf/udpgrm/123_hook", 0o755)
		}, "udpgrm", Note, "1 pins", "one at a time"},
	} {
		t.Run(name, func(t *testing.T) {
			h := healthy(t)
			c.change(&h)
			for _, f := range h.examine() {
				if f.Check == c.check {
					if f.Level != c.level || !strings.Contains(f.Found, c.found) || !strings.Contains(f.Advice, c.advice) {
						t.Errorf("%+v, want %s, %q, %q", f, c.level, c.found, c.advice)
					}
					return
				}
			}
			t.Errorf("no finding for %s", c.check)
		})
	}
}

func TestExamineThisHost(t *testing.T) {
	if findings := Examine(); len(findings) != 8 {
		t.Errorf("%d findings: %+v", len(findings), findings)
	}
}
