// Package load drives numbered flows of numbered datagrams through a UDP server and accounts for each of them.
//
// A flow is one source address and port, which no other flow uses before or after it. It sends its datagrams at a pace; each carries the
// flow's number, its own number and the time, and each answer brings these back with the name of the instance that answered. At the end
//
//	sent = answered + lost
//
// holds exactly, where a datagram is lost if no answer to it came until the deadline after the last one was sent; and a flow has moved if
// an answer came from another instance than the answer before it while that one could still serve it ([Generator.Gone]).
//
// Everything happens on one goroutine with one epoll, so that the accounts need no locks and the generator leaves the other CPU to the
// server. Memory is bounded: one bit for each datagram of the flows that live. Equal options with an equal seed send the same datagrams in the same
// order; only the time between them is the machine's.
package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Options describe a load. Zero values are replaced by what the comments say.
type Options struct {
	Targets  []netip.AddrPort // the server's addresses; flows are dealt to them in turn
	Protocol Protocol         // Echo by default
	NetNS    string           // path of the network namespace to send from, the caller's own by default

	Flows    int           // how many run at once, 200 by default; one that ends is followed by a new one at once
	Pace     time.Duration // mean time between two datagrams of a flow, 20 ms by default
	Length   int           // mean number of datagrams of a flow, 500 by default; 1 makes every datagram a flow
	Size     int           // datagrams are padded to this size, if the protocol can; 0: as short as they are
	Seed     uint64        // of lengths and paces
	Duration time.Duration // stop by itself after this time; 0: only when told to

	Deadline time.Duration // how long after the last datagram an answer may come, 5 s by default
}

func (o Options) withDefaults() (Options, error) {
	if len(o.Targets) == 0 {
		return o, errors.New("load: no target")
	}
	if o.Protocol == nil {
		o.Protocol = Echo{}
	}
	o.Flows = orDefault(o.Flows, 200)
	o.Pace = orDefault(o.Pace, 20*time.Millisecond)
	o.Length = orDefault(o.Length, 500)
	o.Deadline = orDefault(o.Deadline, 5*time.Second)
	if o.Flows < 0 || o.Pace < 0 || o.Length < 0 || o.Deadline < 0 || o.Size > maxDatagram {
		return o, fmt.Errorf("load: %d flows of %d datagrams of %d bytes at %v: out of range", o.Flows, o.Length, o.Size, o.Pace)
	}
	return o, nil
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

const (
	maxDatagram = 9000
	// linger is how long a flow that has all its answers waits for one too many.
	linger = 100 * time.Millisecond
	tick   = time.Millisecond
)

// Generator is a running load.
type Generator struct {
	commands chan func(*engine)
	stop     chan struct{} // closed by the first Stop
	done     chan struct{} // closed when result and err are set
	result   Result
	err      error
}

// Start begins to send. The load ends when its duration is over, ctx ends or [Generator.Stop] is called, plus the time for the last answers.
func Start(ctx context.Context, o Options) (*Generator, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	g := &Generator{commands: make(chan func(*engine)), stop: make(chan struct{}, 1), done: make(chan struct{})}
	ready := make(chan error)
	go func() {
		// The thread is in the other namespace for good, so it must end with this goroutine: it stays locked.
		runtime.LockOSThread()
		e, err := newEngine(o)
		ready <- err
		if err == nil {
			g.result, g.err = e.run(ctx, g)
		}
		close(g.done)
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	return g, nil
}

// Stop ends the sending, waits for the answers that are under way and returns the account. It can be called again.
func (g *Generator) Stop() (Result, error) {
	select {
	case g.stop <- struct{}{}:
	default:
	}
	return g.Wait()
}

// Wait waits until the load has ended by itself, and returns the account.
func (g *Generator) Wait() (Result, error) {
	<-g.done
	return g.result, g.err
}

// Done is closed when the load has ended.
func (g *Generator) Done() <-chan struct{} { return g.done }

// do has the engine run a function between two datagrams; after its end the function is not run.
func (g *Generator) do(f func(*engine)) {
	ran := make(chan struct{})
	select {
	case g.commands <- func(e *engine) { f(e); close(ran) }:
		<-ran
	case <-g.done:
	}
}

// Mark begins a new window of the account: what is sent from now on is booked there.
func (g *Generator) Mark(name string) { g.do(func(e *engine) { e.mark(name) }) }

// Gone says that an instance can serve no flow from now on, because it was killed: its flows may move, and are counted as taken over.
func (g *Generator) Gone(instance string) { g.do(func(e *engine) { e.gone[instance] = true }) }

// Snapshot returns the account so far. Datagrams without an answer yet are in Pending.
func (g *Generator) Snapshot() Result {
	var r Result
	g.do(func(e *engine) { r = e.account() })
	select {
	case <-g.done:
		r = g.result
	default:
	}
	return r
}

// Until waits until the account meets a condition, at the longest for the given time.
func (g *Generator) Until(what string, limit time.Duration, met func(Result) bool) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		r := g.Snapshot()
		if met(r) {
			return nil
		}
		select {
		case <-g.done:
			return fmt.Errorf("load: ended before %s: %v", what, errors.Join(g.err, errors.New(r.String())))
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("load: %s: not within %v: %v", what, limit, r)
		}
	}
}

// flow is one numbered flow.
type flow struct {
	number   uint64
	fd       int
	target   netip.AddrPort
	instance string
	next     time.Duration // when the next datagram is due, since the start of the load
	length   int           // how many it is to send
	sent     int
	answered int
	got      []uint64      // a bit for each datagram that was answered
	from     []span        // in which window it sent from which datagram on
	movedIn  int           // the number of windows there were when it moved last, or 0
	ends     time.Duration // when it is given up or, with all answers, closed
}

type span struct{ window, first int }

func (f *flow) windowOf(seq int) int {
	i := len(f.from) - 1
	for f.from[i].first > seq {
		i--
	}
	return f.from[i].window
}

// engine is the generator's only goroutine.
type engine struct {
	Options
	rand  *rand.Rand
	start time.Time
	epoll int

	sources *sources
	flows   map[int]*flow // by descriptor
	queue   queue         // those that have something to send
	lasting []*flow       // those that wait for answers, by the time when they end
	nflows  uint64
	ending  bool

	result  Result
	windows []*Window
	gone    map[string]bool
	buf     []byte
	events  []unix.EpollEvent
}

func newEngine(o Options) (*engine, error) {
	if o.NetNS != "" {
		ns, err := unix.Open(o.NetNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("open network namespace %s: %w", o.NetNS, err)
		}
		defer unix.Close(ns)
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return nil, fmt.Errorf("enter network namespace %s: %w", o.NetNS, err)
		}
	}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	e := &engine{
		Options: o,
		rand:    rand.New(rand.NewPCG(o.Seed, 1)),
		start:   time.Now(),
		epoll:   epoll,
		sources: newSources(),
		flows:   map[int]*flow{},
		gone:    map[string]bool{},
		buf:     make([]byte, 2*maxDatagram),
		events:  make([]unix.EpollEvent, 256),
	}
	e.result.Instances = map[string]Instance{}
	e.mark("start")
	for range o.Flows {
		if err := e.open(time.Duration(e.rand.Int64N(int64(o.Pace) + 1))); err != nil {
			e.close()
			return nil, err
		}
	}
	return e, nil
}

func (e *engine) close() {
	for fd := range e.flows {
		_ = unix.Close(fd) // nothing is buffered in it
	}
	_ = unix.Close(e.epoll)
}

// run is the loop: send what is due, take what has come, do what was asked.
func (e *engine) run(ctx context.Context, g *Generator) (Result, error) {
	defer e.close()
	stopped := ctx.Done()
	for last := time.Since(e.start); ; {
		now := time.Since(e.start)
		e.result.Stalled, last = max(e.result.Stalled, now-last), now
		if e.Duration > 0 && now >= e.Duration {
			e.finish(now)
		}
		if err := e.send(now); err != nil {
			return e.account(), fmt.Errorf("load: %w", err)
		}
		if err := e.receive(); err != nil {
			return e.account(), fmt.Errorf("load: %w", err)
		}
		e.expire(time.Since(e.start))
		if e.ending && len(e.flows) == 0 {
			return e.account(), nil
		}
		select {
		case f := <-g.commands:
			f(e)
		case <-g.stop:
			e.finish(time.Since(e.start))
		case <-stopped:
			stopped = nil
			e.finish(time.Since(e.start))
		default:
		}
	}
}

// finish ends the sending: every flow is as long as it is now.
func (e *engine) finish(now time.Duration) {
	if e.ending {
		return
	}
	e.ending = true
	for len(e.queue) > 0 {
		f := e.queue.remove(0)
		f.length = f.sent
		e.last(f, now)
	}
}

// open begins a new flow whose first datagram is due at the given time.
func (e *engine) open(due time.Duration) error {
	target := e.Targets[e.nflows%uint64(len(e.Targets))]
	fd, err := e.sources.dial(target)
	if err != nil {
		return fmt.Errorf("flow %d: %w", e.nflows, err)
	}
	f := &flow{number: e.nflows, fd: fd, target: target, next: due, length: 1}
	if e.Length > 1 {
		f.length = e.Length/2 + e.rand.IntN(e.Length+1)
	}
	e.nflows++
	e.flows[fd] = f
	e.result.Flows++
	if err := unix.EpollCtl(e.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("flow %d: epoll: %w", f.number, err)
	}
	e.queue.add(f)
	return nil
}

// send sends all datagrams that are due.
func (e *engine) send(now time.Duration) error {
	for len(e.queue) > 0 && e.queue[0].next <= now {
		f := e.queue[0]
		if err := e.sendOne(f); err != nil {
			return err
		}
		if f.sent < f.length {
			f.next = max(f.next, now-2*e.Pace) + e.pause() // what is late is caught up with, within reason
			e.queue.fix(0)
			continue
		}
		e.queue.remove(0)
		e.last(f, now)
		if err := e.open(now + e.pause()); err != nil {
			return err
		}
	}
	return nil
}

// pause is the time to a flow's next datagram: a half of the pace is fixed, the rest is the seed's, so that flows do not march in step.
func (e *engine) pause() time.Duration {
	return e.Pace/2 + time.Duration(e.rand.Int64N(int64(e.Pace)+1))
}

func (e *engine) sendOne(f *flow) error {
	packet := e.Protocol.Request(e.buf[:0], Datagram{f.number, uint64(f.sent), time.Since(e.start)}, e.Size)
	for try := 0; ; try++ {
		_, err := unix.Write(f.fd, packet)
		if err == nil {
			break
		}
		// The error of an earlier datagram: nobody listened at that moment. It is reported once, in place of sending.
		if err == unix.ECONNREFUSED && try == 0 {
			e.windows[len(e.windows)-1].Refused++
			continue
		}
		if (err == unix.EAGAIN || err == unix.ENOBUFS || err == unix.EINTR) && try < 1000 {
			time.Sleep(50 * time.Microsecond) // the kernel has no room for the moment
			continue
		}
		return fmt.Errorf("flow %d: send to %s: %w", f.number, f.target, err)
	}
	w := len(e.windows) - 1
	if n := len(f.from); n == 0 || f.from[n-1].window != w {
		f.from = append(f.from, span{w, f.sent})
	}
	if f.sent%64 == 0 {
		f.got = append(f.got, 0)
	}
	f.sent++
	e.windows[w].Sent++
	return nil
}

// last notes that a flow has sent all that it is going to.
func (e *engine) last(f *flow, now time.Duration) {
	f.ends = now + e.Deadline
	if f.answered == f.sent {
		f.ends = now + linger
	}
	e.lasting = append(e.lasting, f)
}

// expire closes the flows that are through, and books as lost what was not answered.
func (e *engine) expire(now time.Duration) {
	e.lasting = slices.DeleteFunc(e.lasting, func(f *flow) bool {
		if now < f.ends {
			return false
		}
		for seq := range f.sent {
			if f.got[seq/64]&(1<<(seq%64)) == 0 {
				w := e.windows[f.windowOf(seq)]
				w.Lost++
				if len(e.result.Missing) < maxMissing {
					e.result.Missing = append(e.result.Missing, Missing{f.number, uint64(seq), f.sent, f.instance, w.Name})
				}
			}
		}
		delete(e.flows, f.fd)
		_ = unix.Close(f.fd) // this also takes it out of the epoll
		return true
	})
}

// receive waits for answers, at most until the next tick, and books those that are there.
func (e *engine) receive() error {
	n, err := unix.EpollWait(e.epoll, e.events, int(tick/time.Millisecond))
	if err == unix.EINTR {
		return nil
	}
	if err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	for _, ev := range e.events[:n] {
		f := e.flows[int(ev.Fd)]
		// One flow must not hold up the others, whatever is sent to it: the rest is taken in the next round.
		for range 64 {
			n, err := unix.Read(f.fd, e.buf)
			if err == unix.EAGAIN {
				break
			}
			if err == unix.ECONNREFUSED {
				e.windows[len(e.windows)-1].Refused++
				continue
			}
			if err != nil {
				return fmt.Errorf("flow %d: receive: %w", f.number, err)
			}
			e.take(f, e.buf[:n])
		}
	}
	return nil
}

// take books one answer.
func (e *engine) take(f *flow, packet []byte) {
	now := time.Since(e.start)
	instance, d, err := e.Protocol.Answer(packet)
	if err != nil || d.Flow != f.number || d.Seq >= uint64(f.sent) || d.Sent > now || d.Sent < 0 {
		e.result.Strange++
		return
	}
	seq := int(d.Seq)
	w := e.windows[f.windowOf(seq)]
	if f.got[seq/64]&(1<<(seq%64)) != 0 {
		w.Duplicated++
		return
	}
	f.got[seq/64] |= 1 << (seq % 64)
	f.answered++
	w.Answered++
	w.latency(now - d.Sent)
	if f.answered == f.sent && f.ends != 0 {
		f.ends = now + linger
	}

	in := e.result.Instances[instance]
	in.Answers++
	switch {
	case f.instance == "":
		in.Flows++
	case f.instance == instance:
	case e.gone[f.instance]:
		w.TakenOver++
	case e.gone[instance]: // an answer of the killed one that was under way, after one of its successor
		e.result.Instances[instance] = in
		return
	default:
		if now := len(e.windows); f.movedIn != now {
			if f.movedIn == 0 {
				e.result.Moved++
			}
			f.movedIn = now
			w.Moved++
			if len(e.result.Movers) < maxMissing {
				e.result.Movers = append(e.result.Movers, Move{f.number, d.Seq, f.instance, instance, w.Name})
			}
		}
	}
	f.instance = instance
	e.result.Instances[instance] = in
}

func (e *engine) mark(name string) {
	e.windows = append(e.windows, &Window{Name: name, Start: time.Since(e.start)})
	if n := len(e.windows); n > 1 {
		e.windows[n-2].End = e.windows[n-1].Start
	}
}
