package activate

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"grm/control"
	"grm/internal/proc"
	"grm/internal/state"
)

func sortedKeys[M ~map[K]V, K interface{ ~int | ~string }, V any](m M) []K {
	return slices.Sorted(maps.Keys(m))
}

// facts are what a decision is made from.
type facts struct {
	automatic bool         // systemd restarts the unit on its own account
	order     []int        // of the banks that root knows, newest first: the head takes new flows
	banks     map[int]fact // of the banks that root knows
}

// fact is what is true of one generation now.
type fact struct {
	generation uint64
	held       bool // it has a server
	keeper     bool // its keeper lives
	full       bool // all its slots are full: what crashed can come back
	watched    bool // its watch is not over
	alive      bool // its flows are its own
	serving    bool // it is not draining
}

// lives says whether a decoy can stand in for the generation.
func (f fact) lives() bool { return f.held && f.keeper && f.alive }

// processes are those of the service, and what sockets they have.
type processes struct {
	pids    map[int]bool
	holders map[uint64][]int // by socket inode
}

// look lists the processes of the service: those in its cgroup, but for this
// one and those that it is a child of. Without a unit the sockets may be
// anybody's who is visible.
func (r *run) look() (processes, error) {
	list := r.cgroup.Pids
	if r.cgroup.Unit() == "" {
		list = proc.All
	}
	pids, err := list()
	if err != nil {
		return processes{}, fmt.Errorf("processes of %s: %w", r.cgroup, err)
	}
	p := processes{pids: map[int]bool{}, holders: map[uint64][]int{}}
	for _, pid := range pids {
		p.pids[pid] = true
	}
	for pid := os.Getpid(); p.pids[pid]; pid = proc.Parent(pid) {
		delete(p.pids, pid)
	}
	for pid := range p.pids {
		inodes, err := proc.SocketInodes(pid)
		if err != nil {
			return processes{}, fmt.Errorf("sockets of process %d: %w", pid, err)
		}
		for _, inode := range inodes {
			p.holders[inode] = append(p.holders[inode], pid)
		}
	}
	return p, nil
}

// keeperComm is the name that keepers go by. They hold their server's sockets
// to see what waits in them, and outlive it for a moment.
const keeperComm = "grm-keeper"

// servers are the processes that have a bank's sockets open, but for keepers.
func (p processes) servers(b state.Bank) []int {
	var pids []int
	for _, inode := range b.Inodes() {
		for _, pid := range p.holders[inode] {
			if !slices.Contains(pids, pid) && proc.Comm(pid) != keeperComm {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// kept says whether a generation's keeper lives, as far as its control word tells.
func (p processes) kept(word control.Bank) bool {
	return p.pids[word.Keeper] && proc.Comm(word.Keeper) == keeperComm
}

// served says whether a generation has a server: somebody has its sockets, or
// its keeper lives and so does the server that it names, which may have closed
// what it did not know.
func (p processes) served(b state.Bank, word control.Bank) bool {
	return len(p.servers(b)) > 0 || p.kept(word) && p.pids[word.Server]
}

// gather collects the facts.
func (r *run) gather(p processes) (facts, error) {
	f := facts{automatic: r.known && r.unit.Restarts > 0, banks: map[int]fact{}}
	if r.service == nil {
		return f, nil
	}
	ctl := r.service.Control()
	for n, b := range r.st.Banks {
		word := ctl.Bank(n)
		full, err := r.full(b)
		if err != nil {
			return facts{}, err
		}
		f.banks[n] = fact{
			generation: b.Generation,
			held:       p.served(b, word),
			keeper:     p.kept(word),
			full:       full,
			watched:    word.WatchUntil > control.Now(),
			alive:      ctl.Alive(n),
			serving:    word.State == control.Serving,
		}
	}
	for _, n := range ctl.Order().Banks() {
		// A bank that root did not fill, or one that is named twice, is a lie.
		if _, known := f.banks[n]; known && !slices.Contains(f.order, n) {
			f.order = append(f.order, n)
		}
	}
	return f, nil
}

// full says whether every slot of a bank has its socket.
func (r *run) full(b state.Bank) (bool, error) {
	ls, err := listeners(b)
	if err != nil {
		return false, err
	}
	for _, l := range ls {
		g, err := r.group(l)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		cookies, err := g.Slots(l.App, b.Bank)
		if err != nil {
			return false, err
		}
		if len(cookies) != int(l.Sockets) || slices.Contains(cookies, 0) {
			return false, nil
		}
	}
	return len(ls) > 0, nil
}

// decide says what this start is.
//
//   - The working generation's server is dead, and its sockets are all there: the same ones again, with what waits in
//     them, however often it crashes. Not if it died in its watch while an older one serves: that one takes over.
//   - systemd restarts the unit on its own account, and some generation is served: that one goes on. So a version that
//     failed is not tried again, and a decoy that was killed costs nothing.
//   - Else a new generation. An operator's start or restart always comes to that, or to the first case.
func decide(f facts) control.Plan {
	for i, n := range f.order {
		b := f.banks[n]
		if b.held {
			// After newer ones have failed (i > 0) one that drains already goes on as well as it can.
			if f.automatic && b.lives() && (b.serving || i > 0) {
				return control.Plan{Verb: control.StandIn, Bank: n}
			}
			break
		}
		older := slices.ContainsFunc(f.order[i+1:], func(m int) bool { return f.banks[m].lives() && f.banks[m].serving })
		if b.full && !(b.watched && older) {
			return control.Plan{Verb: control.Again, Bank: n}
		}
		if !b.watched {
			break
		}
	}
	return control.Plan{Verb: control.Start, Bank: -1}
}
