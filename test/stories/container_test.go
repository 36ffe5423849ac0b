package stories

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"grm/activate"
	"grm/test/box"
	"grm/test/load"
)

// bounded is a command that runs another one as root with no capabilities but those.
func bounded(capabilities ...string) string {
	set := "-all"
	for _, name := range capabilities {
		set += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
	}
	return "/usr/bin/setpriv --inh-caps=-all --bounding-set=" + set
}

// TestListedCapabilities runs all of grm-activate's commands with the capabilities that it asks for, and no other ones: first start, restart,
// crash, stop, for a user of its own, on a port below 1024.
func TestListedCapabilities(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", append(quickly("0s"), "udp://0.0.0.0:5201", "udp://0.0.0.0:201")...)
	command := "=\n%[1]s=+" + bounded(slices.Sorted(maps.Keys(activate.Capabilities))...) + " " + box.BinDir + "/grm-activate "
	dropIn := "[Service]\n"
	for key, arguments := range map[string]string{"ExecStartPre": "echo udp://0.0.0.0:201", "ExecStop": "--stop echo", "ExecStopPost": "--stop-post echo"} {
		dropIn += key + fmt.Sprintf(command, key) + arguments + "\n"
	}
	s.must(s.InstallUnits(map[string]string{echo.Unit + ".d/bounded.conf": dropIn}))
	echo.start()
	g := echo.load()
	for range 2 {
		echo.restart()
		g.newFlowsAt(echo.instance(), 50)
	}
	g.end()
	echo.drained()
	killed := echo.server()
	s.must(killed.Kill(9))
	s.must(s.Wait("another server runs", func() (bool, error) {
		procs, err := echo.Processes()
		return len(procs.Servers) == 1 && procs.Servers[0].BoxPid != killed.BoxPid, err
	}))
	g = echo.load()
	g.more(1000)
	g.end()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestEachCapability has grm-activate lack one of them: it says which, and has done nothing.
func TestEachCapability(t *testing.T) {
	s := newStory(t)
	all := slices.Sorted(maps.Keys(activate.Capabilities))
	for _, missing := range append(all, strings.Join(all, ", ")) {
		rest := slices.DeleteFunc(slices.Clone(all), func(name string) bool { return strings.Contains(missing, name) })
		_, err := s.Exec("/bin/sh", "-c", bounded(rest...)+" "+box.BinDir+"/grm-activate echo udp://127.0.0.1:5201 -- /bin/true")
		says := "grm-activate: echo: missing " + missing + " (run it as root; in a unit write ExecStartPre=+/usr/lib/grm/grm-activate with the plus sign)"
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != activate.StatusUnfit || !strings.HasSuffix(err.Error(), ": "+says) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
	s.untouched()
}

// untouched asserts that grm has left nothing anywhere.
func (s *story) untouched() {
	s.Helper()
	pins, err := s.BPFFS()
	s.must(err)
	files, err := s.Tree("/run/grm")
	s.must(err)
	if len(pins)+len(files) != 0 {
		s.Errorf("there are pins %q and files %q", pins, files)
	}
}

// TestContainer runs a service as containers do: process 1 of a pid namespace becomes the server, there is no systemd, and /run and bpffs
// are its own. Another container beside it, in the same network, has the same name and another address, and knows nothing of the first.
func TestContainer(t *testing.T) {
	s := newStory(t)
	s.must(buildTools())
	capabilities := bounded(slices.Sorted(maps.Keys(activate.Capabilities))...)
	unit := func(port int) string {
		inside := fmt.Sprintf("mount -t tmpfs tmpfs /run && mount -t bpf bpf /sys/fs/bpf && mount -o remount,ro /proc/sys || :; exec %s %s/grm-activate --count 2 --user 65534 echo udp://127.0.0.1:%d -- %s/examples/echo",
			capabilities, box.BinDir, port, box.BinDir)
		return "[Service]\nType=exec\nDelegate=yes\nExecStart=/usr/bin/unshare --mount --pid --fork --mount-proc --ipc --uts --kill-child /bin/sh -c '" + inside + "'\n"
	}
	s.must(s.InstallUnits(map[string]string{"one.service": unit(5201), "two.service": unit(5202)}))
	s.Cleanup(func() {
		if s.Failed() {
			s.dump("one.service")
			s.dump("two.service")
		}
	})
	for i, name := range []string{"one.service", "two.service"} {
		_, err := s.Systemctl("start", name)
		s.must(err)
		s.must(s.Wait("it answers", func() (bool, error) {
			_, err := s.Exec(box.BinDir+"/test/server", "ask", fmt.Sprintf("127.0.0.1:%d", 5201+i))
			return err == nil, nil
		}))
		g, err := load.Start(t.Context(), load.Options{NetNS: s.NetNS(), Flows: 50, Pace: 50 * time.Millisecond, Length: 50, Seed: 1,
			Targets: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", 5201+i))}})
		s.must(err)
		d := &driver{g, s}
		d.more(2000)
		if r := d.end(); len(r.Instances) != 1 || r.Instances["1"].Answers != r.Answered {
			t.Errorf("%s: the server is process 1: %v", name, r)
		}
	}
	s.untouched() // by those in their own mount namespaces
	for _, name := range []string{"one.service", "two.service"} {
		_, err := s.Systemctl("stop", name)
		s.must(err)
	}
	s.must(s.Wait("no program is left", func() (bool, error) {
		procs, err := s.Processes("one.service")
		return len(procs) == 0, err
	}))
}
