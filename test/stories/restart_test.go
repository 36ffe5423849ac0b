package stories

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"grm/test/box"
	"grm/test/load"
)

func TestFiftyRestarts(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("0s")...)
	echo.start()
	// Flows of two seconds: an instance drains while some ten restarts go by, and no two of them are alike.
	g := echo.load(func(o *load.Options) { o.Length = 40 })
	seen := map[string]bool{echo.instance(): true}
	for range 50 {
		echo.restart()
		now := echo.instance()
		if seen[now] {
			t.Fatalf("instance %s again", now)
		}
		seen[now] = true
		g.newFlowsAt(now, 5)
		s.must(s.Wait("there is room for one more", func() (bool, error) {
			procs, err := echo.Processes()
			return len(procs.Servers) < 24, err
		}))
	}
	r := g.end()
	if len(r.Instances) != 51 {
		t.Errorf("51 instances should have answered: %v", r)
	}
	for name, in := range r.Instances {
		if !seen[name] || in.Flows == 0 {
			t.Errorf("instance %s: %+v", name, in)
		}
	}
	echo.drained()
	echo.stores(4)
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestNewFlowsGoToTheNewInstance restarts with several sockets and watches where flows begin: once restart has returned, nowhere but at the
// new instance. The unit runs grm-activate by way of a shell: systemd must know all sockets before it can lose sight of who sent them.
func TestNewFlowsGoToTheNewInstance(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", `address = "udp://0.0.0.0:5201"`, "address = \"udp://0.0.0.0:5201\"\nsockets = 4")
	unit := "/etc/systemd/system/" + echo.Unit
	text, err := s.ReadFile(unit)
	s.must(err)
	const direct, wrapped = "ExecStartPre=+", `ExecStartPre=+/bin/sh -c '"$$@"; exit $$?' - `
	if !strings.Contains(text, direct) {
		t.Fatalf("no %s in\n%s", direct, text)
	}
	s.must(s.WriteFile(unit, strings.ReplaceAll(text, direct, wrapped), 0o644))
	s.systemctl("daemon-reload")
	echo.start()
	g := echo.load(func(o *load.Options) { o.Length = 20 })
	for range 3 {
		old := echo.instance()
		echo.restart()
		g.more(400) // a flow whose first datagram was sent before the flip may get its first answer after it
		before := g.Snapshot()
		g.newFlowsAt(echo.instance(), 400)
		if began := g.Snapshot().Instances[old].Flows - before.Instances[old].Flows; began > 2 {
			t.Errorf("%d flows began at the old instance %s after the restart", began, old)
		}
	}
	g.end()
}

func TestLongFlowsStay(t *testing.T) {
	s := newStory(t)
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load(forever)
	first := echo.instance()
	// What an instance keeps in its /tmp and in /run is there as long as it drains.
	var own []string
	for _, dir := range []string{"/tmp", "/run/echo"} {
		own = append(own, fmt.Sprintf("/proc/%d/root%s/own", echo.server().Pid, dir))
	}
	for _, name := range own {
		s.must(os.WriteFile(name, nil, 0o644))
	}
	for range 3 {
		echo.restart()
		g.more(8000)
	}
	echo.statusHas("gen 4 serving since", "gen 1 draining, 200 flows, ")
	if n := len(echo.processes().Servers); n < 2 {
		t.Errorf("%d servers: the first one must live as long as its flows do", n)
	}
	for _, name := range own {
		if _, err := os.Stat(name); err != nil {
			t.Errorf("the first server has lost a file: %v", err)
		}
	}
	r := g.end()
	if r.Instances[first].Answers != r.Answered || r.Flows != 200 {
		t.Errorf("all flows began at %s and live: %v", first, r)
	}
	echo.drained()
	echo.statusHas("gen 4 serving")
}

func TestAddressFamilies(t *testing.T) {
	for name, c := range map[string][]string{
		"IPv4":          nil,
		"IPv6":          {"udp://0.0.0.0:5201", "udp://[::]:5201"},
		"dual-stack":    {`address = "udp://0.0.0.0:5201"`, "address = \"udp://[::]:5201\"\ndual_stack = true"},
		"one address":   {"udp://0.0.0.0:5201", "udp://127.0.0.1:5201"},
		"two sockets":   {`address = "udp://0.0.0.0:5201"`, "address = \"udp://[::]:5201\"\nsockets = 2"},
		"256 sockets":   {`address = "udp://0.0.0.0:5201"`, "address = \"udp://0.0.0.0:5201\"\nsockets = 256"},
		"IPv4 and IPv6": {"[[listen]]\n", "[[listen]]\nname = \"six\"\naddress = \"udp://[::]:5201\"\n[[listen]]\nname = \"four\"\n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(t)
			echo := s.install("echo", append(quickly("1s"), c...)...)
			echo.start()
			g := echo.load()
			for range 5 {
				echo.restart()
				g.newFlowsAt(echo.instance(), 100)
			}
			r := g.end()
			if len(r.Instances) != 6 {
				t.Error(r)
			}
		})
	}
}

func TestTwoServicesTwoUsers(t *testing.T) {
	s := newStory(t)
	one := s.install("echo", quickly("1s")...)
	two := s.install("echo", append(quickly("1s"), `name = "echo"`, `name = "other"`, "grm-echo", "grm-other", "5201", "5301")...)
	one.start()
	two.start()
	if one.User == two.User {
		t.Fatal("both have one user")
	}
	slower := func(o *load.Options) { o.Pace = 100 * time.Millisecond }
	g, h := one.load(slower), two.load(slower)
	for range 5 {
		other := two.instance()
		one.restart()
		g.newFlowsAt(one.instance(), 50)
		if two.instance() != other {
			t.Error("a restart of one service restarted the other")
		}
		two.restart()
		h.newFlowsAt(two.instance(), 50)
	}
	// And both at a time.
	if _, err := s.Systemctl("restart", one.Unit, two.Unit); err != nil {
		t.Error(err)
	}
	g.newFlowsAt(one.instance(), 50)
	h.newFlowsAt(two.instance(), 50)
	g.end()
	h.end()
	s.must(one.Stop())
	one.active("inactive")
	two.active("active")
	h = two.load()
	h.more(2000)
	h.end()
	s.must(two.Stop())
	s.nothingLeft(one, two)
}

// TestFirstMove takes a service that runs without grm over. Its server binds for itself, so that this one restart loses what any other did;
// from then on none does.
func TestFirstMove(t *testing.T) {
	s := newStory(t)
	toml := example(t, "echo", quickly("1s")...)
	plain, err := s.InstallPlain(toml, "-listen", "0.0.0.0:5201")
	s.must(err)
	s.must(plain.Start())
	main, err := s.Property(plain.Unit, "MainPID")
	s.must(err)
	if _, err := s.Install(toml); err == nil {
		t.Error("grm-unitgen overwrote a unit that it did not make")
	}
	g := (&service{plain, s}).load()
	if _, err := s.Exec("rm", "/etc/systemd/system/"+plain.Unit); err != nil {
		t.Fatal(err)
	}
	echo := s.installText(toml)
	g.Mark("move")
	g.Gone(main)
	echo.restart()
	g.newFlowsAt(echo.instance(), 50)
	if procs := echo.processes(); procs.Decoy == nil || len(procs.Servers) != 1 || len(procs.Others) != 0 {
		t.Errorf("processes after the move: %+v", procs)
	}
	g.Mark("moved")
	for range 5 {
		echo.restart()
		g.newFlowsAt(echo.instance(), 50)
	}
	r := g.stop()
	if w, _ := r.Window("moved"); w.Lost+w.Moved+w.Duplicated != 0 || r.Moved != 0 {
		t.Errorf("after the first move: %v", r)
	}
}

// TestUpgrade replaces grm between two restarts by another build of it.
func TestUpgrade(t *testing.T) {
	if bin == "" {
		t.Skip("needs root")
	}
	mine := t.TempDir()
	s := newStoryWith(t, mine, box.Options{Journal: true, Timeout: patience})
	s.must(copyDir(bin, mine))
	echo := s.install("echo", quickly("1s")...)
	echo.start()
	g := echo.load(forever)
	echo.restart()
	g.more(4000)
	s.must(otherBuild(t.Context(), mine))
	for range 3 {
		echo.restart()
		g.more(4000)
	}
	g.end()
	echo.drained()
	s.must(echo.Stop())
	s.nothingLeft(echo)
}

// TestServersOfAllKinds restarts each example three times.
func TestServersOfAllKinds(t *testing.T) {
	for name, c := range map[string]struct {
		protocol load.Protocol
		length   int
	}{
		"echo":        {load.Echo{}, 100},
		"echo-python": {load.Echo{}, 100},
		"established": {load.Echo{}, 100},
		"dns":         {load.DNS{}, 1},
		"unbound":     {load.DNS{}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(t)
			v := s.install(name, quickly("1s")...)
			v.start()
			g := v.load(func(o *load.Options) {
				o.Protocol, o.Length, o.Pace = c.protocol, c.length, 100*time.Millisecond
			})
			for i := range 3 {
				g.Mark("restart " + strconv.Itoa(i))
				v.restart()
				if name == "unbound" { // it does not tell who it is
					g.more(2000)
				} else {
					g.newFlowsAt(v.instance(), 20)
				}
			}
			r := g.stop()
			if name == "established" && r.Lost <= s.refused() {
				r.Lost = 0 // the kernel's, as the example says
			}
			if err := r.Err(); err != nil {
				s.counters()
				s.Error(err)
			}
		})
	}
}
