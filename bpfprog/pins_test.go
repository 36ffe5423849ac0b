package bpfprog

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/flowtable"
	"grm/internal/testenv"
)

func TestCreateAndOpen(t *testing.T) {
	needRoot(t)
	spec := flowSpec("127.0.0.1:5001")
	if _, err := OpenGroup("udp", spec.Address); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("open a group that is not there: %v", err)
	}
	if _, err := OpenService("nobody"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("open a service that is not there: %v", err)
	}
	g := must(CreateGroup(spec))(t)
	if _, err := CreateGroup(spec); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create a group twice: %v", err)
	}
	s := must(CreateService("somebody"))(t)
	if _, err := CreateService("somebody"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create a service twice: %v", err)
	}
	if err := g.Attach(0); err == nil || !strings.Contains(err.Error(), "join first") {
		t.Errorf("attach before a service has joined: %v", err)
	}
	want(t, "groups", fmt.Sprint(must(Groups())(t)), "[udp://127.0.0.1:5001]")
	want(t, "services", fmt.Sprint(must(Services())(t)), "[somebody]")
	again := must(OpenGroup("udp", spec.Address))(t)
	check(t, again.Matches(spec))
	for what, change := range map[string]func(*GroupSpec){
		"dissector is flow, not noop":    func(s *GroupSpec) { s.Dissector = Dissector{Kind: Noop} },
		"timeout is 2m4s, not 1m0s":      func(s *GroupSpec) { s.Dissector.Timeout = time.Minute },
		"flows is 4096, not 1":           func(s *GroupSpec) { s.Dissector.Flows = 1 },
		"assure is reply, not packet":    func(s *GroupSpec) { s.Dissector.Assure = Packet },
		"max_apps is 1, not 2":           func(s *GroupSpec) { s.MaxApps = 2 },
		"dual stack is false, not true":  func(s *GroupSpec) { s.DualStack = true },
		"cbpf program is another one":    func(s *GroupSpec) { s.Dissector.Kind = CBPF; s.Dissector.Program = firstWord },
		"group udp://127.0.0.1:5001: ti": func(s *GroupSpec) { s.Dissector.Timeout = time.Hour },
	} {
		other := spec
		change(&other)
		if err := again.Matches(other); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("difference: %v, not %q", err, what)
		}
	}
	check(t, errors.Join(again.Close(), g.Remove(), g.Close(), s.Remove(), s.Close()))
	want(t, "groups", len(must(Groups())(t)), 0)
	want(t, "services", len(must(Services())(t)), 0)
}

func TestNothingIsLeftOfAFailure(t *testing.T) {
	needRoot(t)
	defer func() { beforePublish = func(string) error { return nil } }()
	beforePublish = func(string) error { return unix.ENOSPC }
	_, err := CreateGroup(flowSpec("127.0.0.1:5001"))
	wantErrno(t, "create a group", err, unix.ENOSPC)
	_, err = CreateService("somebody")
	wantErrno(t, "create a service", err, unix.ENOSPC)
	dir := must(Dir())(t)
	for _, sub := range []string{"groups", "services"} {
		want(t, "left in "+sub, len(must(os.ReadDir(filepath.Join(dir, sub)))(t)), 0)
	}
}

func TestAnotherLayoutIsRefused(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 1), "one")
	r.ctl.Flip(0)
	r.header().Layout++
	if _, err := OpenGroup("udp", r.Spec.Address); !errors.Is(err, ErrLayout) {
		t.Errorf("open a group of another layout: %v", err)
	}
	want(t, "which serves on", ask(t, dial(t, r.Spec.Address)), "one")
}

func TestSpecsThatCannotBe(t *testing.T) {
	good := flowSpec("127.0.0.1:5001")
	check(t, good.normal().check())
	for what, change := range map[string]func(*GroupSpec){
		"network":                func(s *GroupSpec) { s.Network = "sctp" },
		"port that is not 0":     func(s *GroupSpec) { s.Address = netip.AddrPortFrom(s.Address.Addr(), 0) },
		"want an address":        func(s *GroupSpec) { s.Address = netip.AddrPort{} },
		"dual stack":             func(s *GroupSpec) { s.DualStack = true },
		"max_apps 17":            func(s *GroupSpec) { s.MaxApps = 17 },
		"dissector 3":            func(s *GroupSpec) { s.Dissector.Kind = 3 },
		"flow with tcp":          func(s *GroupSpec) { s.Network = "tcp" },
		"flows 0":                func(s *GroupSpec) { s.Dissector.Flows = 0 },
		"timeout 0s":             func(s *GroupSpec) { s.Dissector.Timeout = 0 },
		"cbpf without a program": func(s *GroupSpec) { s.Dissector.Kind = CBPF },
	} {
		bad := good
		change(&bad)
		if err := bad.normal().check(); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, not %q", err, what)
		}
	}
}

// FuzzKey: a name that parses is the name of what it parsed to.
func FuzzKey(f *testing.F) {
	for _, s := range []string{"udp-7f000001-53", "tcp-00000000000000000000000000000001-443", "udp-fe800000000000000000000000000001-53-1", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		k, ok := parseKey(name)
		if !ok {
			return
		}
		back, err := k.name()
		if err != nil || back != name {
			t.Fatalf("%q is %v, whose name is %q (%v)", name, k, back, err)
		}
		if strings.ContainsAny(name, "./") {
			t.Fatalf("%q is no name on bpffs", name)
		}
	})
}

// Another build's program takes over, under traffic, with the flows of the one before.
func TestRefreshKeepsFlows(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	one := r.generation(0, 1, 2)
	serve(one, "one")
	r.ctl.Flip(0)
	var flows []*net.UDPConn
	for range 64 {
		c := dial(t, r.Spec.Address)
		for range 3 {
			ask(t, c)
		}
		flows = append(flows, c)
	}
	serve(r.generation(1, 2, 2), "two")
	r.ctl.Flip(1)
	for round := range 3 {
		for _, dir := range []string{r.dir, filepath.Join(r.service.dir, "programs")} {
			for _, name := range must(entries(dir))(t) { // as another build would have pinned them
				if i := strings.LastIndexByte(name, '-'); i > 0 {
					check(t, os.Rename(filepath.Join(dir, name), filepath.Join(dir, fmt.Sprintf("%s-%016x", name[:i], round))))
				}
			}
		}
		g := must(OpenGroup("udp", r.Spec.Address))(t)
		want(t, "replaced", must(g.Refresh())(t), true)
		want(t, "replaced again", must(g.Refresh())(t), false)
		check(t, g.Attach(fd(t, one[0])))
		cg := must(os.Open(cgroupRoot))(t)
		check(t, r.service.AttachHooks(cg, []*Group{g}))
		check(t, errors.Join(cg.Close(), g.Close()))
		n := 0
		for _, name := range must(entries(r.dir))(t) {
			if strings.HasPrefix(name, programPrefix) {
				n++
			}
		}
		want(t, "pinned programs", n, 1)
		for _, c := range flows {
			want(t, "flow", ask(t, c), "one")
		}
		c := dial(t, r.Spec.Address)
		for range 2 {
			want(t, "new flow", ask(t, c), "two")
		}
	}
	want(t, "new flows that the new hooks saw answered", r.ctl.Stats(1).Assured, 3)
}

// A service that starts anew, with another epoch, inherits nothing of the group that outlived it.
func TestAnotherEpoch(t *testing.T) {
	r := newRig(t, flowSpec("127.0.0.1:5001"))
	conns := r.generation(0, 1, 1)
	serve(conns, "old")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	for range 3 {
		ask(t, c)
	}
	again := addService(t, r.Group, 0, "again")
	want(t, "sockets of the old service's bank", len(must(r.Slots(0, 0))(t)), 0)
	serve(again.generation(0, 1, 1), "new") // the same bank, the same number
	check(t, conns[0].Close())
	again.ctl.Flip(0)
	want(t, "flow of the old service", ask(t, c), "new")
	fd, _ := r.FlowsFD()
	want(t, "assured flows", must(flowtable.Count(fd))(t)[0], 0)
}

func TestTwoNetworkNamespaces(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 1), "here")
	r.ctl.Flip(0)
	t.Run("other", func(t *testing.T) {
		runtime.LockOSThread() // for good: the thread ends with the test's goroutine
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNET), loopbackUp()); err != nil {
			t.Fatal(err)
		}
		want(t, "groups seen from the other", len(must(Groups())(t)), 0)
		there := newHookedRig(t, flowSpec("127.0.0.1:5001"))
		serve(there.generation(0, 1, 1), "there")
		there.ctl.Flip(0)
		want(t, "packet in the other", ask(t, dial(t, r.Spec.Address)), "there")
		want(t, "packets in the other", there.ctl.Stats(0).Packets, 1)
		want(t, "groups seen from the other", len(must(Groups())(t)), 1)
	})
	want(t, "packets here", r.ctl.Stats(0).Packets, 0)
	want(t, "packet here", ask(t, dial(t, r.Spec.Address)), "here")
}

// 10,000 generations pass through the other banks while one lives on. Nothing
// of them stays.
func TestGenerationsNeverAlias(t *testing.T) {
	r := newHookedRig(t, flowSpec("127.0.0.1:5001"))
	serve(r.generation(0, 1, 1), "old")
	r.ctl.Flip(0)
	c := dial(t, r.Spec.Address)
	for range 3 {
		ask(t, c)
	}
	var before *net.UDPConn
	last := uint64(1 + testenv.Scale(10_000))
	var first map[string]int
	for generation := uint64(2); generation <= last; generation++ {
		bank := 1 + int(generation)%2
		r.ctl.Assign(bank, generation, control.Prepared)
		check(t, r.SetBank(0, bank, generation, 1))
		conn := r.bind()
		check(t, r.Put(0, bank, 0, fd(t, conn)))
		r.ctl.Flip(bank)
		if generation%1000 == 0 || generation == last {
			serve([]*net.UDPConn{conn}, fmt.Sprint(generation))
			want(t, "old flow", ask(t, c), "old")
			fresh := dial(t, r.Spec.Address)
			want(t, "new flow", ask(t, fresh), fmt.Sprint(generation))
			check(t, fresh.Close())
			want(t, "generation of the option", string(getUDP(t, conn, optSocketGen, 4)), string(u32(uint32(generation))))
		}
		if generation == min(last, 100) {
			first = r.inventory()
		}
		if before != nil {
			other := 3 - bank
			r.ctl.Withdraw(other)
			check(t, r.Clear(0, other))
			check(t, before.Close())
		}
		before = conn
	}
	r.leaks(first)
	check(t, before.Close())
	want(t, "old flow", ask(t, c), "old")
	want(t, "alive", r.ctl.AliveBanks(), 1|1<<r.ctl.Working())
}

// Every packet of two senders arrives, and none goes back to an older generation, while 30 generations flip.
func TestFlipsUnderLoad(t *testing.T) {
	const senders, banks = 2, 30
	packets := testenv.Scale(100_000)
	r := newRig(t, noopSpec("127.0.0.1:5001"))
	type arrival struct{ sender, bank int }
	arrivals := make(chan arrival, packets*senders)
	for b := range banks {
		for _, c := range r.generation(b, uint64(b+1), 1) {
			go func() {
				buf := make([]byte, 16)
				for {
					n, _, err := c.ReadFromUDPAddrPort(buf)
					if err != nil {
						return
					}
					arrivals <- arrival{int(buf[n-1]), b}
				}
			}()
		}
	}
	r.ctl.Flip(0)
	window := make(chan struct{}, 256) // packets on their way, so that none overflows a queue, and flips are among them
	for s := range senders {
		c := dial(t, r.Spec.Address)
		go func() {
			for range packets {
				window <- struct{}{}
				if _, err := c.Write([]byte{byte(s)}); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	got := make([][]int, senders)
	for i := range senders {
		got[i] = make([]int, banks)
	}
	for n := range packets * senders {
		if b := 1 + n*banks/(packets*senders); b < banks && n%(packets*senders/banks) == 0 {
			r.ctl.Flip(b)
		}
		select {
		case a := <-arrivals:
			got[a.sender][a.bank]++
			<-window
		case <-time.After(patience):
			t.Fatalf("%d of %d packets arrived; %+v", n, packets*senders, must(r.Counters())(t))
		}
	}
	var counted uint64
	for b := range banks {
		counted += r.ctl.Stats(b).Packets
	}
	want(t, "counted packets", counted, uint64(packets*senders))
	for s := range senders {
		if slices.Max(got[s]) == packets {
			t.Errorf("sender %d never saw a flip", s)
		}
	}
	want(t, "counters", must(r.Counters())(t), Counters{})
}

// The directories above pins go with the last pin in them, whoever makes
// others at that moment.
func TestNothingIsLeft(t *testing.T) {
	needRoot(t)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for range 20 {
				s, err := CreateService(fmt.Sprint("tidy", i))
				if err != nil {
					t.Error(err)
					return
				}
				if err := errors.Join(s.Remove(), s.Close()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if _, err := os.Stat(Root); !errors.Is(err, fs.ErrNotExist) {
		left, _ := Services()
		t.Errorf("%s is left, with services %q: %v", Root, left, err)
	}
}
