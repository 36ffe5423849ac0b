package inspect

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"grm/activate"
	"grm/internal/proc"
)

// The oldest kernel and systemd that grm works with.
const (
	MinKernel  = "6.1"
	MinSystemd = 252
)

// Level says how much a finding of the doctor matters.
type Level string

const (
	Fine Level = "ok"
	Note Level = "note" // it works, but something is worth knowing
	Bad  Level = "bad"  // services cannot start with this
)

// Finding is what one check of the doctor gave.
type Finding struct {
	Check  string `json:"check"`
	Level  Level  `json:"level"`
	Found  string `json:"found"`
	Advice string `json:"advice,omitempty"` // what to do about it
}

// host is what the doctor looks at; a test has one of its own.
type host struct {
	root    string // stands before each path
	release func() string
	magic   func(path string) (int64, error) // of the file system
	systemd func() (string, error)           // the first line of systemctl --version
	caps    func() (uint64, error)           // effective capabilities
}

// Examine checks whether this host has what grm needs.
func Examine() []Finding {
	h := host{
		release: func() string {
			var u unix.Utsname
			if unix.Uname(&u) != nil {
				return "unknown"
			}
			return unix.ByteSliceToString(u.Release[:])
		},
		magic: func(path string) (int64, error) {
			var st unix.Statfs_t
			err := unix.Statfs(path, &st)
			return int64(st.Type), err
		},
		systemd: func() (string, error) {
			out, err := exec.Command("systemctl", "--version").Output()
			line, _, _ := strings.Cut(string(out), "\n")
			return line, err
		},
		caps: effective,
	}
	return h.examine()
}

func (h host) examine() []Finding {
	return []Finding{h.kernel(), h.jit(), h.bpffs(), h.cgroup(), h.manager(), h.capabilities(), h.rmem(), h.udpgrm()}
}

func (h host) kernel() Finding {
	f := Finding{Check: "kernel", Level: Fine, Found: h.release()}
	if !atLeast(f.Found, MinKernel) {
		f.Level = Bad
		f.Advice = "grm needs Linux " + MinKernel + " or later: boot a newer kernel (Debian 12 has 6.1)"
	}
	return f
}

// atLeast compares the two leading numbers of kernel releases.
func atLeast(release, floor string) bool {
	a, b := leading(release), leading(floor)
	return a[0] > b[0] || (a[0] == b[0] && a[1] >= b[1])
}

func leading(release string) (n [2]int) {
	parts := strings.FieldsFunc(release, func(r rune) bool { return r < '0' || r > '9' })
	for i := range min(2, len(parts)) {
		n[i], _ = strconv.Atoi(parts[i]) // digits only; a number too large is as good as any
	}
	return n
}

func (h host) jit() Finding {
	text, err := h.read("/proc/sys/net/core/bpf_jit_enable")
	switch {
	case err != nil:
		return Finding{"bpf jit", Note, err.Error(), "the kernel lets nobody here see whether BPF programs are compiled; look at net.core.bpf_jit_enable on the host"}
	case text == "0":
		return Finding{"bpf jit", Note, "off", "BPF programs are interpreted, which costs several times as much a packet: sysctl net.core.bpf_jit_enable=1"}
	}
	return Finding{Check: "bpf jit", Level: Fine, Found: "on"}
}

func (h host) bpffs() Finding {
	const path = "/sys/fs/bpf"
	switch magic, err := h.magic(h.root + path); {
	case err != nil:
		return Finding{"bpffs", Bad, err.Error(), "the kernel has no place to mount it: it needs CONFIG_BPF_SYSCALL and a mounted sysfs"}
	case magic != unix.BPF_FS_MAGIC:
		return Finding{"bpffs", Note, path + " is not mounted", "grm-activate mounts it; to do so at once: mount -t bpf bpf " + path}
	}
	return Finding{Check: "bpffs", Level: Fine, Found: path}
}

func (h host) cgroup() Finding {
	for _, path := range proc.CgroupRoots {
		if magic, err := h.magic(h.root + path); err == nil && magic == unix.CGROUP2_SUPER_MAGIC {
			return Finding{Check: "cgroup v2", Level: Fine, Found: path}
		}
	}
	return Finding{"cgroup v2", Bad, proc.CgroupRoots[0] + " is not cgroup v2",
		"grm needs the unified hierarchy there: boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"}
}

func (h host) manager() Finding {
	f := Finding{Check: "systemd", Level: Fine}
	line, err := h.systemd()
	if err != nil {
		f.Level, f.Found = Bad, "systemctl --version: "+err.Error()
		f.Advice = fmt.Sprintf("grm's services are systemd units: install systemd %d or later", MinSystemd)
		return f
	}
	f.Found = line
	if v := systemdVersion(line); v < MinSystemd {
		f.Level = Bad
		f.Advice = fmt.Sprintf("grm needs systemd %d or later", MinSystemd)
	} else if _, err := os.Stat(h.root + "/run/systemd/system"); err != nil {
		f.Level, f.Found = Bad, line+", which does not run"
		f.Advice = "this system (or container) was not booted with systemd: grm's services are units and need it as process 1"
	}
	return f
}

// systemdVersion reads "systemd 252 (252.39-1~deb12u2)"; 0 if it is not that.
func systemdVersion(line string) int {
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "systemd" {
		return 0
	}
	return leading(fields[1])[0]
}

func effective() (uint64, error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if value, ok := bytes.CutPrefix(line, []byte("CapEff:")); ok {
			return strconv.ParseUint(string(bytes.TrimSpace(value)), 16, 64)
		}
	}
	return 0, fmt.Errorf("/proc/self/status has no CapEff line")
}

func (h host) capabilities() Finding {
	const advice = "run grm doctor as root; in a container add the missing capabilities. The server itself needs none"
	caps, err := h.caps()
	if err != nil {
		return Finding{"capabilities", Bad, err.Error(), advice}
	}
	var have, missing []string
	for _, name := range slices.Sorted(maps.Keys(activate.Capabilities)) {
		if caps&(1<<activate.Capabilities[name]) != 0 {
			have = append(have, name)
		} else {
			missing = append(missing, name)
		}
	}
	if missing != nil {
		return Finding{"capabilities", Bad, "missing " + strings.Join(missing, ", "), advice}
	}
	return Finding{Check: "capabilities", Level: Fine, Found: strings.Join(have, ", ")}
}

func (h host) rmem() Finding {
	const wanted = 16 << 20 // the default rcvbuf
	text, err := h.read("/proc/sys/net/core/rmem_max")
	if err != nil {
		return Finding{"rmem_max", Note, err.Error(), ""}
	}
	f := Finding{Check: "rmem_max", Level: Fine, Found: text}
	if n, err := strconv.Atoi(text); err != nil || n < wanted {
		f.Level = Note
		f.Advice = fmt.Sprintf("only matters where grm-activate lacks CAP_NET_ADMIN, which goes beyond it: sysctl net.core.rmem_max=%d", wanted)
	}
	return f
}

// udpgrm's hooks would answer the same socket options.
func (h host) udpgrm() Finding {
	pins, _ := filepath.Glob(h.root + "/sys/fs/bpf/udpgrm/*") // the pattern is well-formed
	if len(pins) == 0 {
		return Finding{Check: "udpgrm", Level: Fine, Found: "not installed"}
	}
	return Finding{"udpgrm", Note, fmt.Sprintf("%d pins in /sys/fs/bpf/udpgrm", len(pins)),
		"services move one at a time (docs/operations.md, Coming from udpgrm); when none is left, stop its daemon and remove its pins"}
}

// read is the text of a file without what is white around it.
func (h host) read(path string) (string, error) {
	text, err := os.ReadFile(h.root + path)
	return strings.TrimSpace(string(text)), err
}
