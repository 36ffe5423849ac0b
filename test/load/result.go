package load

import (
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"strings"
	"time"
)

// Counts are what a load, or a window of it, amounts to.
type Counts struct {
	Sent       uint64 // datagrams handed to the kernel
	Answered   uint64 // of these, answered once or more
	Lost       uint64 // of these, not answered until the deadline
	Duplicated uint64 // answers beyond the first
	Moved      uint64 // flows that changed their instance although it could still serve them; a flow may do so in several windows
	TakenOver  uint64 // changes away from an instance that was killed
	Refused    uint64 // port-unreachable errors: nobody listened
}

func (c *Counts) add(d Counts) {
	c.Sent += d.Sent
	c.Answered += d.Answered
	c.Lost += d.Lost
	c.Duplicated += d.Duplicated
	c.Moved += d.Moved
	c.TakenOver += d.TakenOver
	c.Refused += d.Refused
}

// Pending is how many datagrams are neither answered nor lost yet; at the end there are none.
func (c Counts) Pending() uint64 { return c.Sent - c.Answered - c.Lost }

// Window is the account of what was sent between two marks. What an answer shows, a move or one answer too many, is booked in the window in
// which its datagram was sent.
type Window struct {
	Counts
	Name       string
	Start, End time.Duration // since the start of the load
	Worst      time.Duration // the longest time that an answer took
	buckets    [64 * fine]uint64
}

// fine is how many buckets a doubling of the latency has: a quantile is at most an eighth too high.
const fine = 8

func (w *Window) latency(d time.Duration) {
	w.Worst = max(w.Worst, d)
	w.buckets[bucket(uint64(d))]++
}

func bucket(v uint64) int {
	if v < fine {
		return int(v)
	}
	shift := bits.Len64(v) - 4
	return (shift+1)*fine + int(v>>shift) - fine
}

// bound is the largest value of a bucket.
func bound(b int) uint64 {
	if b < fine {
		return uint64(b)
	}
	shift := b/fine - 1
	return uint64(b%fine+fine+1)<<shift - 1
}

// Quantile returns the time within which a share q of the answers came, rounded up by at most an eighth.
func (w *Window) Quantile(q float64) time.Duration {
	rank, seen := uint64(math.Ceil(q*float64(w.Answered))), uint64(0)
	for b, n := range w.buckets {
		if seen += n; seen >= rank {
			return min(time.Duration(bound(b)), w.Worst)
		}
	}
	return w.Worst
}

// Instance is what one instance of the server did.
type Instance struct {
	Answers uint64
	Flows   uint64 // flows whose first answer was its
}

// Missing names a lost datagram.
type Missing struct {
	Flow, Seq uint64
	Of        int    // how many datagrams the flow sent
	Instance  string // who answered the flow last, or nobody
	Window    string
}

// Move names a flow that moved, with the datagram whose answer showed it.
type Move struct {
	Flow, Seq uint64
	From, To  string
	Window    string
}

// maxMissing bounds how many examples of what went wrong a Result carries.
const maxMissing = 16

// Result is the account of a load.
type Result struct {
	Counts
	Flows     uint64        // flows begun
	Strange   uint64        // packets that answer nothing that was sent
	Stalled   time.Duration // the longest time in which the generator itself did nothing, because the machine was busy
	Instances map[string]Instance
	Windows   []Window
	Missing   []Missing // the first ones of the lost datagrams
	Movers    []Move    // the first ones of the flows that moved
}

// account sums up, in copies that the engine does not touch any more.
func (e *engine) account() Result {
	r := e.result
	r.Counts = Counts{}
	r.Instances = maps.Clone(r.Instances)
	r.Missing, r.Movers = slices.Clone(r.Missing), slices.Clone(r.Movers)
	r.Windows = nil
	e.windows[len(e.windows)-1].End = time.Since(e.start)
	for _, w := range e.windows {
		r.Windows = append(r.Windows, *w)
		r.Counts.add(w.Counts)
	}
	r.Moved = e.result.Moved // flows, not the sum of those that moved in each window
	return r
}

// Window returns the window of a name; if there are several, the last.
func (r Result) Window(name string) (Window, bool) {
	for _, w := range slices.Backward(r.Windows) {
		if w.Name == name {
			return w, true
		}
	}
	return Window{}, false
}

// Err says what of a result breaks the promise that nothing is lost, moved or answered twice.
func (r Result) Err() error {
	if r.Lost == 0 && r.Moved == 0 && r.Duplicated == 0 && r.Strange == 0 && r.Pending() == 0 {
		return nil
	}
	return fmt.Errorf("load: %v", r)
}

func (r Result) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%d flows, %d datagrams: %d answered, %d lost, %d pending, %d answered twice, %d strange; %d flows moved, %d taken over, %d refused; stalled %v at most",
		r.Flows, r.Sent, r.Answered, r.Lost, r.Pending(), r.Duplicated, r.Strange, r.Moved, r.TakenOver, r.Refused, r.Stalled.Round(time.Millisecond))
	for _, name := range slices.Sorted(maps.Keys(r.Instances)) {
		fmt.Fprintf(&s, "\ninstance %s: %d answers, %d new flows", name, r.Instances[name].Answers, r.Instances[name].Flows)
	}
	for _, w := range r.Windows {
		if w.Lost+w.Moved+w.Duplicated > 0 {
			fmt.Fprintf(&s, "\nwindow %q (%v to %v): %d sent, %d lost, %d moved, %d answered twice", w.Name, w.Start.Round(time.Millisecond), w.End.Round(time.Millisecond),
				w.Sent, w.Lost, w.Moved, w.Duplicated)
		}
	}
	for _, m := range r.Missing {
		fmt.Fprintf(&s, "\nlost: datagram %d of %d of flow %d of instance %q in window %q", m.Seq, m.Of, m.Flow, m.Instance, m.Window)
	}
	for _, m := range r.Movers {
		fmt.Fprintf(&s, "\nmoved: flow %d from %s to %s with datagram %d in window %q", m.Flow, m.From, m.To, m.Seq, m.Window)
	}
	return s.String()
}
