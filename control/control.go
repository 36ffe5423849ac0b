// Package control is user space's view of a service's control map: the words
// that the programs of all its groups read, and that a decoy and its keepers
// share. It uses mmap(2) and atomics, and needs no capability and no bpf(2).
//
// The layout is bpfprog/c/control.h. Every process of the service's user can
// write every word, so whoever reads one bounds it, and root believes none of
// the pids before it has checked them.
package control

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"grm/internal/fdinfo"
)

const (
	Magic       = 0x314d5247 // "GRM1"
	Layout      = 1          // grows when a word changes its meaning or place
	Banks       = 32         // generations alive at once
	Slots       = 256        // sockets of one generation in one group
	Fallback    = 12         // banks that an Order can name
	statsOffset = 4096
	statsLine   = 64
)

// ErrLayout says that a map was made by a version of grm with another layout.
var ErrLayout = errors.New("control map has another layout")

// State says what a bank's generation is up to. Whether it is the working one
// or a watched one follows from the order and from WatchUntil.
type State uint32

const (
	Free     State = iota // no generation
	Prepared              // sockets are bound and stored; no server has been ready yet
	Serving               // its server said that it is ready
	Draining              // told to end
	Ended                 // its server is gone and does not come back
)

func (s State) String() string {
	names := [...]string{"free", "prepared", "serving", "draining", "ended"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("state %d", uint32(s))
}

// Request is what ExecStop tells a decoy before systemd's SIGTERM reaches it.
type Request uint32

const (
	NoRequest Request = iota
	Restart           // the decoy leaves alone, everything else goes on
	Stop              // everything of the service ends
)

// Verb is what ExecStartPre decided that this start is.
type Verb uint32

const (
	NoPlan  Verb = iota
	Start        // a new generation: start a server on the bank, flip when it is ready
	Again        // the bank's server crashed: start one on the same sockets
	StandIn      // an older server lives and serves: start nothing, speak for it
)

func (v Verb) String() string {
	names := [...]string{"none", "start", "again", "stand-in"}
	if int(v) < len(names) {
		return names[v]
	}
	return fmt.Sprintf("plan %d", uint32(v))
}

// Plan is what the decoy has to do.
type Plan struct {
	Verb Verb
	Bank int // 0..Banks-1
}

type bank struct {
	generation uint64
	state      uint32
	keeper     uint32
	server     uint32
	name       uint32
	readyAt    uint64
	watchUntil uint64
	drainUntil uint64
	naming     uint32
	_          uint32
	_          uint64
}

type header struct {
	magic   uint32
	layout  uint32
	epoch   uint64
	order   uint64
	alive   uint32
	closing uint32
	request uint32
	plan    uint32
	_       [3]uint64
	bank    [Banks]bank
	failed  failed // behind what the programs know of
}

type failed struct {
	generation uint64
	at         int64 // s since 1970
	length     uint32
	reason     [236]byte
}

type line struct {
	packets, newFlows, assured, otherSlot, fellBack, _ uint64
	lastPacket, lastAssured                            uint32
	_                                                  uint64
}

// Size is how many bytes a control map for that many CPUs has.
func Size(cpus int) int { return statsOffset + cpus*Banks*statsLine }

// Map is a mapped control map. Its methods may be called from any goroutine
// and any process at once: all words are read and written atomically.
type Map struct {
	mem  []byte
	cpus int
}

// Open maps the control map behind fd, which stays the caller's. It fails with
// ErrLayout if another version of grm made it.
func Open(fd int) (*Map, error) { return open(fd, unix.PROT_READ|unix.PROT_WRITE) }

// OpenReadOnly is Open for readers; a method that writes will panic.
func OpenReadOnly(fd int) (*Map, error) { return open(fd, unix.PROT_READ) }

func open(fd int, prot int) (*Map, error) {
	size, err := valueSize(fd)
	if err != nil {
		return nil, fmt.Errorf("control map: %w", err)
	}
	page := os.Getpagesize()
	mem, err := unix.Mmap(fd, 0, (size+page-1)&^(page-1), prot, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map control map: %w", err)
	}
	m := &Map{mem: mem, cpus: (size - statsOffset) / (Banks * statsLine)}
	if h := m.header(); h.magic != Magic || h.layout != Layout {
		err := fmt.Errorf("%w: magic %#x, layout %d; this grm has layout %d", ErrLayout, h.magic, h.layout, Layout)
		_ = unix.Munmap(mem) // the mapping is ours and whole: it cannot fail
		return nil, err
	}
	return m, nil
}

// Init writes the header of a map that has just been created, and maps it.
// fd stays the caller's.
func Init(fd int, epoch uint64) (*Map, error) {
	size, err := valueSize(fd)
	if err != nil {
		return nil, fmt.Errorf("control map: %w", err)
	}
	page := os.Getpagesize()
	mem, err := unix.Mmap(fd, 0, (size+page-1)&^(page-1), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map control map: %w", err)
	}
	m := &Map{mem: mem, cpus: (size - statsOffset) / (Banks * statsLine)}
	h := m.header()
	h.layout, h.epoch = Layout, epoch
	atomic.StoreUint32(&h.magic, Magic)
	return m, nil
}

// valueSize is the size of the map's one element.
func valueSize(fd int) (int, error) {
	info, err := fdinfo.Read(fd)
	if err != nil {
		return 0, err
	}
	if info.ValueSize < Size(1) || info.ValueSize > Size(1<<16) {
		return 0, fmt.Errorf("%w: %d bytes", ErrLayout, info.ValueSize)
	}
	return info.ValueSize, nil
}

func (m *Map) header() *header { return (*header)(unsafe.Pointer(&m.mem[0])) }

func (m *Map) bank(b int) *bank { return &m.header().bank[b] }

// Close unmaps the map.
func (m *Map) Close() error { return unix.Munmap(m.mem) }

// Epoch is the random number that was made with the map.
func (m *Map) Epoch() uint64 { return m.header().epoch }

// Order names banks, newest generation first; its head is the working one.
// It is one word, so that a flip is one store.
type Order uint64

// MakeOrder packs the first Fallback of banks.
func MakeOrder(banks []int) Order {
	banks = banks[:min(len(banks), Fallback)]
	o := Order(len(banks))
	for i, b := range banks {
		o |= Order(b&(Banks-1)) << (4 + 5*i)
	}
	return o
}

// Banks unpacks o.
func (o Order) Banks() []int {
	n := min(int(o&15), Fallback)
	banks := make([]int, n)
	for i := range banks {
		banks[i] = int(o>>(4+5*i)) & (Banks - 1)
	}
	return banks
}

// Working is the head of o, or -1 if it is empty.
func (o Order) Working() int {
	if o&15 == 0 {
		return -1
	}
	return int(o>>4) & (Banks - 1)
}

// Order reads the order.
func (m *Map) Order() Order { return Order(atomic.LoadUint64(&m.header().order)) }

// Working is the bank that takes new flows, or -1.
func (m *Map) Working() int { return m.Order().Working() }

// Flip makes bank the working one and alive, and returns the one before, or -1.
func (m *Map) Flip(bank int) int {
	m.setAlive(bank, true)
	old := m.reorder(func(banks []int) []int { return append([]int{bank}, without(banks, bank)...) })
	return old.Working()
}

// Withdraw takes bank out of the order and clears its alive bit: its flows are
// new flows from now on, and the newest older generation takes those. Doing so
// to the working bank is a flip back.
func (m *Map) Withdraw(bank int) {
	m.reorder(func(banks []int) []int { return without(banks, bank) })
	m.setAlive(bank, false)
}

// Yield takes bank out of the order if that leaves another one in it, and says
// whether it did, or had nothing to do. The bank stays alive: it keeps its flows,
// and the newest older generation takes the new ones, which is a flip back from
// a server that still answers. Of banks that yield to each other at the same
// time the last one stays.
func (m *Map) Yield(bank int) bool {
	for {
		old := m.Order()
		rest := without(old.Banks(), bank)
		if len(rest) == 0 {
			return !slices.Contains(old.Banks(), bank)
		}
		if m.SwapOrder(old, rest) {
			return true
		}
	}
}

// SwapOrder replaces the order as a whole, if it still is old; the alive bits stay.
func (m *Map) SwapOrder(old Order, banks []int) bool {
	return atomic.CompareAndSwapUint64(&m.header().order, uint64(old), uint64(MakeOrder(banks)))
}

func (m *Map) reorder(change func([]int) []int) Order {
	word := &m.header().order
	for {
		old := atomic.LoadUint64(word)
		if atomic.CompareAndSwapUint64(word, old, uint64(MakeOrder(change(Order(old).Banks())))) {
			return Order(old)
		}
	}
}

func without(banks []int, bank int) []int {
	var rest []int
	for _, b := range banks {
		if b != bank {
			rest = append(rest, b)
		}
	}
	return rest
}

func (m *Map) setAlive(bank int, alive bool) {
	if bit := uint32(1) << bank; alive {
		atomic.OrUint32(&m.header().alive, bit)
	} else {
		atomic.AndUint32(&m.header().alive, ^bit)
	}
}

// Alive says whether bank's flows are served by it.
func (m *Map) Alive(bank int) bool { return m.AliveBanks()&(1<<bank) != 0 }

// AliveBanks has a bit for each bank that is alive.
func (m *Map) AliveBanks() uint32 { return atomic.LoadUint32(&m.header().alive) }

// Closing says whether new flows are refused.
func (m *Map) Closing() bool { return atomic.LoadUint32(&m.header().closing) != 0 }

// SetClosing refuses new flows, or takes them again.
func (m *Map) SetClosing(closing bool) {
	var v uint32
	if closing {
		v = 1
	}
	atomic.StoreUint32(&m.header().closing, v)
}

// Request is what ExecStop said last.
func (m *Map) Request() Request { return Request(atomic.LoadUint32(&m.header().request)) }

// SetRequest leaves word for the decoy.
func (m *Map) SetRequest(r Request) { atomic.StoreUint32(&m.header().request, uint32(r)) }

// Plan is what ExecStartPre decided last.
func (m *Map) Plan() Plan {
	v := atomic.LoadUint32(&m.header().plan)
	return Plan{Verb: Verb(v & 0xff), Bank: int(v>>8) & (Banks - 1)}
}

// SetPlan leaves the decision for the decoy.
func (m *Map) SetPlan(p Plan) {
	atomic.StoreUint32(&m.header().plan, uint32(p.Verb)|uint32(p.Bank)<<8)
}

// Failed is the last start that came to nothing.
type Failed struct {
	Generation uint64 // 0: none
	At         time.Time
	Reason     string
}

// SetFailed leaves that for a decoy that stands in, before it is started. At is
// kept to the second, and of a long reason the beginning.
func (m *Map) SetFailed(f Failed) {
	h := &m.header().failed
	h.length = uint32(copy(h.reason[:], f.Reason))
	h.generation, h.at = f.Generation, f.At.Unix()
}

// Failed is what ExecStartPre left. The reason may be any bytes.
func (m *Map) Failed() Failed {
	h := &m.header().failed
	if h.generation == 0 {
		return Failed{}
	}
	return Failed{h.generation, time.Unix(h.at, 0), string(h.reason[:min(int(h.length), len(h.reason))])}
}

// Naming says what number the socket options show for a bank's generation.
type Naming uint32

const (
	ByGeneration Naming = iota // its lower 32 bits
	ByServer                   // the server chose one: Bank.Name
	Parked                     // none yet: the server is to choose one
)

// Bank is what is known of one bank. Times are on CLOCK_BOOTTIME (see Now);
// 0 means none. The pids are as the service's pid namespace counts, and only
// hints: the service's user can write them.
type Bank struct {
	Generation uint64
	State      State
	Keeper     int
	Server     int
	Naming     Naming
	Name       uint32 // if Naming is ByServer
	ReadyAt    time.Duration
	WatchUntil time.Duration
	DrainUntil time.Duration
}

// Bank reads bank b.
func (m *Map) Bank(b int) Bank {
	w := m.bank(b)
	return Bank{
		Generation: atomic.LoadUint64(&w.generation),
		State:      State(atomic.LoadUint32(&w.state)),
		Keeper:     int(atomic.LoadUint32(&w.keeper)),
		Server:     int(atomic.LoadUint32(&w.server)),
		Naming:     Naming(atomic.LoadUint32(&w.naming)),
		Name:       atomic.LoadUint32(&w.name),
		ReadyAt:    time.Duration(atomic.LoadUint64(&w.readyAt)),
		WatchUntil: time.Duration(atomic.LoadUint64(&w.watchUntil)),
		DrainUntil: time.Duration(atomic.LoadUint64(&w.drainUntil)),
	}
}

// Assign gives a free bank to a generation: everything else about it is reset,
// its counters too. The bank must be out of the order and not alive.
func (m *Map) Assign(b int, generation uint64, state State) {
	m.Release(b)
	w := m.bank(b)
	atomic.StoreUint64(&w.generation, generation)
	atomic.StoreUint32(&w.state, uint32(state))
}

// Release frees a bank: it names no generation any more.
func (m *Map) Release(b int) {
	w := m.bank(b)
	atomic.StoreUint32(&w.state, uint32(Free))
	atomic.StoreUint64(&w.generation, 0)
	atomic.StoreUint32(&w.keeper, 0)
	atomic.StoreUint32(&w.server, 0)
	atomic.StoreUint32(&w.naming, uint32(ByGeneration))
	atomic.StoreUint32(&w.name, 0)
	atomic.StoreUint64(&w.readyAt, 0)
	atomic.StoreUint64(&w.watchUntil, 0)
	atomic.StoreUint64(&w.drainUntil, 0)
	for cpu := range m.cpus {
		clear(m.mem[m.lineOffset(cpu, b):][:statsLine])
	}
}

// SetState says what b's generation is up to.
func (m *Map) SetState(b int, s State) { atomic.StoreUint32(&m.bank(b).state, uint32(s)) }

// Park leaves the choice of b's number to its server, which makes it with
// UDP_GRM_SOCKET_GEN (a --no-register activation).
func (m *Map) Park(b int) { atomic.StoreUint32(&m.bank(b).naming, uint32(Parked)) }

// SetPids leaves the pids of b's keeper and server; 0 for none.
func (m *Map) SetPids(b, keeper, server int) {
	atomic.StoreUint32(&m.bank(b).keeper, uint32(keeper))
	atomic.StoreUint32(&m.bank(b).server, uint32(server))
}

// SetReady says since when b's server is ready, and until when it is watched.
// It is to be called before Flip, so that nobody sees the bank work unwatched.
func (m *Map) SetReady(b int, at, watchUntil time.Duration) {
	atomic.StoreUint64(&m.bank(b).readyAt, uint64(at))
	atomic.StoreUint64(&m.bank(b).watchUntil, uint64(watchUntil))
}

// SetWatchUntil moves the end of b's watch.
func (m *Map) SetWatchUntil(b int, until time.Duration) {
	atomic.StoreUint64(&m.bank(b).watchUntil, uint64(until))
}

// SetDrainUntil says when b's drain ends at the latest; 0: it does not drain.
func (m *Map) SetDrainUntil(b int, until time.Duration) {
	atomic.StoreUint64(&m.bank(b).drainUntil, uint64(until))
}

// FindGeneration is the bank of a generation, or -1.
func (m *Map) FindGeneration(generation uint64) int {
	for b := range Banks {
		if generation != 0 && atomic.LoadUint64(&m.bank(b).generation) == generation {
			return b
		}
	}
	return -1
}

// Stats are the counters of one bank in all the service's groups, summed over
// the CPUs.
type Stats struct {
	Packets   uint64 // given to a socket of the bank
	NewFlows  uint64 // of them: of no known flow
	Assured   uint64 // flows that became assured
	OtherSlot uint64 // given to another socket of the bank than the one wanted, which was dead
	FellBack  uint64 // new flows that came here because newer generations had no live socket
	// How long ago, at least, a packet of any kind, and one of an assured flow,
	// came last; at most a second more. Negative: never.
	SincePacket, SinceAssured time.Duration
}

// Stats reads b's counters.
func (m *Map) Stats(b int) Stats {
	var s Stats
	var packet, assured uint32
	for cpu := range m.cpus {
		l := (*line)(unsafe.Pointer(&m.mem[m.lineOffset(cpu, b)]))
		s.Packets += atomic.LoadUint64(&l.packets)
		s.NewFlows += atomic.LoadUint64(&l.newFlows)
		s.Assured += atomic.LoadUint64(&l.assured)
		s.OtherSlot += atomic.LoadUint64(&l.otherSlot)
		s.FellBack += atomic.LoadUint64(&l.fellBack)
		packet = max(packet, atomic.LoadUint32(&l.lastPacket))
		assured = max(assured, atomic.LoadUint32(&l.lastAssured))
	}
	s.SincePacket, s.SinceAssured = since(packet), since(assured)
	return s
}

func (m *Map) lineOffset(cpu, b int) int { return statsOffset + (cpu*Banks+b)*statsLine }

// unit is what the programs count seconds in: the coarse monotonic clock >> 30.
const unit = time.Duration(1 << 30)

func since(stamp uint32) time.Duration {
	if stamp == 0 {
		return -1
	}
	// To the end of the unit: whoever waits for quiet must not take a packet of a moment ago for one of a second ago.
	return max(0, clock(unix.CLOCK_MONOTONIC)-(time.Duration(stamp)+1)*unit)
}

// Now is CLOCK_BOOTTIME, which the times of a Bank are on: it goes on in a
// suspend, and all processes agree on it.
func Now() time.Duration { return clock(unix.CLOCK_BOOTTIME) }

func clock(id int32) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		panic(fmt.Sprintf("clock_gettime(%d): %v", id, err)) // every kernel that grm runs on has both clocks
	}
	return time.Duration(ts.Nano())
}

// Live is how many banks have a generation that has not ended.
func (m *Map) Live() int {
	var live uint32
	for b := range Banks {
		if s := m.Bank(b).State; s != Free && s != Ended {
			live |= 1 << b
		}
	}
	return bits.OnesCount32(live)
}
