package decoy

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/notify"
)

const (
	// look is how often a decoy looks at the control map, which is also how
	// often its status line may change.
	look = time.Second
	// sayWhy is how long a keeper may take to say why it has made way.
	sayWhy = 300 * time.Millisecond
	// barrier bounds the wait for systemd before the end.
	barrier = 2 * time.Second
)

// rolledBack is why another instance works if no keeper said why.
const rolledBack = "rolled back by hand"

type speech int

const (
	attempting speech = iota // starting, in the package's comment
	speaking
	stoppingAll
	left // over: exit
)

// failure is what came of an instance that is not there any more.
type failure struct {
	generation uint64
	reason     string
	at         time.Time
}

// decoy is the unit's main process.
type decoy struct {
	o    Options
	st   stage
	env  environ
	pid  int
	loop loop
	conn *notify.Conn

	ctl        *control.Map // nil: a server without grm's sockets
	in         inherited
	stored     map[uint64][]string // names in the fd store, by generation
	left       []uint64            // generations whose sockets are in no group any more, and to be emptied
	bank       int                 // of the instance that this decoy speaks for
	generation uint64
	keeper     process // of that instance
	child      bool    // it was started by this decoy
	link       *link
	flows      census

	phase    speech
	aborting bool // SIGTERM came before the server was ready
	waiting  []process
	status   int
	failed   failure
	says     string // the server's own status
	shown    string // the last STATUS=
	nextLook timer
	// overtaken is when to stop waiting for the reason why another instance works; 0: none does.
	overtaken timer
}

func runDecoy(o Options, st stage) (int, error) {
	d := &decoy{o: o, st: st, env: environ(os.Environ()).without(stageVar), pid: os.Getpid(), link: openLink(-1), bank: -1}
	if err := d.begin(); err != nil {
		return ExitFailure, err
	}
	for d.phase != left {
		if err := d.loop.wait(d.patience()); err != nil {
			return ExitFailure, err
		}
		d.step(control.Now())
	}
	return d.status, nil
}

// begin does what ExecStartPre= decided.
func (d *decoy) begin() error {
	var err error
	if d.conn, err = notify.Open(); err != nil {
		return err
	}
	fds, err := listenFDs(d.env, d.pid)
	if err != nil {
		return err
	}
	d.in = sortOut(fds)
	closeAll(d.in.strange)
	if err := d.loop.signals(d.signal); err != nil {
		return err
	}
	if d.in.control < 0 {
		if len(d.o.Listen) > 0 || len(d.in.sockets) > 0 {
			return fmt.Errorf("no control map %s among the %d descriptors from systemd (does the unit have ExecStartPre=+…/grm-activate, FileDescriptorStoreMax= and NotifyAccess=all?)",
				nameControl, len(fds))
		}
		return d.startKeeper(control.Start)
	}
	if d.ctl, err = control.Open(d.in.control); err != nil {
		return err
	}
	d.ctl.SetRequest(control.NoRequest) // what was told to the decoy before this one
	for _, fd := range d.in.flows {
		d.flows.tables = append(d.flows.tables, fd)
	}
	for generation, fd := range d.in.keepers {
		d.hold(generation, fd)
	}
	d.stored = map[uint64][]string{}
	for generation, sockets := range d.in.sockets {
		for _, s := range sockets {
			d.stored[generation] = append(d.stored[generation], s.name)
		}
	}
	for generation := range d.in.keepers {
		d.stored[generation] = append(d.stored[generation], keeperName(generation))
	}
	plan := d.ctl.Plan()
	d.bank, d.generation = plan.Bank, d.ctl.Bank(plan.Bank).Generation
	switch plan.Verb {
	case control.Start, control.Again:
		if d.generation == 0 {
			return fmt.Errorf("plan %v: bank %d has no generation (did ExecStartPre=+…/grm-activate run to its end?)", plan.Verb, plan.Bank)
		}
		return d.startKeeper(plan.Verb)
	case control.StandIn:
		return d.standIn()
	}
	return errors.New("the control map has no plan for this start (does the unit have ExecStartPre=+…/grm-activate for this service?)")
}

func keeperName(generation uint64) string { return nameKeeper + strconv.FormatUint(generation, 10) }

// startKeeper starts an instance: its keeper gets everything that is for the
// server, and the link.
func (d *decoy) startKeeper(verb control.Verb) error {
	h := handOver{env: d.env, files: d.in.servers, generation: d.generation}
	if d.ctl != nil {
		d.adoptOrphans()
		sockets, err := d.in.instance(d.generation, d.o.Listen)
		if err != nil {
			return fmt.Errorf("gen %d: %w", d.generation, err)
		}
		h = d.handOver(d.bank, d.generation, sockets)
		h.files = append(h.files, d.in.servers...)
		h.env = h.env.set(verbVar, verb.String())
	}
	var fd int
	var err error
	if d.keeper, fd, err = d.launch(h); err != nil {
		return err
	}
	d.child, d.link = true, openLink(fd)
	d.dropSockets(d.generation)
	closeAll(d.in.servers)
	d.loop.add(d.keeper.pidfd, d.keeperEnded)
	d.loop.add(fd, d.fromKeeper)
	if d.ctl == nil {
		d.phase = speaking
		return nil
	}
	d.show()
	return nil
}

// handOver is what a keeper gets.
type handOver struct {
	env        environ
	files      []named
	generation uint64 // 0: none
}

// handOver is what every keeper of a generation gets. The descriptors stay the
// decoy's.
func (d *decoy) handOver(bank int, generation uint64, sockets []socket) handOver {
	h := handOver{env: d.env.set(bankVar, strconv.Itoa(bank)), generation: generation}
	h.files = append(h.files, named{nameControl, d.in.control})
	for listener, fd := range d.in.flows {
		h.files = append(h.files, named{nameFlows + listener, fd})
	}
	for _, s := range sockets {
		h.files = append(h.files, s.named)
	}
	return h
}

// launch starts a keeper and returns the decoys' end of the link to it, which
// the next decoy finds in the fd store.
func (d *decoy) launch(h handOver) (keeper process, fd int, err error) {
	fd, keepers, err := newLink()
	if err != nil {
		return process{}, -1, err
	}
	defer unix.Close(keepers)
	files, names := []int{0, 1, 2, keepers}, []string{nameLink}
	for _, f := range h.files {
		files, names = append(files, f.fd), append(names, f.name)
	}
	if h.generation != 0 {
		name := keeperName(h.generation)
		if slices.Contains(d.stored[h.generation], name) {
			err = d.conn.Forget(name) // of a keeper that is gone
		} else {
			d.stored[h.generation] = append(d.stored[h.generation], name)
		}
		err = errors.Join(err, d.conn.Store(name, fd))
	}
	if err == nil {
		keeper, err = withMask(urgent, func() (process, error) {
			return spawn(keeperComm, h.env.forKeeper(d.st, names).blockUrgent(), files, syscall.SysProcAttr{Setsid: true})
		})
	}
	if err != nil {
		_ = unix.Close(fd) // nobody is at the other end
		return process{}, -1, err
	}
	return keeper, fd, nil
}

// adoptOrphans gives servers whose keeper was killed a new one, so that they
// are drained like any other. Without it they would serve for ever. An older
// instance that was killed together with its keeper is over: while its sockets
// are stored its flows would wait in them, and for nobody.
func (d *decoy) adoptOrphans() {
	for b := range control.Banks {
		bank := d.ctl.Bank(b)
		if b == d.bank || bank.ReadyAt == 0 || bank.State != control.Serving && bank.State != control.Draining {
			continue
		}
		if p, err := openMember(bank.Keeper, keeperComm); err == nil {
			p.close()
			continue
		}
		p, err := openMember(bank.Server, "")
		if err != nil {
			gone := bank.Server == 0 || errors.Is(err, unix.ESRCH)
			if gone && d.phase == speaking && b != d.ctl.Working() && d.ctl.Yield(b) {
				retire(d.ctl, b)
				d.ctl.SetPids(b, 0, 0)
				say("gen %d has ended, and its keeper was killed: its flows begin anew", bank.Generation)
				d.forgetGeneration(bank.Generation)
			}
			continue
		}
		p.close()
		keeper, err := d.adopt(b)
		if err != nil {
			say("gen %d: its keeper was killed, and there is no new one: %v", bank.Generation, err)
			continue
		}
		d.loop.add(keeper.pidfd, d.keeperEnded)
		d.waiting = append(d.waiting, keeper)
	}
}

// adopt starts a keeper for a server that lost its own.
func (d *decoy) adopt(b int) (process, error) {
	bank := d.ctl.Bank(b)
	h := d.handOver(b, bank.Generation, d.in.sockets[bank.Generation])
	h.env = h.env.set(adoptVar, strconv.Itoa(bank.Server))
	keeper, fd, err := d.launch(h)
	if err != nil {
		return process{}, err
	}
	if old, found := d.in.keepers[bank.Generation]; found {
		d.release(bank.Generation, old)
	}
	d.hold(bank.Generation, fd)
	d.ctl.SetPids(b, keeper.pid, bank.Server)
	return keeper, nil
}

// dropSockets closes a generation's sockets: one that this process went on to
// hold would stay bound when its instance ends.
func (d *decoy) dropSockets(generation uint64) {
	closeAll(d.in.sockets[generation])
	delete(d.in.sockets, generation)
}

// standIn speaks for an older instance that serves.
func (d *decoy) standIn() error {
	closeAll(d.in.servers)
	if err := d.speakFor(d.bank); err != nil {
		return fmt.Errorf("stand in for gen %d: %w", d.generation, err)
	}
	if f := d.ctl.Failed(); f.Generation > d.generation {
		d.failed = failure{f.Generation, f.Reason, f.At}
	}
	d.ready()
	return nil
}

// speakFor makes the instance in a bank the one that this decoy speaks for.
func (d *decoy) speakFor(bank int) error {
	b := d.ctl.Bank(bank)
	p, err := openMember(b.Keeper, keeperComm)
	if err != nil {
		// Its keeper was killed.
		server, err2 := openMember(b.Server, "")
		if err2 != nil {
			return fmt.Errorf("neither keeper nor server: %w", errors.Join(err, err2))
		}
		server.close()
		if p, err = d.adopt(bank); err != nil {
			return err
		}
	}
	if d.link.fd >= 0 {
		d.loop.remove(d.link.fd)
		d.link.close()
	}
	switch {
	case d.keeper.pid == 0: // it has ended, and been reaped
	case d.child:
		d.waiting = append(d.waiting, d.keeper) // still a child, to be reaped
	default:
		d.loop.remove(d.keeper.pidfd)
		d.keeper.close()
	}
	d.keeper, d.child, d.status = p, false, 0
	d.loop.add(p.pidfd, d.keeperEnded)
	d.bank, d.generation, d.says = bank, b.Generation, ""
	d.dropSockets(d.generation)
	if fd, found := d.in.keepers[b.Generation]; found {
		d.loop.remove(fd)
		delete(d.in.keepers, b.Generation)
		d.link = openLink(fd)
		for { // what was meant for decoys before this one
			p, ok, err := d.link.receive()
			if !ok || err != nil {
				break
			}
			p.close()
		}
		d.loop.add(fd, d.fromKeeper)
		d.link.send(msgHello, "")
		d.storeAgain()
	}
	d.ctl.SetPlan(control.Plan{Verb: control.StandIn, Bank: bank})
	return nil
}

// ready tells systemd that the service is there.
func (d *decoy) ready() {
	if d.phase != attempting {
		return
	}
	d.phase = speaking
	if d.aborting {
		d.leave() // SIGTERM crossed the flip: the server serves, so it stays
		return
	}
	d.shown = d.line(control.Now())
	d.tell("READY=1\nSTATUS=" + d.shown)
	d.nextLook = after(0) // the watch has begun, or there is none
}

func (d *decoy) tell(text string, fds ...int) {
	if err := d.conn.Send(text, fds...); err != nil {
		say("%v", err)
	}
}

func (d *decoy) patience() time.Duration {
	if d.ctl == nil && d.says == d.shown {
		return time.Minute
	}
	return until(control.Now(), look, d.nextLook)
}

// step does once in a while what needs no hurry.
func (d *decoy) step(now time.Duration) {
	if d.phase == left || d.nextLook != 0 && !d.nextLook.due(now) {
		return
	}
	d.nextLook = timer(now + look)
	if d.ctl != nil {
		// At the end of a watch in time for the older keeper, which waits for handOverTime.
		if end := d.ctl.Bank(d.bank).WatchUntil; end > now {
			d.nextLook = min(d.nextLook, timer(end))
		}
		d.look(now)
		if d.phase == speaking && d.draining() {
			d.flows.take(look)
		}
	}
	d.show()
}

// draining says whether any instance drains.
func (d *decoy) draining() bool {
	for b := range control.Banks {
		if d.ctl.Bank(b).State == control.Draining {
			return true
		}
	}
	return false
}

// look is at the control map.
func (d *decoy) look(now time.Duration) {
	b := d.ctl.Bank(d.bank)
	if d.phase == attempting && b.State == control.Serving && b.ReadyAt != 0 && d.ctl.Working() == d.bank {
		d.ready() // its message found the link full
	}
	switch head := d.ctl.Working(); {
	case d.phase != speaking || head < 0 || head == d.bank || d.ctl.Bank(head).State != control.Serving:
		d.overtaken = 0
	case d.overtaken == 0:
		// The keeper of an instance that failed makes way first, and then says why.
		d.overtaken = timer(now + sayWhy)
		d.nextLook = min(d.nextLook, d.overtaken)
	case d.overtaken.due(now):
		d.goBack(rolledBack)
	}
	d.empty()
	d.forget(now)
	if d.phase == speaking {
		d.adoptOrphans()
	}
}

// goBack makes the working instance the one that this decoy speaks for, after
// the one that it spoke for was found wanting.
func (d *decoy) goBack(reason string) bool {
	head := d.ctl.Working()
	if head < 0 || head == d.bank {
		return false
	}
	f := failure{d.generation, reason, time.Now()}
	if err := d.speakFor(head); err != nil {
		say("gen %d: %v", d.ctl.Bank(head).Generation, err)
		return false
	}
	d.failed = f
	d.show()
	return true
}

// forget takes out of the fd store what belongs to instances that are gone, and
// the sockets of older ones once the watch is over, so that nothing stored is
// left unread. Until then this process holds them as well, for the case that
// nobody else is left to empty them. The link to an older keeper stays: an
// operator may make its instance the working one again.
func (d *decoy) forget(now time.Duration) {
	settled := d.phase == speaking && now >= d.ctl.Bank(d.bank).WatchUntil
	for generation := range d.stored {
		if generation == d.generation {
			continue
		}
		bank := d.ctl.FindGeneration(generation)
		switch {
		case bank < 0 || d.ctl.Bank(bank).State == control.Ended:
			if _, kept := d.in.keepers[generation]; !kept {
				d.forgetGeneration(generation) // else its keeper empties the sockets, and is about to end
			}
		case settled:
			d.dropSockets(generation)
			d.stored[generation] = slices.DeleteFunc(d.stored[generation], func(name string) bool {
				socket := isSocket(name)
				if socket {
					d.unstore(name)
				}
				return socket
			})
		}
	}
}

func isSocket(name string) bool {
	_, _, _, ok := parseSocketName(name)
	return ok
}

func (d *decoy) unstore(name string) {
	if err := d.conn.Forget(name); err != nil {
		say("%v", err)
	}
}

// storeAgain asks the keeper for those sockets of its instance that have left
// the fd store, one message after the other: what works is to find them there
// if its server crashes.
func (d *decoy) storeAgain() {
	n := 0
	for _, name := range d.stored[d.generation] {
		if isSocket(name) {
			n++
		}
	}
	d.link.send(msgGive, strconv.Itoa(n))
}

// given stores what the keeper gave.
func (d *decoy) given(p parcel) {
	names, stored := strings.Split(p.text, "\n"), d.stored[d.generation]
	if len(names) != len(p.fds) {
		return // none
	}
	for i, name := range names {
		if _, generation, _, ok := parseSocketName(name); !ok || generation != d.generation || slices.Contains(stored, name) {
			return
		}
		if err := d.conn.Store(name, p.fds[i]); err != nil {
			say("%v", err)
			return
		}
		stored = append(stored, name)
		d.stored[d.generation] = stored
	}
	d.storeAgain()
}

// forgetGeneration throws away what is stored of an instance that is over.
func (d *decoy) forgetGeneration(generation uint64) {
	for _, name := range d.stored[generation] {
		d.unstore(name)
	}
	delete(d.stored, generation)
	if fd, found := d.in.keepers[generation]; found {
		d.release(generation, fd)
	}
	if len(d.in.sockets[generation]) == 0 {
		return
	}
	leave(fmt.Sprintf("gen %d", generation), d.in.sockets[generation])
	d.left = append(d.left, generation)
	d.nextLook = after(tick)
}

// empty counts what waits in the sockets that have left, and closes them.
func (d *decoy) empty() {
	for _, generation := range d.left {
		discardAll(fmt.Sprintf("gen %d", generation), d.in.sockets[generation])
		d.dropSockets(generation)
	}
	d.left = nil
}

// hold keeps the link to the keeper of an older instance, and looks when it ends.
func (d *decoy) hold(generation uint64, fd int) {
	d.in.keepers[generation] = fd
	d.loop.add(fd, func() error {
		l := openLink(fd)
		for {
			p, ok, err := l.receive()
			if err != nil { // its keeper ends
				d.release(generation, fd)
				if bank := d.ctl.FindGeneration(generation); bank >= 0 {
					d.waitFor(d.ctl.Bank(bank).Keeper)
				}
				d.nextLook = after(0)
			}
			if !ok {
				return nil
			}
			p.close() // nobody speaks for it
		}
	})
}

// waitFor looks again when a keeper that ends has ended, if it has not already:
// its files are closed before.
func (d *decoy) waitFor(pid int) {
	if p, err := openMember(pid, keeperComm); err == nil {
		d.loop.add(p.pidfd, d.keeperEnded)
		d.waiting = append(d.waiting, p)
	}
}

func (d *decoy) release(generation uint64, fd int) {
	d.loop.remove(fd)
	_ = unix.Close(fd) // nobody speaks for it any more
	delete(d.in.keepers, generation)
}

// fromKeeper takes the messages of the keeper.
func (d *decoy) fromKeeper() error {
	l := d.link
	for l.fd >= 0 {
		p, ok, err := l.receive()
		if err != nil {
			d.loop.remove(l.fd)
			l.close()
			return nil
		}
		if !ok {
			return nil
		}
		d.message(p)
		p.close()
	}
	return nil
}

func (d *decoy) message(p parcel) {
	switch p.what {
	case msgReady:
		d.ready()
	case msgNotify:
		d.tell(p.text, p.fds...)
	case msgStatus:
		d.says = p.text
	case msgGiven:
		d.given(p)
	case msgFailed:
		if d.phase == speaking {
			d.goBack(p.text)
		}
	case msgGone:
		if d.phase == speaking {
			d.leave()
		}
	}
}

// keeperEnded is the end of the instance that this decoy speaks for, or of one
// that it spoke for.
func (d *decoy) keeperEnded() error {
	if d.child && d.keeper.ended() {
		if err := d.fromKeeper(); err != nil { // what it said before it ended
			return err
		}
	}
	reap(func(pid int, ws syscall.WaitStatus) {
		if d.child && pid == d.keeper.pid {
			d.status = exitStatus(ws)
			if ws.Signaled() {
				say("the keeper of gen %d was killed by %s: its server goes on until the next start takes its place", d.generation, signalName(ws.Signal()))
			}
		}
	})
	d.waiting = slices.DeleteFunc(d.waiting, func(p process) bool {
		if p.ended() {
			d.loop.remove(p.pidfd)
			p.close()
			d.nextLook = after(0) // its server may live
			return true
		}
		return false
	})
	if d.keeper.pid != 0 && d.keeper.ended() {
		d.loop.remove(d.keeper.pidfd)
		d.keeper.close()
		d.instanceEnded()
	}
	if d.phase == stoppingAll {
		d.stopped()
	}
	return nil
}

// stopped ends this process once nothing of the service runs any more.
func (d *decoy) stopped() {
	if d.keeper.pid == 0 && len(d.waiting) == 0 {
		d.finish()
	}
}

// instanceEnded: systemd is to start the service again, unless an older
// instance works.
func (d *decoy) instanceEnded() {
	switch {
	case d.phase == stoppingAll:
	case d.phase == speaking && d.ctl != nil && d.ctl.Closing():
		d.stopAll() // ExecStop= was here, and SIGTERM is under way
	case d.phase == speaking && d.ctl != nil && d.goBack(rolledBack):
	default:
		if !d.child {
			d.status = ExitFailure
			say("gen %d has ended", d.generation)
		}
		if d.ctl != nil && d.phase == attempting {
			if bank := d.ctl.Bank(d.bank); bank.State == control.Ended {
				d.forgetGeneration(d.generation) // it never worked, so nothing waits there
			}
		}
		d.finish()
	}
}

// finish ends this process once systemd has read all that it said.
func (d *decoy) finish() {
	d.empty()
	if err := d.conn.Barrier(barrier); err != nil {
		say("%v", err)
	}
	d.phase = left
}

// leave ends this process and nothing else.
func (d *decoy) leave() {
	d.status = 0
	d.finish()
}

// signal forwards everything to the server but systemd's SIGTERM.
func (d *decoy) signal(s unix.Signal) error {
	if s == unix.SIGTERM && d.ctl != nil {
		d.terminate()
		return nil
	}
	if d.link.send(msgSignal, strconv.Itoa(int(s))) {
		return nil
	}
	// No keeper to ask. The server's pid is checked before it is believed.
	if d.ctl != nil {
		if p, err := openMember(d.ctl.Bank(d.bank).Server, ""); err == nil {
			p.kill(s)
			p.close()
		}
	}
	return nil
}

// terminate is what systemd's SIGTERM means.
func (d *decoy) terminate() {
	switch d.phase {
	case attempting:
		d.aborting = true
		if !d.link.send(msgEnd, "") {
			d.leave() // its keeper ends the server as soon as it sees that
		}
	case speaking:
		if d.ctl.Request() == control.Stop {
			d.stopAll()
		} else {
			d.leave()
		}
	}
}

// stopAll ends every instance of the service.
func (d *decoy) stopAll() {
	d.phase = stoppingAll
	d.ctl.SetClosing(true)
	d.link.send(msgLook, "")
	for _, fd := range d.in.keepers {
		(&link{fd: fd}).send(msgLook, "")
	}
	for b := range control.Banks {
		bank := d.ctl.Bank(b)
		if b == d.bank || bank.State == control.Free || bank.State == control.Ended {
			continue
		}
		p, err := openMember(bank.Keeper, keeperComm)
		if err != nil {
			if p, err = openMember(bank.Server, ""); err != nil {
				continue // nothing runs there
			}
			p.kill(d.o.StopSignal)
		}
		d.loop.add(p.pidfd, d.keeperEnded)
		d.waiting = append(d.waiting, p)
	}
	d.tell("STATUS=stopping")
}
