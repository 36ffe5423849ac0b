package activate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/config"
	"grm/control"
	"grm/internal/proc"
	"grm/internal/state"
)

const (
	killTimeout  = 5 * time.Second
	defaultGrace = 30 * time.Second // where the unit has no TimeoutStopSec=
	// An instance that was ready for so long ran well: the wait before the next automatic start begins anew.
	ranWell = 10 * time.Second
)

// Stop is ExecStop=. It needs no lock: it leaves a word in the control map.
func Stop(req Request, env Env) (err error) {
	r := &run{Request: req, env: env}
	if r.cgroup, err = proc.Own(); err != nil {
		return unfit(err)
	}
	if err := r.ask(); err != nil {
		return err
	}
	s, err := bpfprog.OpenService(r.Service)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it never got so far
	}
	if err != nil {
		return classify(err)
	}
	switch ctl := s.Control(); {
	case r.ends():
		// No new flow from now on; the decoy tells the servers.
		ctl.SetRequest(control.Stop)
		ctl.SetClosing(true)
	case strings.Contains(r.unit.Job, "restart"):
		ctl.SetRequest(control.Restart)
	}
	return s.Close()
}

// ends says whether the unit is being stopped for good, as far as its job tells.
func (r *run) ends() bool { return r.unit.Job == "stop" || r.going }

// StopPost is ExecStopPost=. It has the last word: after a stop nothing of the
// service is left; after anything else only what became ready once.
func StopPost(ctx context.Context, req Request, env Env) (err error) {
	r, err := begin(ctx, req, env)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	return r.stopPost(ctx)
}

func (r *run) stopPost(ctx context.Context) error {
	if err := r.ask(); err != nil {
		return err
	}
	final := r.ends() || r.known && r.unit.Job == "" && !restarts(r.unit.Restart, os.Getenv("SERVICE_RESULT"))
	err := r.load()
	if r.st != nil && r.st.Plan != nil && r.st.Unit != r.Unit {
		r.log(notice, "%s runs under this name: nothing to do for %s", cmp.Or(r.st.Unit, "something without a unit"), r.Unit)
		return nil
	}
	if final && (err != nil || r.service != nil && len(r.st.Groups) == 0) {
		return r.endUnknown(ctx, err)
	}
	if err == nil {
		err = r.lockGroups(ctx)
	}
	if err != nil {
		return err
	}
	if final {
		return r.end()
	}
	return r.afterAttempt()
}

// endUnknown is end where the record is lost, or wrong is what is the matter
// with it or with the pins: a stop ends everything that can be found.
func (r *run) endUnknown(ctx context.Context, wrong error) (err error) {
	other := errors.Is(wrong, bpfprog.ErrLayout)
	switch {
	case r.st == nil:
		r.st = state.New(r.Service)
		e := r.openPinned()
		other, wrong = errors.Is(e, bpfprog.ErrLayout), errors.Join(wrong, e)
	case wrong != nil && !other:
		r.st = state.New(r.Service) // pins that cannot be believed are left alone
	}
	r.groupsLock, err = r.takeLock(ctx, state.GroupsLock) // any of them may be shared
	err = errors.Join(wrong, err, r.findGroups(), r.end())
	if other {
		// Nobody is left who could go by it, and no later start could do anything about it.
		err = errors.Join(err, bpfprog.RemoveService(r.Service))
	}
	return err
}

// findGroups records the groups that follow the service's control map.
func (r *run) findGroups() error {
	if r.service == nil {
		return nil
	}
	keys, err := bpfprog.Groups()
	for _, key := range keys {
		l := config.Listener{Address: config.Address{Proto: config.Proto(key.Network), AddrPort: key.Address}}
		g, e := r.group(l)
		if errors.Is(e, fs.ErrNotExist) || errors.Is(e, bpfprog.ErrLayout) {
			continue // whose it is cannot be known
		}
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		for app := range g.Spec.MaxApps {
			of := state.Group{Address: l.Address.String(), App: app}
			if g.Joined(app, r.service) && !slices.Contains(r.st.Groups, of) {
				r.st.Groups = append(r.st.Groups, of)
			}
		}
	}
	return err
}

// restarts says whether systemd will start the unit again on its own account,
// by Restart= and the result, as systemd.service(5) has it in a table.
func restarts(policy, result string) bool {
	clean := result == "success"
	signal := result == "signal" || result == "core-dump"
	switch policy {
	case "always", "":
		return true
	case "on-success":
		return clean
	case "on-failure":
		return !clean
	case "on-abnormal":
		return signal || result == "timeout" || result == "watchdog" || result == "oom-kill"
	case "on-abort":
		return signal
	case "on-watchdog":
		return result == "watchdog"
	}
	return false
}

// end ends all processes of the service, and removes whatever it has.
func (r *run) end() error {
	grace := r.grace()
	if r.service != nil {
		r.service.Control().SetClosing(true)
	}
	var all []error
	note := func(err error) { all = append(all, err) }
	note(r.endAll(grace))
	if b := r.st.Pending; b != nil {
		note(r.drop(*b))
		r.st.Pending = nil
	}
	for _, n := range sortedKeys(r.st.Banks) {
		note(r.drop(r.st.Banks[n]))
		delete(r.st.Banks, n)
	}
	note(r.store.Forget(controlName))
	note(r.store.Barrier(barrierTimeout))
	note(r.sweep(nil))
	if r.service != nil {
		note(r.service.Remove())
	}
	note(r.dir.Remove(r.Service))
	note(r.lock.Remove())
	r.lock = nil
	if err := errors.Join(all...); err != nil {
		return err
	}
	r.log(info, "stopped: nothing of it is left")
	return nil
}

// grace is how long the servers still have to end by themselves. None, if they
// have been told by the decoy and had their time; all that the unit gives, if
// the stop came when the decoy did not know that it is one, and ExecStop= was
// not run.
func (r *run) grace() time.Duration {
	if r.service == nil || r.service.Control().Closing() || os.Getenv("SERVICE_RESULT") == "timeout" {
		return 0
	}
	if r.unit.StopTimeout == 0 {
		return defaultGrace
	}
	return max(0, r.unit.StopTimeout-killTimeout)
}

// endAll ends whatever is in the unit's cgroup, but for this process and those
// that it is a child of. Keepers see the closing flag and pass the stop signal
// on; who has none gets SIGTERM. New children may come while it goes on.
func (r *run) endAll(grace time.Duration) error {
	if r.cgroup.Unit() == "" {
		return nil // a cgroup that others are in as well
	}
	told := map[int]bool{}
	for deadline := time.Now().Add(grace); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		p, err := r.look()
		if err != nil || len(p.pids) == 0 {
			return err
		}
		keepers := map[int]bool{}
		for pid := range p.pids {
			keepers[pid] = proc.Comm(pid) == keeperComm
		}
		for pid := range p.pids {
			if !told[pid] && !p.descends(pid, keepers) {
				told[pid] = true
				if err := r.signal(pid, unix.SIGTERM); err != nil {
					return err
				}
			}
		}
	}
	deadline := time.Now().Add(killTimeout)
	for {
		p, err := r.look()
		if err != nil || len(p.pids) == 0 {
			return err
		}
		if err := r.kill(sortedKeys(p.pids), deadline); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of %s are still there %v after SIGKILL", len(p.pids), r.cgroup, killTimeout)
		}
	}
}

// signal sends a signal to a process if it is in the cgroup.
func (r *run) signal(pid int, sig unix.Signal) error {
	p, err := r.cgroup.Find(pid)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, proc.ErrElsewhere) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(p.Signal(sig), p.Close())
}

// kill sends SIGKILL to processes of the cgroup, and waits for their end.
func (r *run) kill(pids []int, deadline time.Time) error {
	for _, pid := range pids {
		comm := proc.Comm(pid)
		p, err := r.cgroup.Find(pid)
		if errors.Is(err, unix.ESRCH) || errors.Is(err, proc.ErrElsewhere) {
			continue
		}
		if err != nil {
			return err
		}
		err = p.Signal(unix.SIGKILL)
		if err == nil && p.Wait(time.Until(deadline)) {
			r.log(notice, "process %d (%s) was left: killed", pid, comm)
		}
		if err = errors.Join(err, p.Close()); err != nil {
			return err
		}
	}
	return nil
}

// afterAttempt looks at what became of the last start, when another one may
// follow: what never became ready ends and leaves, what did stays.
func (r *run) afterAttempt() error {
	noted := r.st.Pending != nil
	if noted {
		if err := r.repair(); err != nil {
			return err
		}
	}
	if r.service == nil || r.st.Plan == nil {
		return nil
	}
	plan, ctl := *r.st.Plan, r.service.Control()
	if r.unit.Job == "restart" && ctl.Request() == control.Stop {
		ctl.SetRequest(control.Restart) // a stop that a restart overtook
	}
	ctl.SetClosing(false)
	result := r.result()
	if invocation := os.Getenv("INVOCATION_ID"); plan.Invocation != invocation {
		// ExecStartPre= failed, and has left the reason, unless it was killed.
		if r.st.Failed == nil || r.st.Failed.Invocation != invocation {
			r.fail(r.attempted(noted), result.reason("prepared"))
		}
		return r.dir.Write(r.st)
	}
	b, known := r.st.Banks[plan.Bank]
	if !known || b.Generation != plan.Generation {
		return nil
	}
	p, err := r.look()
	if err != nil {
		return err
	}
	word := ctl.Bank(plan.Bank)
	ready := plan.Verb == control.StandIn.String() || word.ReadyAt > plan.At
	switch {
	case !ready:
		err = r.endAttempt(p, b, plan, result)
	case result.service == "watchdog":
		// It hangs: as good as dead, but for its sockets, which the next one gets.
		hung := p.servers(b)
		if p.kept(word) && p.pids[word.Server] {
			hung = append(hung, word.Server)
		}
		err = r.kill(hung, time.Now().Add(killTimeout))
		r.fail(b.Generation, result.reason("served"))
	case !p.served(b, word) && r.replaced(p, b):
		// It died in its watch, and an older one has taken over.
		err = r.release(b, r.withdraw)
		if result.service != "success" {
			r.fail(b.Generation, result.reason("served"))
		}
	case control.Now()-word.ReadyAt >= ranWell:
		r.st.Restarts = r.unit.Restarts
	}
	return errors.Join(err, r.dir.Write(r.st))
}

// endAttempt ends the processes of a start that never became ready, and takes
// its generation back. Sockets that it had from a crashed one stay: what waits
// in them is for the next.
func (r *run) endAttempt(p processes, b state.Bank, plan state.Plan, result result) error {
	err := r.kill(r.attempt(p, b, plan), time.Now().Add(killTimeout))
	if plan.Verb == control.Start.String() {
		err = errors.Join(err, r.release(b, r.drop))
	}
	if result.service != "success" {
		r.fail(b.Generation, result.reason("ready"))
	}
	return err
}

// attempt are the processes that a start has brought about: those that are
// younger than it, and not of an instance that became ready before.
func (r *run) attempt(p processes, b state.Bank, plan state.Plan) []int {
	ctl := r.service.Control()
	kept := map[int]bool{}
	for n, other := range r.st.Banks {
		word := ctl.Bank(n)
		if n == b.Bank || word.ReadyAt == 0 {
			continue
		}
		if !p.served(other, word) {
			continue
		}
		for _, pid := range p.servers(other) {
			kept[pid] = true
		}
		if p.kept(word) {
			kept[word.Keeper], kept[word.Server] = true, true // the server may be no child of a keeper that took it over
		}
	}
	var pids []int
	for _, pid := range sortedKeys(p.pids) {
		if p.descends(pid, kept) {
			continue
		}
		if started := proc.Started(pid); started == 0 || started+proc.Tick > plan.At {
			pids = append(pids, pid)
		}
	}
	return pids
}

// descends says whether a process, or one that it is a child of, is in a set.
func (p processes) descends(pid int, set map[int]bool) bool {
	for steps := 0; p.pids[pid] && steps < len(p.pids); steps++ {
		if set[pid] {
			return true
		}
		pid = proc.Parent(pid)
	}
	return false
}

// replaced says whether a generation that is dead has been, or is to be, replaced by an
// older one: its keeper has taken it out of the order, or could not since it
// died as well, within the watch and with an older one that is whole.
func (r *run) replaced(p processes, b state.Bank) bool {
	ctl := r.service.Control()
	working := false
	for _, n := range ctl.Order().Banks() {
		if n == b.Bank {
			working = true
			continue
		}
		word := ctl.Bank(n)
		older, known := r.st.Banks[n]
		if known && older.Generation < b.Generation && p.served(older, word) && p.kept(word) {
			return !working || word.State == control.Serving && ctl.Bank(b.Bank).WatchUntil > control.Now()
		}
	}
	return false
}

// release takes a generation back that will not be served: with drop one that
// never worked, with withdraw one that did.
func (r *run) release(b state.Bank, take func(state.Bank) error) error {
	err := take(b)
	delete(r.st.Banks, b.Bank)
	return errors.Join(err, r.store.Barrier(barrierTimeout), r.sweep(nil), r.pruneHooks())
}

// fail records that a start came to nothing.
func (r *run) fail(generation uint64, reason string) {
	if strings.Contains(r.unit.Job, "restart") {
		return // somebody did not wait for it
	}
	r.st.Failed = r.failed(generation, reason)
	r.log(warning, "gen %d: %s", generation, reason)
}

func (r *run) failed(generation uint64, reason string) *state.Failed {
	return &state.Failed{Generation: generation, Reason: reason, At: time.Now().UTC().Truncate(time.Second), Invocation: os.Getenv("INVOCATION_ID")}
}

// attempted is the number that the generation of a start which came to nothing
// had, or would have had if it had come so far as to note it. An automatic
// start that did not was one for a generation that is there.
func (r *run) attempted(noted bool) uint64 {
	if !noted && r.unit.Restarts == 0 {
		return r.st.Generation + 1
	}
	return r.st.Generation
}

// result is what systemd says of the service's end.
type result struct {
	service, code, status string
	server                string // the program, if it is known
}

func (r *run) result() result {
	result := result{os.Getenv("SERVICE_RESULT"), os.Getenv("EXIT_CODE"), os.Getenv("EXIT_STATUS"), "the server"}
	if i := slices.Index(r.unit.Command, "--"); i >= 0 && i+1 < len(r.unit.Command) {
		result.server = r.unit.Command[i+1]
	}
	return result
}

// reason puts the result into words, for an instance that was not, or was no
// more, what state says: prepared, ready, served.
func (r result) reason(state string) string {
	switch r.service {
	case "":
		return "not " + state
	case "success", "protocol":
		return "ended by itself"
	case "timeout":
		return "not " + state + " in time"
	case "watchdog":
		return "silent: its watchdog ended it"
	case "oom-kill":
		return "killed for want of memory"
	case "exit-code", "signal", "core-dump":
		if r.code == "" { // of a command before the main one, of which systemd says no more
			if r.service == "exit-code" {
				return "a command of ExecStartPre= failed"
			}
			return "a command of ExecStartPre= was killed"
		}
		if r.code == "killed" || r.code == "dumped" {
			return "killed by SIG" + r.status
		}
		if n, err := strconv.Atoi(r.status); err == nil {
			return exitReason(n, r.server)
		}
		if r.service == "signal" {
			return "killed by a signal"
		}
	}
	return strings.TrimSpace(r.service + " " + r.code + " " + r.status)
}

// exitReason explains an exit status of grm-decoy's: the server's own, or what a shell would say.
func exitReason(status int, server string) string {
	switch {
	case status == 124:
		return "not ready in time"
	case status == 126:
		return "exit status 126: " + server + " cannot be executed"
	case status == 127:
		return "exit status 127: " + server + " is not there"
	case status > 128 && unix.SignalName(unix.Signal(status-128)) != "":
		return "killed by " + unix.SignalName(unix.Signal(status-128))
	}
	return fmt.Sprintf("exit status %d", status)
}
