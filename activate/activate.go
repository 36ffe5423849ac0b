// Package activate is the root side of a service: it turns a service's
// listeners into sockets in the right group and bank, hands them to systemd's
// fd store, and cleans up after a stop or a start that came to nothing.
//
//	Start     ExecStartPre=: decides what this start is (a new generation, the same sockets again after a crash, or a
//	          decoy for an instance that lives) and prepares it; all listeners or none.
//	Stop      ExecStop=: tells the decoy whether this is a stop or a restart, before systemd's SIGTERM does not.
//	StopPost  ExecStopPost=: after a stop ends everything, after anything else ends only what never became ready.
//
// Nothing here believes the control map, which the service's user can write: it is asked which bank works and which
// pids are keepers, and whoever lies there hurts only its own service. What decides about other processes and
// descriptors is root's own record (package state), the slots of the groups, and who is in the unit's cgroup.
//
// A start is a list of steps, each with its undo. Before the first one a record of what is to come is written, so
// that the next run, or StopPost, can undo a start that was killed; what the decoy and the programs see of it is
// published as the very last step, which cannot fail.
package activate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"grm/bpfprog"
	"grm/config"
	"grm/internal/notify"
	"grm/internal/proc"
	"grm/internal/state"
	"grm/internal/systemd"
)

// Request is what a start is asked for.
type Request struct {
	Service   string
	Listeners []config.Listener // with names
	User      string            // whose the sockets are to be; "": the unit's, else the caller's
	Unit      string            // "": that of the cgroup
	// MaxInstances ends the oldest instances when a new one makes them more than that; 0: refuse when the banks are full.
	MaxInstances int
	NoRegister   bool     // the sockets' generation is for the server to set, with the option SOCKET_GEN
	Advance      bool     // flip at once: the server says nothing when it is ready
	Command      []string // to become, with the sockets; none: they go to systemd's fd store
	Verbose      bool
}

// Env is the world that the package works in. The zero value but for Log is
// the real one.
type Env struct {
	Log io.Writer // one line per event
	// Fault is called before each step; an error is the step's. For tests.
	Fault func(step string) error
	// Ask answers for systemd: the unit, and whether the system goes down. nil: systemd does.
	Ask func(unit string) (systemd.Unit, bool, error)
}

const (
	askTimeout     = 5 * time.Second
	lockTimeout    = 20 * time.Second
	barrierTimeout = 10 * time.Second
)

// run is one call of Start, Stop or StopPost.
type run struct {
	Request
	env       Env
	unit      systemd.Unit // zero without systemd
	known     bool         // whether unit is what systemd said
	backedOff bool         // whether the wait before an automatic start is over
	going     bool         // whether the whole system goes down

	cgroup proc.Cgroup
	store  *notify.Conn // nil, which does nothing: a command gets the sockets
	dir    *state.Dir
	lock   *state.Lock
	// groupsLock is held where groups are shared with other services, after lock.
	groupsLock *state.Lock
	st         *state.State
	service    *bpfprog.Service // nil: there is none yet
	groups     map[config.Address]*bpfprog.Group
	undoList   []undo
	noted      bool // the number of the generation to come is used up
}

type undo struct {
	step string
	do   func() error
}

// begin collects what every call needs, up to and including the lock.
func begin(ctx context.Context, req Request, env Env) (*run, error) {
	r := &run{Request: req, env: env, groups: map[config.Address]*bpfprog.Group{}}
	if err := r.open(ctx); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *run) open(ctx context.Context) (err error) {
	if r.cgroup, err = proc.Own(); err != nil {
		return unfit(err)
	}
	if len(r.Command) == 0 {
		if r.store, err = notify.Open(); err != nil {
			return unfit(err)
		}
	}
	if r.dir, err = state.Open(state.Root); err != nil {
		return classify(err)
	}
	r.lock, err = r.takeLock(ctx, r.Service)
	return err
}

// lockGroups keeps other services from building or removing a group that this
// one shares with them.
func (r *run) lockGroups(ctx context.Context) (err error) {
	shared := func(l config.Listener) bool { return l.MaxApps > 1 }
	all := slices.Clone(r.Listeners)
	for _, b := range r.st.Banks {
		ls, err := listeners(b)
		if err != nil {
			return classify(err)
		}
		all = append(all, ls...)
	}
	if slices.ContainsFunc(all, shared) {
		r.groupsLock, err = r.takeLock(ctx, state.GroupsLock)
	}
	return err
}

func (r *run) takeLock(ctx context.Context, name string) (*state.Lock, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lockTimeout, fmt.Errorf("it was not over within %v", lockTimeout))
	defer cancel()
	lock, err := r.dir.Lock(ctx, name)
	return lock, classify(err)
}

func (r *run) close() error {
	var err error
	for _, g := range r.groups {
		err = errors.Join(err, g.Close())
	}
	if r.service != nil {
		err = errors.Join(err, r.service.Close())
	}
	if r.groupsLock != nil {
		err = errors.Join(err, r.groupsLock.Remove())
	}
	if r.lock != nil {
		err = errors.Join(err, r.lock.Unlock())
	}
	if r.dir != nil {
		err = errors.Join(err, r.dir.Close())
	}
	return errors.Join(err, r.store.Close())
}

// ask asks systemd about the unit. Without systemd, or in a cgroup that is no
// unit's, there is nothing to ask.
func (r *run) ask() error {
	if r.Unit == "" {
		r.Unit = r.cgroup.Unit()
	}
	if r.Unit == "" {
		return nil
	}
	ask := r.env.Ask
	if ask == nil {
		ask = askSystemd
	}
	unit, going, err := ask(r.Unit)
	if errors.Is(err, systemd.ErrAbsent) {
		r.log(warning, "%v: this start counts as an operator's, and the unit's settings are not checked", err)
		return nil
	}
	if err != nil {
		return err
	}
	r.unit, r.going, r.known = unit, going, true
	return nil
}

// askSystemd asks again for a while: a systemd that executes itself again drops
// its connections.
func askSystemd(unit string) (systemd.Unit, bool, error) {
	for deadline := time.Now().Add(askTimeout); ; time.Sleep(20 * time.Millisecond) {
		u, going, err := askOnce(unit)
		if err == nil || errors.Is(err, systemd.ErrAbsent) || time.Now().After(deadline) {
			return u, going, err
		}
	}
}

func askOnce(unit string) (systemd.Unit, bool, error) {
	c, err := systemd.Open(askTimeout)
	if err != nil {
		return systemd.Unit{}, false, err
	}
	defer c.Close()
	u, err := c.Unit(unit)
	if err != nil {
		return systemd.Unit{}, false, err
	}
	going, err := c.Stopping()
	return u, going, err
}

// load reads root's record and opens the service's control map, where there are any.
func (r *run) load() error {
	st, err := r.dir.Read(r.Service)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		st = state.New(r.Service)
	case errors.Is(err, state.ErrInvalid):
		return classify(fmt.Errorf("%w (remove it: which generations live is then found out from what is pinned)", err))
	case err != nil:
		return classify(err)
	}
	r.st = st
	return r.openPinned()
}

func (r *run) openPinned() (err error) {
	if err := checkPins(); err != nil {
		return err
	}
	r.service, err = bpfprog.OpenService(r.Service)
	if errors.Is(err, fs.ErrNotExist) {
		r.service = nil
		return nil
	}
	return badPin(err)
}

// group is the group of a listener, opened once.
func (r *run) group(l config.Listener) (*bpfprog.Group, error) {
	if g := r.groups[l.Address]; g != nil {
		return g, nil
	}
	g, err := bpfprog.OpenGroup(string(l.Address.Proto), l.Address.AddrPort)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err != nil {
		return nil, badPin(err)
	}
	r.groups[l.Address] = g
	return g, nil
}

// forgetGroup closes a group whose pins are gone.
func (r *run) forgetGroup(a config.Address) error {
	g := r.groups[a]
	delete(r.groups, a)
	return g.Close()
}

// step does one step of a start and notes how to undo it.
func (r *run) step(ctx context.Context, name string, do func() error, back func() error) error {
	begun := time.Now()
	err := ctx.Err()
	if err != nil {
		err = fmt.Errorf("interrupted before %s: %w", name, context.Cause(ctx))
	} else if r.env.Fault != nil {
		err = r.env.Fault(name)
	}
	if err == nil {
		err = do()
	}
	if err != nil {
		return classify(err)
	}
	r.log(debug, "%s: %v", name, time.Since(begun).Round(10*time.Microsecond))
	if back != nil {
		r.undoList = append(r.undoList, undo{name, back})
	}
	return nil
}

// undo undoes the steps that were done, the last one first.
func (r *run) undo() error {
	var err error
	for _, u := range slices.Backward(r.undoList) {
		if e := u.do(); e != nil {
			err = errors.Join(err, fmt.Errorf("undo %s: %w", u.step, e))
		}
	}
	r.undoList = nil
	return err
}

// Priorities of syslog(3), which systemd reads off the front of a line.
const (
	failure = 3
	warning = 4
	notice  = 5
	info    = 6
	debug   = 7
)

func (r *run) log(priority int, format string, args ...any) {
	if priority == debug && !r.Verbose {
		return
	}
	Log(r.env.Log, priority, r.Service, fmt.Sprintf(format, args...))
}

// Log writes one line for the journal, or for a terminal.
func Log(w io.Writer, priority int, service, text string) {
	prefix := ""
	if os.Getenv("INVOCATION_ID") != "" {
		prefix = fmt.Sprintf("<%d>", priority)
	}
	if service != "" {
		service += ": "
	}
	// A journal's line ends at a newline, which an error that joins several has in it.
	_, _ = fmt.Fprintf(w, "%sgrm-activate: %s%s\n", prefix, service, strings.ReplaceAll(text, "\n", "; ")) // nowhere to report to
}

// names of descriptors in the fd store.
const controlName = "grm.ctl"

// keeperName is what the decoy stores its link to a generation's keeper as.
func keeperName(generation uint64) string { return fmt.Sprintf("grm.keeper.%d", generation) }

func flowsName(listener string) string { return "grm.flows." + listener }

func socketName(listener string, generation uint64, index int) string {
	return fmt.Sprintf("grm.%s.%d.%d", listener, generation, index)
}

// listeners reads the listeners of a bank back from root's record.
func listeners(b state.Bank) ([]config.Listener, error) {
	all := make([]config.Listener, len(b.Listeners))
	for i, l := range b.Listeners {
		if err := all[i].UnmarshalText([]byte(l.Address)); err != nil {
			return nil, fmt.Errorf("%w: bank %d: %w", state.ErrInvalid, b.Bank, err)
		}
		all[i].Name = l.Name
	}
	return all, nil
}

// drop frees a bank whose sockets nobody reads, or will, and throws them away:
// they leave the fd store too.
func (r *run) drop(b state.Bank) error {
	err := r.withdraw(b)
	ls, _ := listeners(b) // withdraw has said what is wrong with them
	for i, l := range ls {
		for index := range max(len(b.Listeners[i].Inodes), l.Sockets.Of(0)) {
			err = errors.Join(err, r.store.Forget(socketName(l.Name, b.Generation, index)))
		}
	}
	return err
}

// withdraw frees a bank whose sockets nobody reads, or will: it leaves the order
// and the slots. They stay in the fd store for the next decoy, which counts what
// waits in them and throws them away: grm-activate is not given what is stored.
func (r *run) withdraw(b state.Bank) error {
	if r.service != nil {
		ctl := r.service.Control()
		ctl.Withdraw(b.Bank)
		ctl.Release(b.Bank)
	}
	ls, err := listeners(b)
	err = errors.Join(err, r.store.Forget(keeperName(b.Generation)))
	for _, l := range ls {
		g, e := r.group(l)
		if e == nil {
			e = g.Clear(l.App, b.Bank)
		}
		// One of another layout is emptied by its sockets, which are closed.
		if e != nil && !errors.Is(e, fs.ErrNotExist) && !errors.Is(e, bpfprog.ErrLayout) {
			err = errors.Join(err, fmt.Errorf("clear bank %d of %s: %w", b.Bank, l.Address, e))
		}
	}
	return errors.Join(err, r.forgetMaps(ls, b.Bank))
}

// forgetMaps takes those maps out of the fd store that no bank other than the
// given one needs.
func (r *run) forgetMaps(ls []config.Listener, bank int) error {
	needed := map[string]bool{}
	for n, b := range r.st.Banks {
		for _, l := range b.Listeners {
			if n != bank {
				needed[controlName], needed[flowsName(l.Name)] = true, true
			}
		}
	}
	var err error
	if !needed[controlName] {
		err = r.store.Forget(controlName)
	}
	for _, l := range ls {
		if !needed[flowsName(l.Name)] {
			err = errors.Join(err, r.store.Forget(flowsName(l.Name)))
		}
	}
	return err
}

// sweep unpins the groups that the service has no bank in, but for those that
// are asked for, and that no other service has sockets in.
func (r *run) sweep(keep []config.Listener) error {
	used := map[string]bool{}
	for _, l := range keep {
		used[l.Address.String()] = true
	}
	for _, b := range r.st.Banks {
		ls, err := listeners(b)
		if err != nil {
			return err
		}
		for _, l := range ls {
			used[l.Address.String()] = true
		}
	}
	var err error
	r.st.Groups = slices.DeleteFunc(r.st.Groups, func(g state.Group) bool {
		if used[g.Address] {
			return false
		}
		e := r.removeGroup(g)
		err = errors.Join(err, e)
		return e == nil
	})
	return err
}

// removeGroup unpins a group, unless another service has sockets in it.
func (r *run) removeGroup(old state.Group) error {
	var l config.Listener
	if err := l.Address.UnmarshalText([]byte(old.Address)); err != nil {
		return fmt.Errorf("%w: group: %w", state.ErrInvalid, err)
	}
	g, err := r.group(l)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, bpfprog.ErrLayout) {
		return bpfprog.RemoveEmptyGroup(string(l.Address.Proto), l.Address.AddrPort)
	}
	if err != nil {
		return err
	}
	if shared, err := inUse(g, old.App); err != nil || shared {
		return err
	}
	if err := g.Remove(); err != nil {
		return err
	}
	return r.forgetGroup(l.Address)
}

// inUse says whether a service other than the one with number app has sockets
// in a group.
func inUse(g *bpfprog.Group, app int) (bool, error) {
	for other := range max(g.Spec.MaxApps, 1) {
		if other == app {
			continue
		}
		full, err := g.HasSockets(other)
		if err != nil || full {
			return full, err
		}
	}
	return false, nil
}
