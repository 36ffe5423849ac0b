// Package inspect tells what there is: the services of this network namespace,
// their groups, generations, processes, flows and counters, in one Report.
//
// Root sees all of it. Others see what root left in /run/grm for all to read.
package inspect

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"grm/control"
)

// Report is what there is at one moment.
type Report struct {
	Time     time.Time `json:"time"`
	Complete bool      `json:"complete"` // false: made without root's rights, from the state files alone
	Services []Service `json:"services"`
	Groups   []Group   `json:"groups"`
	Problems []string  `json:"problems,omitempty"` // what could not be read, and why
}

// Service is one service.
type Service struct {
	Name        string       `json:"name"`
	Unit        string       `json:"unit,omitempty"`
	User        string       `json:"user,omitempty"`
	Epoch       string       `json:"epoch,omitempty"`   // in hex: it is an id, and too large for many JSON readers
	Working     uint64       `json:"working,omitempty"` // the generation that takes new flows; 0: none
	Closing     bool         `json:"closing"`           // no new flow is taken
	Failed      *Failed      `json:"failed,omitempty"`
	Listeners   []Listener   `json:"listeners"`
	Generations []Generation `json:"generations"` // newest first
}

// Failed is the generation that could not take over last.
type Failed struct {
	Generation uint64    `json:"generation"`
	Reason     string    `json:"reason"`
	At         time.Time `json:"at"`
}

// Listener is one address of a service.
type Listener struct {
	Name    string `json:"name"`
	Address string `json:"address"`         // udp://0.0.0.0:5201
	Group   string `json:"group,omitempty"` // Group.Name
	App     int    `json:"app"`
}

// State is what a generation is up to.
type State string

const (
	Prepared State = "prepared" // its sockets are bound; no server has been ready yet
	Watched  State = "watched"  // it takes new flows; an older one stays ready to take over again
	Working  State = "working"  // it takes new flows
	Standby  State = "standby"  // whole, and it serves its own flows; a newer one takes the new ones
	Draining State = "draining" // told to end
	Dead     State = "dead"     // its server is gone
	Unknown  State = "unknown"  // only root can see
)

// Generation is one generation of a service.
type Generation struct {
	Number     uint64     `json:"generation"`
	Bank       int        `json:"bank"`
	State      State      `json:"state"`
	Server     *Process   `json:"server,omitempty"`
	Keeper     *Process   `json:"keeper,omitempty"`
	ReadySince *time.Time `json:"ready_since,omitempty"`
	WatchLeft  Seconds    `json:"watch_left_seconds,omitempty"`
	DrainLeft  Seconds    `json:"drain_left_seconds,omitempty"`
	Sockets    []Sockets  `json:"sockets"`
	Flows      int        `json:"flows"` // assured ones that live
	Counters   Counters   `json:"counters"`
	Problems   []string   `json:"problems,omitempty"` // what its server has done to its sockets
}

// Process is a server or a keeper.
type Process struct {
	PID     int    `json:"pid"`
	Command string `json:"command,omitempty"`
	Running bool   `json:"running"` // it is a process of the service's unit
}

// Sockets is what a generation has at one listener.
type Sockets struct {
	Listener string `json:"listener"`
	Count    int    `json:"count"`
	Live     int    `json:"live"` // in their slots, able to receive
}

// Counters are a generation's counters in all groups of its service.
type Counters struct {
	Packets   uint64 `json:"packets"`
	NewFlows  uint64 `json:"new_flows"`
	Assured   uint64 `json:"assured"`
	OtherSlot uint64 `json:"other_slot"`
	FellBack  uint64 `json:"fell_back"`
	// Since the last packet, and the last one of an assured flow; negative: never.
	SincePacket  Seconds `json:"since_packet_seconds"`
	SinceAssured Seconds `json:"since_assured_seconds"`
}

// Group is one reuseport group.
type Group struct {
	Name      string            `json:"name"` // udp://0.0.0.0:5201
	DualStack bool              `json:"dual_stack,omitempty"`
	Dissector string            `json:"dissector"`
	MaxApps   int               `json:"max_apps"`
	TableSize int               `json:"table_size,omitempty"`
	Flows     int               `json:"flows"`   // entries that live, assured or not
	Assured   int               `json:"assured"` // of them
	Services  []string          `json:"services"`
	Counters  map[string]uint64 `json:"counters,omitempty"`
}

// Seconds is a duration that JSON shows as a number of seconds; one that is
// negative stands for never.
type Seconds time.Duration

// MarshalJSON writes s as seconds, to a tenth, and never as -1.
func (s Seconds) MarshalJSON() ([]byte, error) {
	if s < 0 {
		return []byte("-1"), nil
	}
	return fmt.Appendf(nil, "%.1f", time.Duration(s).Seconds()), nil
}

// facts is what was read of one service; from it follows its Service.
type facts struct {
	name, unit, user string
	failed           *Failed
	listeners        []Listener
	recorded         []recorded // generations in root's own record

	control *words // nil without root's rights
	slots   map[string][control.Banks][]uint64
	inodes  map[string][control.Banks][]uint64 // of the same sockets, as root has recorded them
	open    map[uint64]bool                    // those that processes of the unit have, but for keepers and decoys; nil: unknown
	flows   [control.Banks]int
	process func(pid int) *Process
	wall    time.Time
	now     time.Duration // on the control map's clock
}

// recorded is a generation as root's state file has it.
type recorded struct {
	number  uint64
	bank    int
	sockets []Sockets
}

// words is what the control map says.
type words struct {
	epoch   uint64
	order   []int
	alive   uint32
	closing bool
	banks   [control.Banks]control.Bank
	stats   [control.Banks]control.Stats
}

func readWords(m *control.Map) *words {
	w := &words{epoch: m.Epoch(), order: m.Order().Banks(), alive: m.AliveBanks(), closing: m.Closing()}
	for b := range control.Banks {
		w.banks[b] = m.Bank(b)
		if w.banks[b].State != control.Free {
			w.stats[b] = m.Stats(b)
		}
	}
	return w
}

// service draws the conclusions.
func (f facts) service() Service {
	s := Service{Name: f.name, Unit: f.unit, User: f.user, Failed: f.failed, Listeners: f.listeners, Generations: []Generation{}}
	if s.Listeners == nil {
		s.Listeners = []Listener{}
	}
	w := f.control
	if w == nil {
		for _, r := range f.recorded {
			s.Generations = append(s.Generations, Generation{Number: r.number, Bank: r.bank, State: Unknown, Sockets: r.sockets})
		}
	} else {
		s.Epoch, s.Closing = fmt.Sprintf("%016x", w.epoch), w.closing
		if len(w.order) > 0 {
			s.Working = w.banks[w.order[0]].Generation
		}
		for b, bank := range w.banks {
			if bank.State != control.Free {
				s.Generations = append(s.Generations, f.generation(b))
			}
		}
	}
	slices.SortFunc(s.Generations, func(a, b Generation) int { return cmp.Compare(b.Number, a.Number) })
	return s
}

func (f facts) generation(b int) Generation {
	bank, stats := f.control.banks[b], f.control.stats[b]
	g := Generation{
		Number:    bank.Generation,
		Bank:      b,
		State:     f.control.state(b, f.now),
		Server:    f.process(bank.Server),
		Keeper:    f.process(bank.Keeper),
		WatchLeft: left(bank.WatchUntil, f.now),
		Sockets:   []Sockets{},
		Flows:     f.flows[b],
		Counters: Counters{
			Packets: stats.Packets, NewFlows: stats.NewFlows, Assured: stats.Assured,
			OtherSlot: stats.OtherSlot, FellBack: stats.FellBack,
			SincePacket: Seconds(stats.SincePacket), SinceAssured: Seconds(stats.SinceAssured),
		},
	}
	if g.State == Draining {
		g.DrainLeft = left(bank.DrainUntil, f.now)
	}
	if bank.ReadyAt > 0 && bank.ReadyAt <= f.now {
		since := f.wall.Add(bank.ReadyAt - f.now).Truncate(time.Second)
		g.ReadySince = &since
	}
	for _, l := range f.listeners {
		banks, ok := f.slots[l.Name]
		if !ok || len(banks[b]) == 0 {
			continue
		}
		live := 0
		for _, cookie := range banks[b] {
			if cookie != 0 {
				live++
			}
		}
		g.Sockets = append(g.Sockets, Sockets{Listener: l.Name, Count: len(banks[b]), Live: live})
		g.Problems = append(g.Problems, f.oddities(l.Name, b, g)...)
	}
	return g
}

// oddities are those of a bank's sockets that their server has, and that get
// nothing, and those that get packets, and that the server does not have.
func (f facts) oddities(listener string, b int, g Generation) (problems []string) {
	if f.open == nil || g.Server == nil || !g.Server.Running || g.State == Prepared || len(f.inodes[listener][b]) != len(f.slots[listener][b]) {
		return nil
	}
	var out, unread []int
	for i, cookie := range f.slots[listener][b] {
		switch open := f.open[f.inodes[listener][b][i]]; {
		case cookie == 0 && open:
			out = append(out, i)
		case cookie != 0 && !open:
			unread = append(unread, i)
		}
	}
	if out != nil {
		problems = append(problems, fmt.Sprintf("%s of %s: open, but no longer in the group: the server has taken it out", sockets(out), listener))
	}
	if unread != nil {
		problems = append(problems, fmt.Sprintf("%s of %s: in the group, but no longer open: nobody reads what comes", sockets(unread), listener))
	}
	return problems
}

// sockets is a list in words.
func sockets(indices []int) string {
	if len(indices) == 1 {
		return fmt.Sprintf("socket %d", indices[0])
	}
	return "sockets " + strings.Trim(strings.ReplaceAll(fmt.Sprint(indices), " ", ", "), "[]")
}

// state is what bank b's generation is up to.
func (w *words) state(b int, now time.Duration) State {
	bank := w.banks[b]
	switch bank.State {
	case control.Prepared:
		return Prepared
	case control.Draining:
		return Draining
	case control.Serving:
		switch {
		case w.alive&(1<<b) == 0:
			return Dead // withdrawn: its flows are others' by now
		case len(w.order) == 0 || w.order[0] != b:
			return Standby
		case bank.WatchUntil > now && len(w.order) > 1:
			return Watched
		}
		return Working
	case control.Ended:
		return Dead
	}
	return Unknown // the service's user can write anything
}

func left(until, now time.Duration) Seconds {
	return Seconds(max(0, until-now))
}
