package decoy

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/proc"
)

// keeperComm is what a keeper goes by in ps, and what decoys know one by.
const keeperComm = "grm-keeper"

const (
	// tick is how often a keeper looks at the control map.
	tick = 200 * time.Millisecond
	// handOverTime is how long after the end of a watch an older instance begins to
	// drain: its sockets have left the fd store by then.
	handOverTime = 250 * time.Millisecond
	// emptying bounds the wait for queues that another process fills.
	emptying = 2 * time.Second
	// killAfter is when a server that ignores the stop signal is killed: one
	// that was not ready, or a drained one.
	killAfter = 10 * time.Second
	// clearingFor bounds the wait for processes that a server left behind.
	clearingFor = 5 * time.Second
)

type phase int

const (
	starting phase = iota
	serving
	draining
	leaving
	stopping
	clearing
	over
)

// keeper is the parent of one server.
type keeper struct {
	o     Options
	st    stage
	env   environ
	pid   int
	loop  loop
	link  *link
	decoy process // who speaks for this instance; none once that has ended

	ctl        *control.Map // nil: a server without grm's sockets, only supervised
	bank       int
	generation uint64
	again      bool // the bank was serving before: its sockets hold what came meanwhile
	sockets    []socket
	flows      census

	server  process
	adopted bool // the server is no child
	relay   *relay
	probe   probe

	phase      phase
	saidReady  bool   // by a main process that had ended by then
	aborted    bool   // told to end before the server was ready
	selfDrain  bool   // the server said that it drains by itself
	told       bool   // the drain signal was sent
	signalled  bool   // the stop signal was sent
	left       bool   // the sockets are in no group any more
	failure    string // why the server is being ended
	status     int    // what this process exits with
	readyBy    timer  // the ready timeout, or when the delay is over
	emptyBy    timer
	killAt     timer
	connected  timer // when to count the server's connections again
	lookAt     timer // when to look at the server's sockets again
	given      []given
	goneAt     timer // when to let the decoy go after STOPPING=1
	statusSent string
}

func runKeeper(o Options, st stage) (int, error) {
	k := &keeper{o: o, st: st, env: environ(os.Environ()).unblockUrgent(), pid: os.Getpid(), bank: -1}
	// Beyond what a shell shows, this is what decoys and grm know keepers by.
	_ = os.WriteFile("/proc/self/comm", []byte(keeperComm), 0) // only a name
	if err := k.begin(); err != nil {
		return ExitFailure, fmt.Errorf("keeper: %w", err)
	}
	defer k.relay.close()
	for k.phase != over {
		if err := k.loop.wait(k.patience()); err != nil {
			return ExitFailure, fmt.Errorf("keeper: %w", err)
		}
		k.step(control.Now())
	}
	return k.status, nil
}

// begin takes what the decoy hands over and starts the server.
func (k *keeper) begin() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	adopted := k.env.get(adoptVar)
	if parent, err := open(os.Getppid()); err == nil && adopted == "" {
		k.decoy = parent
		k.loop.add(parent.pidfd, k.decoyEnded)
	}
	fds, err := listenFDs(k.env, k.pid)
	if err != nil {
		return err
	}
	in := sortOut(fds)
	k.link = openLink(in.link)
	if k.link.fd >= 0 {
		k.loop.add(k.link.fd, k.fromDecoy)
	}
	if in.control >= 0 {
		if err := k.openBank(in); err != nil {
			return err
		}
	}
	for _, fd := range in.flows {
		k.flows.tables = append(k.flows.tables, fd)
	}
	// Signals to the keeper itself mean nothing: they reach the server by way of
	// the decoy, and those to a whole cgroup have reached it already.
	if err := k.loop.signals(func(unix.Signal) error { return nil }); err != nil {
		return err
	}
	if err := k.loop.urgentFrom(k.urgent); err != nil {
		return err
	}
	k.relay, err = newRelay(k)
	if err != nil {
		return err
	}
	if adopted != "" {
		return k.adopt(adopted)
	}
	return k.start(in.servers)
}

// adopt takes over a server whose keeper was killed. It is no child, so its
// status will not be known; and what it says goes to the socket of its old
// keeper, which is gone.
func (k *keeper) adopt(pid string) error {
	n, err := strconv.Atoi(pid)
	if err != nil || k.ctl == nil {
		return fmt.Errorf("%s=%s: no server to adopt", adoptVar, pid)
	}
	if k.server, err = openMember(n, ""); err != nil {
		return err
	}
	k.adopted, k.phase, k.lookAt = true, serving, after(lookEvery)
	k.loop.add(k.server.pidfd, k.childEnded)
	k.ctl.SetPids(k.bank, k.pid, n)
	if k.ctl.Bank(k.bank).State == control.Draining {
		k.phase, k.told = draining, k.o.DrainSignal != 0
	}
	say("%s lost its keeper and has a new one (pid %d)", k, n)
	return nil
}

func (k *keeper) openBank(in inherited) error {
	var err error
	if k.ctl, err = control.Open(in.control); err != nil {
		return err
	}
	_ = unix.Close(in.control) // the mapping stays
	if k.bank, err = strconv.Atoi(k.env.get(bankVar)); err != nil || k.bank < 0 || k.bank >= control.Banks {
		return fmt.Errorf("%s=%s: no bank", bankVar, k.env.get(bankVar))
	}
	k.again = k.env.get(verbVar) == control.Again.String()
	k.generation = k.ctl.Bank(k.bank).Generation
	if k.env.get(adoptVar) != "" {
		k.sockets = in.sockets[k.generation] // what of them is still in the fd store
		return nil
	}
	k.sockets, err = in.instance(k.generation, k.o.Listen)
	return err
}

// start starts the server.
func (k *keeper) start(own []named) error {
	files, names := []int{0, 1, 2}, []string{}
	for _, s := range k.sockets {
		files, names = append(files, s.fd), append(names, s.listener)
	}
	for _, d := range own {
		files, names = append(files, d.fd), append(names, d.name)
	}
	env := k.env.forServer(k.st, names, k.relay.listener.Address())
	if k.ctl != nil {
		env = env.set(envGeneration, strconv.FormatUint(k.generation, 10))
		if k.o.DrainSignal != 0 {
			env = env.set(envDrainSignal, signalWord(k.o.DrainSignal))
		}
		env = env.set(envStopSignal, signalWord(k.o.StopSignal))
	}
	var err error
	if k.server, err = spawn(os.Args[0], env, files, syscall.SysProcAttr{}); err != nil {
		return err
	}
	closeAll(own)
	k.loop.add(k.server.pidfd, k.childEnded)
	if k.ctl == nil {
		k.phase = serving
		return nil
	}
	k.ctl.SetPids(k.bank, k.pid, k.server.pid)
	k.ctl.SetReady(k.bank, 0, 0)
	if k.o.Ready == Delay {
		k.readyBy = after(k.o.ReadyDelay)
	} else if k.o.ReadyTimeout > 0 {
		k.readyBy = after(k.o.ReadyTimeout)
	}
	if k.o.Ready == Exec {
		k.probe.schedule(0)
	}
	return nil
}

// patience is how long the keeper may sleep.
func (k *keeper) patience() time.Duration {
	most := tick
	switch {
	case k.ctl == nil && k.phase == serving && k.goneAt == 0:
		most = time.Minute
	case k.phase == leaving, k.phase == clearing:
		most = 10 * time.Millisecond
	}
	now := control.Now()
	return until(now, most, k.readyBy, k.emptyBy, k.killAt, k.goneAt, k.probe.next, k.probe.killAt, k.relay.resume)
}

// step does what is due.
func (k *keeper) step(now time.Duration) {
	k.relay.step(now)
	k.probe.step(now, k)
	if k.ctl != nil && k.ctl.Closing() && k.phase < stopping {
		k.stop()
	}
	if k.killAt.due(now) {
		k.killAt = 0
		say("%s does not end on %s: killing it", k, signalName(k.o.StopSignal))
		k.server.kill(unix.SIGKILL)
	}
	if k.phase == serving || k.phase == draining {
		k.lookAtSockets(now)
	}
	switch k.phase {
	case starting:
		k.waitReady(now)
	case serving:
		k.serve(now)
	case draining:
		k.drain(now)
	case leaving:
		k.leave(now)
	case clearing:
		k.clear(now)
	}
}

// waitReady looks whether the time is up.
func (k *keeper) waitReady(now time.Duration) {
	if !k.readyBy.due(now) {
		return
	}
	k.readyBy = 0
	if k.o.Ready == Delay {
		k.ready()
		return
	}
	k.status = ExitNotReady
	k.fail(fmt.Sprintf("not ready within %v", k.o.ReadyTimeout))
}

// ready is the flip, unless the server that said it has ended meanwhile.
func (k *keeper) ready() {
	if k.phase != starting || k.ctl.Closing() {
		return
	}
	if k.server.ended() {
		k.saidReady = true // it may be a daemon that another process goes on for
		return
	}
	now := control.Now()
	k.phase, k.readyBy, k.lookAt = serving, 0, after(lookEvery)
	k.probe.cancel()
	watched := k.o.Watch
	k.ctl.SetState(k.bank, control.Serving)
	k.ctl.SetReady(k.bank, now, now+watched)
	k.ctl.Flip(k.bank)
	say("%s serves (pid %d)", k, k.server.pid)
	k.tell(msgReady, "")
	if watched > 0 && len(k.o.WatchProbe) > 0 {
		k.probe.schedule(0)
	}
}

func (k *keeper) watched(now time.Duration) bool { return now < k.ctl.Bank(k.bank).WatchUntil }

// serve looks whether another instance has taken over for good.
func (k *keeper) serve(now time.Duration) {
	if k.goneAt.due(now) {
		k.goneAt = 0
		k.gone()
	}
	if k.ctl == nil {
		return
	}
	if k.replaced(now) {
		k.beginDrain(now)
	}
}

// replaced says whether another instance works, and is not watched any more.
func (k *keeper) replaced(now time.Duration) bool {
	head := k.ctl.Working()
	if head < 0 || head == k.bank {
		return false
	}
	b := k.ctl.Bank(head)
	return b.State == control.Serving && now >= b.WatchUntil+handOverTime
}

// older is the bank of an older instance that could work instead of this one,
// or -1.
func (k *keeper) older() int {
	banks := k.ctl.Order().Banks()
	at := slices.Index(banks, k.bank)
	for _, b := range banks[at+1:] {
		bank := k.ctl.Bank(b)
		if b == k.bank || bank.State != control.Serving || !k.ctl.Alive(b) {
			continue
		}
		// Its keeper ends with its server. A server may hide from /proc.
		p, err := openMember(bank.Keeper, keeperComm)
		if err != nil {
			p, err = openMember(bank.Server, "")
		}
		if err == nil {
			p.close()
			return b
		}
	}
	return -1
}

// probeFailed is what a failed probe of the watch comes to: the new flows go
// back to the older instance, and this one ends as a drained one does.
func (k *keeper) probeFailed(reason string) {
	if k.older() < 0 || !k.ctl.Yield(k.bank) {
		say("%s: %s, and no older instance to go back to", k, reason)
		return
	}
	k.beginDrain(control.Now())
	k.failed(reason)
}

// failed tells that this instance has failed while another one serves. The
// decoy speaks for that one from now on.
func (k *keeper) failed(reason string) {
	say("%s failed: %s", k, reason)
	k.tell(msgFailed, reason)
	k.detach()
}

// fail ends a server that is not ready.
func (k *keeper) fail(reason string) {
	if k.phase != starting {
		return
	}
	k.failure = reason
	k.terminate(killAfter)
}

// stop ends the server as systemd would.
func (k *keeper) stop() {
	if k.phase == starting {
		k.aborted = true
	}
	k.terminate(0) // systemd has a timeout for this, and ExecStopPost= kills then
}

// terminate sends the stop signal, and SIGKILL after the given time if that is
// not 0.
func (k *keeper) terminate(kill time.Duration) {
	k.phase, k.signalled = stopping, true
	k.probe.cancel()
	k.readyBy, k.goneAt = 0, 0
	k.killAt = 0
	if kill > 0 {
		k.killAt = after(kill)
	}
	k.server.kill(k.o.StopSignal)
	k.server.kill(unix.SIGCONT) // one that is stopped must see it
}

// childEnded takes the status of whatever has ended.
func (k *keeper) childEnded() error {
	// First what they said: of a process that is gone nobody can tell whose it was.
	if err := k.relay.receive(); err != nil {
		return err
	}
	if k.adopted && k.server.pid != 0 && k.server.ended() {
		k.serverEnded(0)
	}
	reap(func(pid int, ws syscall.WaitStatus) {
		switch pid {
		case k.server.pid:
			k.serverEnded(exitStatus(ws))
		case k.probe.run.pid:
			k.probe.ended(exitStatus(ws), k)
		}
	})
	return nil
}

func (k *keeper) serverEnded(status int) {
	k.loop.remove(k.server.pidfd)
	k.server.close()
	if status == 0 && k.phase <= serving && k.succeed() {
		if k.saidReady {
			k.ready()
		}
		return
	}
	if k.failure == "" && k.adopted {
		k.failure = "nobody knows how"
	} else if k.failure == "" {
		k.failure = describe(status)
	}
	switch {
	case k.status != 0: // decided: not ready in time
	case k.signalled && status == 128+int(k.o.StopSignal):
		k.status = 0 // as it was asked to
	default:
		k.status = status
	}
	k.settle()
	k.probe.cancel()
	k.phase, k.killAt, k.emptyBy = clearing, 0, after(clearingFor)
}

// succeed finds the process that goes on after the main one has ended well, as
// daemons do: the one that was named by MAINPID=, else the oldest of those that
// are this process's children now.
func (k *keeper) succeed() bool {
	pids, err := descendants(k.pid)
	if err != nil {
		return false
	}
	pid := k.relay.mainPid
	if !slices.Contains(pids, pid) {
		i := slices.IndexFunc(pids, func(pid int) bool { return pid != k.probe.run.pid && proc.Parent(pid) == k.pid })
		if i < 0 {
			return false
		}
		pid = pids[i]
	}
	p, err := open(pid)
	if err != nil {
		return false
	}
	k.server = p
	k.loop.add(p.pidfd, k.childEnded)
	if k.ctl != nil {
		k.ctl.SetPids(k.bank, k.pid, pid)
	}
	say("%s: its main process has ended well, %d goes on", k, pid)
	return true
}

// settle writes into the control map what the end of the server means. When
// several end at the same time, each finds others there: the last one stays.
func (k *keeper) settle() {
	if k.ctl == nil {
		return
	}
	k.ctl.SetPids(k.bank, k.pid, 0)
	working := k.ctl.Working() == k.bank
	switch state := k.ctl.Bank(k.bank).State; {
	case k.ctl.Closing():
		k.retire()
	case state == control.Prepared && !k.again:
		// Never worked. Nobody else knows these sockets.
		k.retire()
		if !k.aborted {
			say("%s failed: %s", k, k.failure)
		}
		k.tell(msgFailed, k.failure)
	case !working && k.ctl.Yield(k.bank):
		k.retire()
		say("%s has ended (%s)", k, k.failure)
	case k.watched(control.Now()) && k.older() >= 0 && k.ctl.Yield(k.bank):
		k.retire()
		k.failed(k.failure)
	default:
		// The sockets live on in the fd store, packets wait there, and the next
		// server takes over all of it.
		k.ctl.SetState(k.bank, control.Serving)
		k.ctl.SetDrainUntil(k.bank, 0)
		say("%s has ended (%s), and no older one serves: its sockets wait for the next start", k, k.failure)
		k.tell(msgFailed, k.failure)
	}
}

func (k *keeper) retire() { retire(k.ctl, k.bank) }

// retire takes a bank out of use for good.
func retire(ctl *control.Map, bank int) {
	ctl.Withdraw(bank)
	ctl.SetState(bank, control.Ended)
	ctl.SetDrainUntil(bank, 0)
}

// clear ends the processes that the server left behind, and then this one.
func (k *keeper) clear(now time.Duration) {
	left, err := descendants(k.pid)
	if err == nil && len(left) > 0 && !k.emptyBy.due(now) {
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGKILL) // gone already, or as good as
		}
		reap(func(int, syscall.WaitStatus) {})
		return
	}
	reap(func(int, syscall.WaitStatus) {})
	if k.ctl != nil && k.ctl.Bank(k.bank).State == control.Ended {
		if !k.left {
			k.left = true
			leave(k.String(), k.sockets)
			return
		}
		discardAll(k.String(), k.sockets)
	}
	if k.ctl != nil {
		k.ctl.SetPids(k.bank, 0, 0)
	}
	k.phase = over
}

// urgent is mmdecoy's SIGURG: "I drain, go", if it is one of the server's
// processes that says so.
func (k *keeper) urgent(sender int) error {
	if k.phase == serving && descends(sender, k.pid) {
		k.gone()
	}
	return nil
}

// gone is called when the server drains by itself: the decoy may go, and the
// next start is one of a new instance.
func (k *keeper) gone() {
	if k.selfDrain {
		return
	}
	k.selfDrain, k.goneAt = true, 0
	say("%s drains by itself", k)
	if k.ctl != nil {
		k.beginDrain(control.Now())
	}
	k.tell(msgGone, "")
}

// fromDecoy takes the messages of the decoy that speaks for this instance.
func (k *keeper) fromDecoy() error {
	for {
		p, ok, err := k.link.receive()
		if err != nil {
			k.loop.remove(k.link.fd)
			k.link.close()
			return nil
		}
		if !ok {
			return nil
		}
		p.close()
		switch p.what {
		case msgHello:
			k.attach(p.sender)
		case msgSignal:
			if n, err := strconv.Atoi(p.text); err == nil && n > 0 && n < 65 {
				k.server.kill(unix.Signal(n))
			}
		case msgEnd:
			if k.phase == starting {
				k.aborted = true
				k.fail("told to end before it was ready")
			}
		case msgLook: // to be woken is all
		case msgGive:
			if from, err := strconv.Atoi(p.text); err == nil && from >= 0 {
				k.give(from)
			}
		}
	}
}

// give hands sockets to the decoy. Without an answer, or with an empty one, it
// asks for no more.
func (k *keeper) give(from int) {
	var names []string
	var fds []int
	for i := from; i < min(from+atOnce, len(k.sockets)); i++ {
		names, fds = append(names, k.sockets[i].name), append(fds, k.sockets[i].fd)
	}
	k.tell(msgGiven, strings.Join(names, "\n"), fds...)
}

// attach makes the process with that pid the one that speaks for this instance.
func (k *keeper) attach(pid int) {
	k.detach()
	p, err := open(pid)
	if err != nil {
		return // it has ended already
	}
	k.decoy = p
	k.loop.add(p.pidfd, k.decoyEnded)
	k.tell(msgStatus, k.statusSent)
}

func (k *keeper) detach() {
	if k.decoy.pid != 0 {
		k.loop.remove(k.decoy.pidfd)
		k.decoy.close()
	}
}

// decoyEnded: a server that is not ready goes with its decoy. One that is does
// not care.
func (k *keeper) decoyEnded() error {
	k.detach()
	if k.phase == starting {
		k.aborted = true
		k.fail("its decoy has ended before it was ready")
	}
	return nil
}

// tell sends a message to the decoy, if there is one.
func (k *keeper) tell(what byte, text string, fds ...int) bool {
	return k.decoy.pid != 0 && k.link.send(what, text, fds...)
}

// String names the instance in messages.
func (k *keeper) String() string {
	var b strings.Builder
	if k.o.Name != "" {
		b.WriteString(k.o.Name + " ")
	}
	if k.ctl != nil {
		fmt.Fprintf(&b, "gen %d", k.generation)
	} else {
		b.WriteString("server")
	}
	return b.String()
}
