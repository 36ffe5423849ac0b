package decoy

import (
	"slices"
	"strings"
	"testing"
)

func TestEnvironment(t *testing.T) {
	base := environ{"LISTEN_PID=1", "LISTEN_PIDFDID=2", "LISTEN_PIDX=3", "XLISTEN_PID=4", "LISTEN_FDS=9", "LISTEN_FDNAMES=a:b",
		"WATCHDOG_PID=1", "WATCHDOG_USEC=5", "SYSTEMD_EXEC_PID=1", "NOTIFY_SOCKET=/run/systemd/notify", "EMPTY=", "novalue", bankVar + "=3", verbVar + "=start"}
	was := slices.Clone(base)
	st := stage{mask: 5}
	got := base.forServer(st, []string{"web", "web", "dns"}, "@x").own(77)
	want := environ{"LISTEN_PIDX=3", "XLISTEN_PID=4", "WATCHDOG_USEC=5", "EMPTY=", "novalue", "NOTIFY_SOCKET=@x",
		"LISTEN_FDS=3", "LISTEN_FDNAMES=web:web:dns", "LISTEN_PID=77", "WATCHDOG_PID=77", "SYSTEMD_EXEC_PID=77"}
	if !slices.Equal(got, want) {
		t.Errorf("server gets\n%q, want\n%q", got, want)
	}
	if !slices.Equal(base, was) {
		t.Error("the environment it was made from has changed")
	}
	probe := base.forProbe(st, partReady, 42).own(78)
	for _, key := range []string{"LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_PID", stageVar} {
		if v := probe.get(key); v != "" {
			t.Errorf("probe has %s=%s", key, v)
		}
	}
	if probe.get("MAINPID") != "42" {
		t.Error("probe does not know the server's pid")
	}
}

func TestGodebugRoundTrip(t *testing.T) {
	for _, was := range []string{"", "gctrace=1", noPreempt, "gctrace=1," + noPreempt} {
		base := environ{"A=1"}
		if was != "" {
			base = base.set(debugVar, was)
		}
		if got := base.blockUrgent().unblockUrgent(); got.get(debugVar) != was || len(got) != len(base) {
			t.Errorf("%s=%q came back as %q", debugVar, was, got)
		}
	}
}

func FuzzEnvironment(f *testing.F) {
	f.Add("LISTEN_PID=1\nA=b\nLISTEN_PID=2\nLISTEN_FDS=1", "x")
	f.Fuzz(func(t *testing.T, text, name string) {
		base := environ(strings.Split(text, "\n"))
		if fds, err := listenFDs(base, 9); err == nil {
			for i, d := range fds {
				if d.fd != 3+i || strings.Contains(d.name, ":") {
					t.Fatalf("descriptor %d of %q is %+v", i, base, d)
				}
			}
		}
		got := base.forServer(stage{}, []string{name}, "@n").own(9)
		counts := map[string]int{}
		for _, kv := range got {
			k, _, _ := strings.Cut(kv, "=")
			counts[k]++
			switch k {
			case stageVar, bankVar, verbVar, adoptVar, "LISTEN_PIDFDID":
				t.Fatalf("%q is left", kv)
			case "LISTEN_PID":
				if kv != "LISTEN_PID=9" {
					t.Fatalf("%q", kv)
				}
			}
		}
		for _, key := range []string{"LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET"} {
			if counts[key] != 1 {
				t.Fatalf("%d times %s in %q", counts[key], key, got)
			}
		}
		// All that is not about processes stays, in its order.
		rest := func(e environ) (out []string) {
			for _, kv := range e {
				k, _, _ := strings.Cut(kv, "=")
				if !strings.HasPrefix(k, "LISTEN_") && !strings.HasPrefix(k, "GRM_") && k != "NOTIFY_SOCKET" && k != "WATCHDOG_PID" && k != "SYSTEMD_EXEC_PID" {
					out = append(out, kv)
				}
			}
			return out
		}
		if !slices.Equal(rest(base), rest(got)) {
			t.Fatalf("%q became %q", base, got)
		}
	})
}

func TestInstanceOrder(t *testing.T) {
	in := sortOut([]named{{"grm.dns.7.1", 3}, {"grm.web.7.0", 4}, {"grm.dns.7.0", 5}, {"grm.dns.6.0", 6}, {"other", 7}, {"grm.zzz.7.0", 8},
		{"grm.ctl", 9}, {"grm.flows.web", 10}, {"grm.keeper.6", 11}, {"grm.dns.7.10", 12}, {"grm.ctl", 13}, {"grm.dns.7.0", 14}, {"grm.new-thing", 15}, {"", 16}})
	if in.control != 9 || in.flows["web"] != 10 || in.keepers[6] != 11 || len(in.servers) != 2 || len(in.strange) != 3 {
		t.Errorf("%+v", in)
	}
	if _, err := in.instance(7, []string{"web", "dns"}); err == nil || !strings.Contains(err.Error(), "no socket grm.dns.7.2 in the fd store") {
		t.Errorf("a gap: %v", err)
	}
	in.sockets[7] = slices.DeleteFunc(in.sockets[7], func(s socket) bool { return s.index == 10 })
	sockets, err := in.instance(7, []string{"web", "dns"})
	if err != nil {
		t.Fatal(err)
	}
	var fds []int
	for _, s := range sockets {
		fds = append(fds, s.fd)
	}
	if want := []int{4, 5, 3, 8}; !slices.Equal(fds, want) {
		t.Errorf("order %v, want %v", fds, want)
	}
	if _, err := in.instance(7, []string{"web", "sip"}); err == nil || !strings.Contains(err.Error(), "listener sip") {
		t.Errorf("a listener without sockets: %v", err)
	}
}

func TestListenFDs(t *testing.T) {
	for _, c := range []struct {
		env environ
		n   int
		bad bool
	}{
		{environ{}, 0, false},
		{environ{"LISTEN_FDS=0", "LISTEN_PID=5"}, 0, false},
		{environ{"LISTEN_FDS=1", "LISTEN_PID=6"}, 0, false}, // another's
		{environ{"LISTEN_FDS=x"}, 0, true},
		{environ{"LISTEN_FDS=-1"}, 0, true},
		{environ{"LISTEN_FDS=60000"}, 0, true}, // not open
		{environ{"LISTEN_FDS=99999999999"}, 0, true},
	} {
		fds, err := listenFDs(c.env, 5)
		if len(fds) != c.n || (err != nil) != c.bad {
			t.Errorf("%q: %v, %v", c.env, fds, err)
		}
	}
}

func FuzzSocketName(f *testing.F) {
	f.Add("grm.web.7.0")
	f.Add("grm.flows.web")
	f.Add("grm.web.07.0")
	f.Add("grm.web.18446744073709551616.0")
	f.Fuzz(func(t *testing.T, name string) {
		listener, generation, index, ok := parseSocketName(name)
		if ok && socketName(listener, generation, index) != name {
			t.Fatalf("%q is %q, %d, %d", name, listener, generation, index)
		}
	})
}

// FuzzGiven: whatever names a keeper gives with its sockets, a decoy stores
// each once, and only those of the generation that it speaks for.
func FuzzGiven(f *testing.F) {
	f.Add("grm.web.7.0\ngrm.web.7.1", uint8(2))
	f.Add("grm.web.7.0\ngrm.web.7.0\ngrm.ctl", uint8(3))
	f.Add("grm.web.6.0", uint8(1))
	f.Fuzz(func(t *testing.T, text string, descriptors uint8) {
		d := &decoy{generation: 7, link: openLink(-1), stored: map[uint64][]string{}}
		d.given(parcel{what: msgGiven, text: text, fds: make([]int, descriptors)})
		seen := map[string]bool{}
		for _, name := range d.stored[7] {
			if _, generation, _, ok := parseSocketName(name); !ok || generation != 7 || seen[name] {
				t.Fatalf("%q came into the fd store of generation 7: %q", text, d.stored[7])
			}
			seen[name] = true
		}
		if len(d.stored) > 1 || len(seen) > int(descriptors) {
			t.Fatalf("%d descriptors, stored %v", descriptors, d.stored)
		}
	})
}

func TestDescribe(t *testing.T) {
	for status, want := range map[int]string{0: "exit 0", 1: "exit 1", 124: "exit 124", 127: "exit 127 (no such command)", 137: "SIGKILL", 139: "SIGSEGV", 164: "signal 36", 192: "signal 64", 193: "exit 193", 255: "exit 255"} {
		if got := describe(status); got != want {
			t.Errorf("%d is %q, want %q", status, got, want)
		}
	}
}
