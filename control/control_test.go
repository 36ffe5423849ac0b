package control

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newMap is a map without a kernel behind it.
func newMap(cpus int) *Map {
	words := make([]uint64, Size(cpus)/8) // aligned, as a mapping is
	m := &Map{mem: unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), Size(cpus)), cpus: cpus}
	m.header().magic, m.header().layout, m.header().epoch = Magic, Layout, 7
	return m
}

// The offsets are those of bpfprog/c/control.h.
func TestLayout(t *testing.T) {
	var h header
	for name, c := range map[string]struct{ got, want uintptr }{
		"order":     {unsafe.Offsetof(h.order), 16},
		"alive":     {unsafe.Offsetof(h.alive), 24},
		"closing":   {unsafe.Offsetof(h.closing), 28},
		"bank":      {unsafe.Offsetof(h.bank), 64},
		"a bank":    {unsafe.Sizeof(h.bank[0]), 64},
		"a line":    {unsafe.Sizeof(line{}), statsLine},
		"last line": {unsafe.Offsetof(line{}.lastPacket), 48},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", name, c.got, c.want)
		}
	}
	if unsafe.Sizeof(h) > statsOffset {
		t.Errorf("the header has %d bytes, more than %d", unsafe.Sizeof(h), statsOffset)
	}
}

func FuzzOrder(f *testing.F) {
	f.Add([]byte{1, 2, 3})
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{31}, 40))
	f.Fuzz(func(t *testing.T, in []byte) {
		var banks []int
		for _, b := range in {
			banks = append(banks, int(b)%Banks)
		}
		o := MakeOrder(banks)
		want := banks[:min(len(banks), Fallback)]
		if got := o.Banks(); !slices.Equal(got, want) {
			t.Fatalf("%v came back as %v", want, got)
		}
		if w := o.Working(); (len(want) == 0) != (w == -1) || (w >= 0 && w != want[0]) {
			t.Fatalf("working bank of %v is %d", want, w)
		}
	})
}

// The service's user can write any word: none leads out of bounds.
func FuzzForgedOrder(f *testing.F) {
	f.Add(uint64(0))
	f.Add(^uint64(0))
	f.Fuzz(func(t *testing.T, word uint64) {
		banks := Order(word).Banks()
		if len(banks) > Fallback || slices.ContainsFunc(banks, func(b int) bool { return b < 0 || b >= Banks }) {
			t.Fatalf("%#x is %v", word, banks)
		}
		if w := Order(word).Working(); w < -1 || w >= Banks {
			t.Fatalf("%#x has working bank %d", word, w)
		}
	})
}

func TestFailed(t *testing.T) {
	m := newMap(1)
	if f := m.Failed(); f != (Failed{}) {
		t.Fatalf("in a new map: %+v", f)
	}
	for _, reason := range []string{"exit status 1", strings.Repeat("long", 100), ""} {
		want := Failed{7, time.Unix(1_700_000_000, 0), reason[:min(len(reason), 236)]}
		m.SetFailed(Failed{7, want.At.Add(time.Millisecond), reason})
		if f := m.Failed(); f != want {
			t.Fatalf("%+v, want %+v", f, want)
		}
	}
	m.header().failed.length = 1 << 31 // the service's user
	if n := len(m.Failed().Reason); n > 236 {
		t.Fatalf("%d bytes", n)
	}
	if end := int(unsafe.Sizeof(header{})); end > statsOffset {
		t.Fatalf("the header ends at %d", end)
	}
}

func TestFlip(t *testing.T) {
	m := newMap(2)
	if m.Working() != -1 || m.Flip(3) != -1 || m.Flip(5) != 3 {
		t.Fatalf("order %v", m.Order().Banks())
	}
	m.Flip(3) // back: it is there once
	if got := m.Order().Banks(); !slices.Equal(got, []int{3, 5}) || !m.Alive(3) || !m.Alive(5) {
		t.Fatalf("order %v, alive %b", got, m.AliveBanks())
	}
	before := m.Order()
	m.Yield(3)
	if m.SwapOrder(before, []int{7}) {
		t.Error("a change that came in between is lost")
	}
	if got := m.Order().Banks(); !slices.Equal(got, []int{5}) || !m.Alive(3) {
		t.Fatalf("after it yielded: order %v, alive %b", got, m.AliveBanks())
	}
	m.Withdraw(5)
	if m.Working() != -1 || m.Alive(5) {
		t.Fatalf("after a withdrawal: order %v, alive %b", m.Order().Banks(), m.AliveBanks())
	}
	for b := range Banks {
		m.Flip(b)
	}
	if got := m.Order().Banks(); len(got) != Fallback || got[0] != Banks-1 {
		t.Fatalf("an order of all banks: %v", got)
	}
}

// A packet of this moment is never taken for one of a second ago, wherever in a unit of the clock that is.
func TestSince(t *testing.T) {
	m := newMap(2)
	l := (*line)(unsafe.Pointer(&m.mem[m.lineOffset(1, 4)]))
	now := clock(unix.CLOCK_MONOTONIC)
	for ago := range uint32(4) {
		l.lastPacket = uint32(now/unit) - ago
		since := m.Stats(4).SincePacket
		// The clock goes on.
		if least := time.Duration(ago-1) * unit; ago > 0 && since < least || ago == 0 && since > clock(unix.CLOCK_MONOTONIC)-now {
			t.Errorf("%d units ago: %v", ago, since)
		}
	}
}

// Of banks that yield to each other at the same time one stays.
func TestYield(t *testing.T) {
	m := newMap(1)
	if !m.Yield(1) {
		t.Error("what is in no order has nobody to yield to, and nothing to do")
	}
	for range 1000 {
		var stayed atomic.Uint32
		var all sync.WaitGroup
		for b := range 4 {
			m.Flip(b)
		}
		for b := range 4 {
			all.Go(func() {
				if !m.Yield(b) {
					stayed.Store(uint32(b) + 1)
				}
			})
		}
		all.Wait()
		if got := m.Order().Banks(); len(got) != 1 || got[0]+1 != int(stayed.Load()) {
			t.Fatalf("order %v, bank %d says that it stays", got, int(stayed.Load())-1)
		}
	}
}

// Each change of the order is whole, whoever makes another at the same time.
func TestConcurrentOrder(t *testing.T) {
	m := newMap(1)
	var all sync.WaitGroup
	for b := range 8 {
		all.Go(func() {
			for range 1000 {
				m.Flip(b)
				m.Withdraw(b)
			}
			m.Flip(b)
		})
	}
	all.Wait()
	got := m.Order().Banks()
	slices.Sort(got)
	if !slices.Equal(got, []int{0, 1, 2, 3, 4, 5, 6, 7}) {
		t.Errorf("order %v", got)
	}
}

func TestBank(t *testing.T) {
	m := newMap(2)
	l := (*line)(unsafe.Pointer(&m.mem[m.lineOffset(1, 4)]))
	l.packets, l.lastPacket = 9, 1
	m.Assign(4, 77, Prepared)
	if b := m.Bank(4); b != (Bank{Generation: 77, State: Prepared}) || m.Stats(4).Packets != 0 || m.Stats(4).SincePacket >= 0 {
		t.Errorf("assigned: %+v, %+v", b, m.Stats(4))
	}
	m.SetPids(4, 10, 11)
	m.SetReady(4, time.Second, 2*time.Second)
	m.SetDrainUntil(4, 3*time.Second)
	m.SetState(4, Draining)
	want := Bank{Generation: 77, State: Draining, Keeper: 10, Server: 11, ReadyAt: time.Second, WatchUntil: 2 * time.Second, DrainUntil: 3 * time.Second}
	if b := m.Bank(4); b != want {
		t.Errorf("%+v, want %+v", b, want)
	}
	if m.FindGeneration(77) != 4 || m.FindGeneration(0) != -1 || m.Live() != 1 {
		t.Errorf("found in %d, %d live", m.FindGeneration(77), m.Live())
	}
	for cpu := range uint64(2) {
		l := (*line)(unsafe.Pointer(&m.mem[m.lineOffset(int(cpu), 4)]))
		l.packets, l.newFlows, l.assured, l.otherSlot, l.fellBack = 1+cpu, 2, 3, 4, 5
	}
	if s := m.Stats(4); s.Packets != 3 || s.NewFlows != 4 || s.Assured != 6 || s.OtherSlot != 8 || s.FellBack != 10 {
		t.Errorf("counters %+v", s)
	}
	m.Release(4)
	if b := m.Bank(4); b != (Bank{}) || m.Stats(4).Packets != 0 || m.Live() != 0 {
		t.Errorf("released: %+v", b)
	}
}

func TestWords(t *testing.T) {
	m := newMap(1)
	for _, p := range []Plan{{Start, 31}, {Again, 0}, {StandIn, 7}, {}} {
		m.SetPlan(p)
		if got := m.Plan(); got != p {
			t.Errorf("plan %+v came back as %+v", p, got)
		}
	}
	m.SetClosing(true)
	m.SetRequest(Stop)
	if !m.Closing() || m.Request() != Stop || m.Epoch() != 7 {
		t.Errorf("closing %v, request %d, epoch %d", m.Closing(), m.Request(), m.Epoch())
	}
	m.SetClosing(false)
	if m.Closing() {
		t.Error("still closing")
	}
	for text, want := range map[string]string{Draining.String(): "draining", State(99).String(): "state 99", StandIn.String(): "stand-in", Verb(9).String(): "plan 9"} {
		if text != want {
			t.Errorf("%q, want %q", text, want)
		}
	}
}

func TestOpenRefusesOthers(t *testing.T) {
	for _, open := range []func(int) (*Map, error){Open, OpenReadOnly, func(fd int) (*Map, error) { return Init(fd, 1) }} {
		if _, err := open(0); err == nil {
			t.Error("standard input was taken for a control map")
		}
		if _, err := open(-1); err == nil {
			t.Error("no descriptor was taken for a control map")
		}
	}
}
