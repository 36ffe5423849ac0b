package activate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/config"
	"grm/control"
	"grm/internal/proc"
	"grm/internal/reuseport"
	"grm/internal/state"
)

// endTimeout is how long the oldest instance has to end when its bank is needed.
const endTimeout = 10 * time.Second

// Start is ExecStartPre=, or with a command the whole of a start without an fd
// store: then it does not return but for an error.
func Start(ctx context.Context, req Request, env Env) (err error) {
	var r *run
	defer func() {
		if err != nil && (r == nil || !r.backedOff) {
			hesitate(ctx, req, env, r)
		}
	}()
	if err := checkMachine(); err != nil {
		return err
	}
	if len(req.Command) > 0 {
		if err := reserve(req.sockets()); err != nil {
			return err
		}
	}
	if r, err = begin(ctx, req, env); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err = r.start(ctx); err != nil {
		r.noteFailure(err)
	}
	return err
}

// sockets is how many one instance has.
func (req Request) sockets() int {
	n := 0
	for _, l := range req.Listeners {
		n += l.Sockets.Of(runtime.NumCPU())
	}
	return n
}

func (r *run) start(ctx context.Context) error {
	r.Listeners = slices.Clone(r.Listeners)
	for i := range r.Listeners {
		l := &r.Listeners[i]
		l.Sockets = config.Count(l.Sockets.Of(runtime.NumCPU()))
	}
	if err := r.ask(); err != nil {
		return err
	}
	if err := r.checkUnit(); err != nil {
		return err
	}
	if err := r.load(); err != nil {
		return err
	}
	if err := r.backOff(ctx); err != nil {
		return err
	}
	if err := r.lockGroups(ctx); err != nil {
		return err
	}
	if r.st.Pending != nil {
		if err := r.repair(); err != nil {
			return fmt.Errorf("undo a start that was killed: %w", err)
		}
	}
	if err := r.adopt(); err != nil {
		return err
	}
	if err := r.checkName(); err != nil {
		return err
	}
	uid, name, err := r.owner()
	if err != nil {
		return err
	}
	p, err := r.look()
	if err != nil {
		return err
	}
	if err := r.checkPinned(p); err != nil {
		return err
	}
	f, err := r.gather(p)
	if err != nil {
		return err
	}
	plan := decide(f)
	if err := r.reclaim(f, plan); err != nil {
		return err
	}
	s := start{run: r, facts: f, processes: p, plan: plan, uid: uid, user: name}
	defer s.closeSockets()
	if plan.Verb == control.Start {
		err = s.fresh(ctx)
	} else {
		err = s.same(ctx)
	}
	if err != nil {
		return errors.Join(err, s.leaveSockets(), r.undo())
	}
	s.after()
	if len(r.Command) > 0 {
		err = s.exec()
		s.unpublish()
		return errors.Join(err, s.leaveSockets(), r.undo())
	}
	return nil
}

// backOff waits before an automatic start, the longer the more of them came to
// nothing in a row. It does so in here, where a stop runs StopPost: in
// systemd's own wait between two starts a stop runs none of our commands.
func (r *run) backOff(ctx context.Context) error {
	r.backedOff = true
	failed := failures(r.unit.Restarts, r.st.Restarts)
	delay := backOff(failed)
	if delay == 0 {
		return nil
	}
	r.log(notice, "start after %d that came to nothing in a row: waiting %v", failed, delay)
	if err := r.store.Send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d\nSTATUS=waiting %v before the next start", (delay + 30*time.Second).Microseconds(), delay)); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return fmt.Errorf("interrupted in the wait before the next start: %w", context.Cause(ctx))
	case <-time.After(delay):
		return nil
	}
}

// Hesitate is the wait of a start that never came to be, as its command line
// makes no sense.
func Hesitate(ctx context.Context, req Request, env Env) { hesitate(ctx, req, env, nil) }

// hesitate is the wait of a start that failed before backOff: of a unit that
// cannot be started at all the next start is no better, and systemd would not
// wait between the two. Who may not ask how many there were waits a second. r is
// what is known of the start, or nil.
func hesitate(ctx context.Context, req Request, env Env, r *run) {
	if os.Getenv("INVOCATION_ID") == "" {
		return // whoever started it sees what came of it
	}
	delay, good := time.Second, uint32(0)
	if r == nil || !r.known {
		r = &run{Request: req, env: env}
		if cgroup, err := proc.Own(); err == nil {
			r.cgroup = cgroup
			_ = r.ask() // then it is not known
		}
	} else if r.st != nil {
		good = r.st.Restarts
	}
	if r.known {
		delay = backOff(failures(r.unit.Restarts, good))
	}
	if delay == 0 {
		return
	}
	r.log(notice, "it cannot be started: waiting %v before the next attempt", delay)
	select {
	case <-ctx.Done():
	case <-time.After(delay):
	}
}

// failures is how many automatic starts came to nothing before automatic
// restart n, if all was well up to restart number good.
func failures(n, good uint32) int64 {
	if good > n { // somebody has started the unit since: systemd counts from 0 again
		good = 0
	}
	return max(0, int64(n)-int64(good)-1)
}

// backOff is the wait after so many failures: none, then 0.1 s to 5 s.
func backOff(failures int64) time.Duration {
	if failures < 1 {
		return 0
	}
	return min(5*time.Second, 100*time.Millisecond<<min(failures-1, 10))
}

// start is one start on its way.
type start struct {
	*run
	facts
	processes
	plan    control.Plan
	uid     uint32 // the server's
	user    string
	before  state.State // to go back to
	bank    state.Bank  // the new generation's
	sockets []int       // the new generation's, in order of listeners and indices; owned
}

// fresh prepares a new generation.
func (s *start) fresh(ctx context.Context) error {
	if err := s.checkUser(); err != nil {
		return err
	}
	if err := s.chooseBank(); err != nil {
		return err
	}
	s.before = *s.st
	if err := s.checkRoom(); err != nil {
		return err
	}
	groups := make([]*bpfprog.Group, len(s.Listeners))

	if err := s.step(ctx, "note what is to come", s.notePending, func() error { return s.restoreState() }); err != nil {
		return err
	}
	if err := s.step(ctx, "control map", s.openService, nil); err != nil {
		return err
	}
	for i, l := range s.Listeners {
		if err := s.step(ctx, "group "+l.Address.String(), func() (err error) {
			groups[i], err = s.openGroup(l)
			return err
		}, nil); err != nil {
			return err
		}
	}
	for i, l := range s.Listeners {
		if err := s.step(ctx, "sockets of "+l.Name, func() error { return s.bind(i) }, nil); err != nil {
			return err
		}
	}
	next := 0
	for i, l := range s.Listeners {
		// The sockets of this listener come after those of the ones before.
		own := s.sockets[next:][:int(l.Sockets)]
		next += len(own)
		if err := s.step(ctx, "bank of "+l.Name, func() error { return s.fill(groups[i], l, own) }, func() error { return groups[i].Clear(l.App, s.bank.Bank) }); err != nil {
			return err
		}
		if err := s.step(ctx, "program of "+l.Name, func() error { return groups[i].Attach(own[0]) }, nil); err != nil {
			return err
		}
	}
	if err := s.common(ctx); err != nil {
		return err
	}
	if err := s.step(ctx, "fd store", s.storeSockets, s.forgetSockets); err != nil {
		return err
	}
	if err := s.step(ctx, "record", s.record, func() error {
		s.st.Banks = s.before.Banks // so that what follows finds the maps unused; the file is restored at the end
		return nil
	}); err != nil {
		return err
	}
	if err := s.step(ctx, "publish", func() error { return nil }, nil); err != nil {
		return err
	}
	ctl := s.service.Control()
	ctl.Withdraw(s.bank.Bank)
	ctl.Assign(s.bank.Bank, s.bank.Generation, control.Prepared)
	if s.NoRegister {
		ctl.Park(s.bank.Bank)
	}
	s.publish()
	return nil
}

// same prepares a decoy for what is there: the sockets of a server that
// crashed, or an instance that lives.
func (s *start) same(ctx context.Context) error {
	if s.plan.Verb == control.StandIn {
		if err := s.checkUser(); err != nil {
			return err // the decoy could neither see the old instance nor speak for it
		}
	}
	s.before = *s.st
	s.bank = s.st.Banks[s.plan.Bank]
	ls, err := listeners(s.bank)
	if err != nil {
		return err
	}
	// The old layout serves once more, whatever was asked for.
	s.Listeners = ls
	for _, l := range ls {
		if err := s.step(ctx, "group "+l.Address.String(), func() error {
			g, err := s.openGroup(l)
			if err != nil {
				return err
			}
			return s.attachAgain(g, l)
		}, nil); err != nil {
			return err
		}
	}
	if err := s.common(ctx); err != nil {
		return err
	}
	if err := s.step(ctx, "record", s.record, func() error { return s.restoreState() }); err != nil {
		return err
	}
	if err := s.step(ctx, "publish", func() error { return nil }, nil); err != nil {
		return err
	}
	s.publish()
	return nil
}

// common are the steps of every start: the hooks of the cgroup that this run
// of the unit is in, and the maps for the decoy.
func (s *start) common(ctx context.Context) error {
	if err := s.step(ctx, "hooks", s.attachHooks, s.pruneHooks); err != nil {
		return err
	}
	return s.step(ctx, "maps to the fd store", s.storeMaps, func() error {
		return errors.Join(s.forgetMaps(s.Listeners, -1), s.store.Barrier(barrierTimeout))
	})
}

// publish tells the decoy what to do. It consists of stores to memory.
func (s *start) publish() {
	ctl := s.service.Control()
	ctl.SetClosing(false)
	ctl.SetRequest(control.NoRequest)
	failed := control.Failed{}
	if f := s.st.Failed; f != nil {
		failed = control.Failed{Generation: f.Generation, At: f.At, Reason: f.Reason}
	}
	ctl.SetFailed(failed)
	ctl.SetPlan(s.plan)
	// Nobody waits for a server's word with Advance, nor in a first start without a decoy.
	if s.plan.Verb == control.Start && (s.Advance || len(s.Command) > 0 && len(s.order) == 0) {
		ctl.SetState(s.bank.Bank, control.Serving)
		ctl.SetReady(s.bank.Bank, control.Now(), 0)
		ctl.Flip(s.bank.Bank)
	}
}

// unpublish takes back what publish told of a new generation, whose command could not be executed.
func (s *start) unpublish() {
	if s.plan.Verb == control.Start {
		s.service.Control().Withdraw(s.bank.Bank)
		s.service.Control().Release(s.bank.Bank)
	}
}

// checkName refuses the name of a service that another unit runs.
func (r *run) checkName() error {
	if len(r.st.Banks) == 0 || r.st.Unit == r.Unit || r.st.Plan == nil {
		return nil
	}
	for _, b := range r.st.Banks {
		ls, err := listeners(b)
		if err != nil {
			return classify(err)
		}
		for _, l := range ls {
			cookies, err := r.slots(l, b.Bank)
			if err != nil {
				return err
			}
			if slices.ContainsFunc(cookies, func(cookie uint64) bool { return cookie != 0 }) {
				return conflict(fmt.Errorf("service %s: %s runs under this name (choose another one, or stop that)", r.Service, cmp.Or(r.st.Unit, "something without a unit")))
			}
		}
	}
	return nil
}

// checkPinned refuses to begin anew beside instances whose pins are not to be
// seen: another program on their address would take the flows that they have.
func (r *run) checkPinned(p processes) error {
	if r.service != nil {
		return nil
	}
	for _, n := range sortedKeys(r.st.Banks) {
		if b := r.st.Banks[n]; len(p.servers(b)) > 0 {
			return conflict(fmt.Errorf("service %s: generation %d lives, but nothing of it is pinned in this network namespace: it runs in another one, or the pins were removed (then stop the service, and start it)", r.Service, b.Generation))
		}
	}
	return nil
}

// checkUser refuses another user for the sockets while there are some.
func (s *start) checkUser() error {
	live := s.live()
	if len(live) > 0 && s.st.UID != s.uid {
		return conflict(fmt.Errorf("user: the sockets of %d living instances belong to uid %d (%s), the new ones would to %d (%s), and one address takes one uid only (stop the service, then start it, or set the user back)",
			len(live), s.st.UID, s.st.User, s.uid, s.user))
	}
	return nil
}

// live are the banks of the instances that live, oldest first.
func (s *start) live() []int {
	var live []int
	for n, b := range s.banks {
		if b.held {
			live = append(live, n)
		}
	}
	slices.SortFunc(live, func(a, b int) int { return cmp.Compare(s.banks[a].generation, s.banks[b].generation) })
	return live
}

// surplus are the oldest instances that have to end for the new one, never the working one.
func (s *start) surplus() []int {
	if s.MaxInstances == 0 {
		return nil
	}
	old := slices.DeleteFunc(s.live(), func(n int) bool { return len(s.order) > 0 && n == s.order[0] })
	many := len(s.live()) + 1 - s.MaxInstances
	return old[:max(0, min(many, len(old)))]
}

// makeRoom ends the oldest instance at once when no bank is free without it.
// Its keeper does so if it can.
func (s *start) makeRoom() error {
	old := s.surplus()
	if len(s.st.Banks) < control.Banks || len(old) == 0 {
		return nil
	}
	n := old[0]
	b := s.st.Banks[n]
	s.log(notice, "gen %d ends for a new one: %d instances are as many as there may be", b.Generation, s.MaxInstances)
	s.service.Control().SetDrainUntil(n, control.Now())
	if err := s.store.Send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (endTimeout + killTimeout + 30*time.Second).Microseconds())); err != nil {
		return err
	}
	for deadline := time.Now().Add(endTimeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if p, err := s.look(); err != nil || !p.served(b, s.service.Control().Bank(n)) {
			break // an error shows again below
		}
	}
	p, err := s.look()
	if err != nil {
		return err
	}
	if err := s.kill(p.servers(b), time.Now().Add(killTimeout)); err != nil {
		return err
	}
	delete(s.st.Banks, n)
	delete(s.banks, n)
	return errors.Join(s.drop(b), s.store.Barrier(barrierTimeout), s.dir.Write(s.st))
}

// chooseBank finds a place for the new generation.
func (s *start) chooseBank() error {
	if err := s.makeRoom(); err != nil {
		return fmt.Errorf("end the oldest instance: %w", err)
	}
	last := 0
	if s.st.Plan != nil {
		last = s.st.Plan.Bank
	}
	for i := 1; i <= control.Banks; i++ {
		n := (last + i) % control.Banks
		if _, used := s.st.Banks[n]; !used {
			s.plan.Bank = n
			s.bank = state.Bank{Bank: n, Generation: s.st.Generation + 1, Created: time.Now().UTC().Truncate(time.Second)}
			for _, l := range s.Listeners {
				s.bank.Listeners = append(s.bank.Listeners, state.Listener{Name: l.Name, Address: l.String()})
			}
			return nil
		}
	}
	return conflict(fmt.Errorf("%d instances live, which is as many as there can be: the new one has no place (wait until some have drained, end them with grm drain %s --now, or set drain.max_instances)", len(s.live()), s.Service))
}

// notePending records what is to come, for whoever finds it half done.
func (s *start) notePending() error {
	next := *s.st
	next.Pending = &s.bank
	// The number is used up, whatever becomes of it.
	next.Generation = s.bank.Generation
	for _, l := range s.Listeners {
		g := state.Group{Address: l.Address.String(), App: l.App}
		if !slices.Contains(next.Groups, g) {
			next.Groups = append(slices.Clip(next.Groups), g)
		}
	}
	if err := s.dir.Write(&next); err != nil {
		return err
	}
	*s.st = next
	s.noted = true
	return nil
}

// restoreState is the undo of all that was recorded. A service of which
// nothing was known leaves nothing.
func (s *start) restoreState() error {
	generation := s.st.Generation
	*s.st = s.before
	if len(s.before.Groups) == 0 && len(s.before.Banks) == 0 && s.before.Plan == nil {
		return s.dir.Remove(s.Service)
	}
	s.st.Generation = generation
	return s.dir.Write(s.st)
}

func (s *start) openService() error {
	if s.service != nil {
		return nil
	}
	svc, err := bpfprog.CreateService(s.Service)
	if err != nil {
		return err
	}
	s.service = svc
	s.undoList = append(s.undoList, undo{"control map", func() error {
		s.service = nil
		return errors.Join(svc.Remove(), svc.Close())
	}})
	return nil
}

// openGroup opens or builds the group of a listener, with this build's program
// and the service's control map in it.
func (s *start) openGroup(l config.Listener) (*bpfprog.Group, error) {
	spec, err := spec(l)
	if err != nil {
		return nil, err
	}
	g, err := s.group(l)
	if errors.Is(err, bpfprog.ErrLayout) {
		if err = bpfprog.RemoveEmptyGroup(string(l.Address.Proto), l.Address.AddrPort); err == nil {
			err = fs.ErrNotExist
		}
	}
	if err == nil {
		if differs := g.Matches(spec); differs != nil {
			g, err = nil, s.replaceGroup(g, l, differs)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if g == nil {
		if g, err = s.createGroup(spec, l); err != nil {
			return nil, err
		}
	} else if refreshed, err := g.Refresh(); err != nil {
		return nil, err
	} else if refreshed {
		s.log(info, "%s: the program of this build replaces another one's, with the flows that are there", l.Address)
	}
	// Joining clears what the app has from a service of another epoch.
	if others, err := g.HasSockets(l.App); err != nil {
		return nil, err
	} else if others && !g.Joined(l.App, s.service) {
		return nil, conflict(fmt.Errorf("%s: another service has sockets there as app %d (stop that one, or share the address: --apps-max, and another --app for each)", l.Address, l.App))
	}
	return g, g.Join(l.App, s.service)
}

// replaceGroup makes way for a group with other settings, if nobody lives in
// the old one.
func (s *start) replaceGroup(g *bpfprog.Group, l config.Listener, differs error) error {
	for app := range max(g.Spec.MaxApps, 1) {
		lives, err := g.HasSockets(app)
		if err != nil {
			return err
		}
		if lives && app == l.App {
			return conflict(fmt.Errorf("%w, and instances live that go by the old settings (set them back, or stop the service, then start it)", differs))
		}
		if lives {
			return conflict(fmt.Errorf("%w, and another service has sockets there, as app %d (give both services the same settings)", differs, app))
		}
	}
	if err := g.Remove(); err != nil {
		return err
	}
	return s.forgetGroup(l.Address)
}

func (s *start) createGroup(spec bpfprog.GroupSpec, l config.Listener) (*bpfprog.Group, error) {
	g, err := bpfprog.CreateGroup(spec)
	if errors.Is(err, fs.ErrExist) { // and yet it could not be opened
		return nil, badPin(fmt.Errorf("group %s: its pins are there, but not all of them: %w", l.Address, err))
	}
	if err != nil {
		return nil, err
	}
	s.groups[l.Address] = g
	s.undoList = append(s.undoList, undo{"group " + l.Address.String(), func() error {
		return errors.Join(g.Remove(), s.forgetGroup(l.Address), s.pruneHooks())
	}})
	return g, nil
}

// bind makes the sockets of a listener.
func (s *start) bind(i int) error {
	l := s.Listeners[i]
	lives, err := s.lives(l)
	if err != nil {
		return err
	}
	if !lives {
		// One with the same uid and SO_REUSEPORT would let us in, and our program would take its packets away.
		if o, found := proc.Twin(string(l.Address.Proto), l.Address.AddrPort, s.ours); found {
			return inUseBy(fmt.Errorf("bind %s: the address is in use by %s (end it, or choose another address)", l.Address, o))
		}
	}
	uid := socketsUID(l, s.uid)
	inodes := make([]uint64, int(l.Sockets))
	warned := false
	for index := range inodes {
		fd, err := openSocket(l, uid, func(text string) {
			if !warned {
				s.log(warning, "%s", text)
			}
			warned = true
		})
		if errors.Is(err, unix.EADDRINUSE) {
			if o, found := proc.Holder(string(l.Address.Proto), l.Address.AddrPort, s.ours); found {
				err = fmt.Errorf("%w by %s (end it, or choose another address)", err, o)
			}
			err = inUseBy(err)
		}
		if err != nil {
			return err
		}
		s.sockets = append(s.sockets, fd)
		if inodes[index], err = proc.Inode(fd); err != nil {
			return err
		}
	}
	s.bank.Listeners[i].Inodes = inodes
	return nil
}

// lives says whether sockets of the service, or of another one of the group,
// are bound to a listener's address already.
func (s *start) lives(l config.Listener) (bool, error) {
	g := s.groups[l.Address]
	for app := range max(g.Spec.MaxApps, 1) {
		if lives, err := g.HasSockets(app); err != nil || lives {
			return lives, err
		}
	}
	return false, nil
}

// ours says whether a socket is one that does not stand in the service's way.
func (s *start) ours(inode uint64) bool {
	if len(s.holders[inode]) > 0 {
		return true
	}
	for _, b := range s.st.Banks {
		if slices.Contains(b.Inodes(), inode) {
			return true
		}
	}
	return slices.ContainsFunc(s.sockets, func(fd int) bool {
		own, err := proc.Inode(fd)
		return err == nil && own == inode
	})
}

// leaveSockets prepares sockets that nobody will read for being closed, here
// and in the fd store: packets come meanwhile, and none is for them.
func (s *start) leaveSockets() error {
	var err error
	for _, fd := range s.sockets {
		err = errors.Join(err, reuseport.Leave(fd))
	}
	return err
}

func (s *start) closeSockets() {
	for _, fd := range s.sockets {
		_ = unix.Close(fd) // nothing was sent on it; systemd, if anybody, has its own copy
	}
	s.sockets = nil
}

// fill puts a listener's sockets into their slots. What the group still says of
// the bank is of a generation that root's record does not know, and that has
// no sockets: openGroup has looked.
func (s *start) fill(g *bpfprog.Group, l config.Listener, sockets []int) error {
	if err := g.Clear(l.App, s.bank.Bank); err != nil {
		return err
	}
	if err := g.SetBank(l.App, s.bank.Bank, s.bank.Generation, len(sockets)); err != nil {
		return err
	}
	for index, fd := range sockets {
		if err := g.Put(l.App, s.bank.Bank, index, fd); err != nil {
			return errors.Join(err, g.Clear(l.App, s.bank.Bank))
		}
	}
	return nil
}

// attachAgain attaches the program to a group whose sockets are all elsewhere,
// in systemd's store: through one that is in the group for a moment, and in no slot.
func (s *start) attachAgain(g *bpfprog.Group, l config.Listener) error {
	l.RcvBuf, l.Freebind = 0, true
	fd, err := openSocket(l, socketsUID(l, s.st.UID), func(string) {})
	if err != nil {
		return err
	}
	err = errors.Join(g.Attach(fd), reuseport.Leave(fd))
	return errors.Join(err, unix.Close(fd))
}

func (s *start) attachHooks() error {
	dir, err := s.cgroup.Open()
	if err != nil {
		return err
	}
	defer dir.Close()
	id, err := proc.Inode(int(dir.Fd()))
	if err != nil {
		return err
	}
	// After a crash the cgroup may be another one: the sockets that are there keep the hooks of the old one, those that
	// the next server makes get the new one's.
	if !slices.Contains(s.bank.Cgroups, id) {
		s.bank.Cgroups = append(slices.Clip(s.bank.Cgroups), id)
	}
	var groups []*bpfprog.Group
	for _, a := range sortedAddresses(s.groups) {
		groups = append(groups, s.groups[a])
	}
	return s.service.AttachHooks(dir, groups)
}

// pruneHooks takes the hooks off cgroups in which no socket of a generation was
// made, and those of groups that are no more.
func (r *run) pruneHooks() error {
	used := map[uint64]bool{}
	for _, b := range r.st.Banks {
		for _, id := range b.Cgroups {
			used[id] = true
		}
	}
	if r.service == nil {
		return nil
	}
	return r.service.PruneHooks(func(id uint64) bool { return used[id] })
}

func sortedAddresses(groups map[config.Address]*bpfprog.Group) []config.Address {
	all := make([]config.Address, 0, len(groups))
	for a := range groups {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b config.Address) int {
		if c := a.AddrPort.Compare(b.AddrPort); c != 0 {
			return c
		}
		return len(a.Proto) - len(b.Proto)
	})
	return all
}

// storeMaps gives the decoy its control map and the flow tables. Each opening
// of a pin is another file to systemd, which would store it beside the old one.
func (s *start) storeMaps() error {
	err := errors.Join(s.store.Forget(controlName), s.store.Store(controlName, s.service.ControlFD()))
	for _, l := range s.Listeners {
		if fd, ok := s.groups[l.Address].FlowsFD(); ok {
			err = errors.Join(err, s.store.Forget(flowsName(l.Name)), s.store.Store(flowsName(l.Name), fd))
		}
	}
	if err != nil {
		return err
	}
	return s.store.Barrier(barrierTimeout)
}

// storeSockets gives the new generation's sockets to systemd, and asks whether it has taken them.
func (s *start) storeSockets() error {
	next := 0
	for _, l := range s.Listeners {
		for index := range int(l.Sockets) {
			if err := s.store.Store(socketName(l.Name, s.bank.Generation, index), s.sockets[next]); err != nil {
				return errors.Join(err, s.forgetSockets())
			}
			next++
		}
	}
	if err := s.store.Barrier(barrierTimeout); err != nil {
		return errors.Join(err, s.forgetSockets())
	}
	return nil
}

func (s *start) forgetSockets() error {
	var err error
	for _, l := range s.Listeners {
		for index := range int(l.Sockets) {
			err = errors.Join(err, s.store.Forget(socketName(l.Name, s.bank.Generation, index)))
		}
	}
	return errors.Join(err, s.store.Barrier(barrierTimeout))
}

// record writes down what was done.
func (s *start) record() error {
	next := *s.st
	next.Pending = nil
	next.Unit = s.Unit
	next.Plan = &state.Plan{Verb: s.plan.Verb.String(), Bank: s.plan.Bank, Generation: s.bank.Generation, Invocation: os.Getenv("INVOCATION_ID"), At: control.Now()}
	next.Banks = maps.Clone(s.st.Banks)
	next.Banks[s.bank.Bank] = s.bank
	if s.plan.Verb == control.Start {
		next.User, next.UID = s.user, s.uid
	}
	if err := s.dir.Write(&next); err != nil {
		return err
	}
	*s.st = next
	return nil
}

// reclaim takes back the generations that nobody serves, nor will: they leave
// the slots and the order before anything new comes. What waits for one that
// worked is for the next decoy to count, unless a new generation needs the room
// in the fd store.
func (r *run) reclaim(f facts, plan control.Plan) error {
	taken := false
	for _, n := range sortedKeys(f.banks) {
		b := f.banks[n]
		if b.held || plan.Verb != control.Start && n == plan.Bank {
			continue
		}
		take := r.withdraw
		if plan.Verb == control.Start || r.service.Control().Bank(n).ReadyAt == 0 {
			take = r.drop
		}
		if err := take(r.st.Banks[n]); err != nil {
			return fmt.Errorf("release generation %d: %w", b.generation, err)
		}
		delete(r.st.Banks, n)
		delete(f.banks, n)
		taken = true
		r.log(info, "gen %d has no server any more: its sockets are released", b.generation)
	}
	if !taken {
		return nil
	}
	return errors.Join(r.store.Barrier(barrierTimeout), r.sweep(r.Listeners), r.dir.Write(r.st))
}

// repair undoes a start that was killed on its way.
func (r *run) repair() error {
	b := *r.st.Pending
	r.st.Pending = nil
	if err := errors.Join(r.drop(b), r.store.Barrier(barrierTimeout), r.sweep(nil), r.pruneHooks(), r.dir.Write(r.st)); err != nil {
		return err
	}
	r.log(notice, "gen %d was being started when that was killed: undone", b.Generation)
	return nil
}

// after does what is left once the start is published. None of it can make the
// start fail.
func (s *start) after() {
	if err := s.pruneHooks(); err != nil {
		s.log(warning, "hooks of cgroups that are gone: %v", err)
	}
	if s.plan.Verb == control.Start {
		for _, n := range s.surplus() {
			s.service.Control().SetDrainUntil(n, control.Now())
			s.log(notice, "gen %d ends for the new one: %d instances are as many as there may be", s.banks[n].generation, s.MaxInstances)
		}
	}
	switch s.plan.Verb {
	case control.Start:
		s.log(info, "gen %d: %d sockets in bank %d", s.bank.Generation, s.bank.Sockets(), s.bank.Bank)
	case control.Again:
		s.log(notice, "gen %d: its server is gone, the next one gets its %d sockets and what waits in them", s.bank.Generation, s.bank.Sockets())
	case control.StandIn:
		s.log(notice, "gen %d lives: nothing is started, the decoy speaks for it", s.bank.Generation)
	}
}

// noteFailure leaves the reason for whoever stands in for the older instance.
// A service of which nothing is known leaves nothing, not even its lock.
func (r *run) noteFailure(err error) {
	if r.st != nil && r.st.Plan != nil && r.st.Unit != r.Unit {
		return // it is the record of another unit
	}
	if r.st == nil || len(r.st.Banks) == 0 {
		if _, none := r.dir.Read(r.Service); errors.Is(none, fs.ErrNotExist) {
			_ = r.lock.Remove() // an empty file: it does no harm
			r.lock = nil
		}
		return
	}
	r.st.Failed = r.failed(r.attempted(r.noted), err.Error())
	if e := r.dir.Write(r.st); e != nil {
		r.log(warning, "%v", e)
	}
}
