package decoy

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	probeTimeout  = 5 * time.Second // for one run of a probe
	probeInterval = 100 * time.Millisecond
	watchInterval = time.Second
)

// probe runs a command again and again: until it exits 0 while the server
// starts, as long as it exits 0 while the instance is watched.
type probe struct {
	run    process
	next   timer // when to run it
	killAt timer // when the run takes too long
	late   bool  // this run took too long
}

func (p *probe) schedule(in time.Duration) { p.next = max(1, after(in)) }

// step starts a run that is due and kills one that hangs.
func (p *probe) step(now time.Duration, k *keeper) {
	if p.killAt.due(now) {
		p.killAt, p.late = 0, true
		p.kill()
	}
	if !p.next.due(now) {
		return
	}
	p.next = 0
	part := partReady
	if k.phase == serving {
		part = partWatch
		if !k.watched(now) {
			return
		}
		if k.ctl.Working() != k.bank {
			p.schedule(watchInterval) // another instance would answer; this one may come back
			return
		}
	}
	env := k.env.forProbe(k.st, part, k.server.pid)
	run, err := spawn(os.Args[0], env, []int{0, 1, 2}, syscall.SysProcAttr{Setpgid: true})
	if err != nil {
		say("%s: probe: %v", k, err)
		p.schedule(watchInterval)
		return
	}
	p.run, p.late, p.killAt = run, false, after(probeTimeout)
	k.loop.add(run.pidfd, k.childEnded)
}

// ended is called with the status of a run.
func (p *probe) ended(status int, k *keeper) {
	k.loop.remove(p.run.pidfd)
	p.run.close()
	p.killAt = 0
	what := describe(status)
	if p.late {
		what = fmt.Sprintf("no answer within %v", probeTimeout)
	}
	switch {
	case k.phase == starting && status == 0:
		k.ready()
	case k.phase == starting:
		p.schedule(probeInterval)
	case k.phase == serving && (status == 0 || k.ctl.Working() != k.bank):
		p.schedule(watchInterval)
	case k.phase == serving:
		k.probeFailed("watch probe: " + what)
	}
}

// cancel ends a run whose answer nobody waits for any more.
func (p *probe) cancel() {
	p.next, p.killAt = 0, 0
	p.kill()
}

// kill kills the run and all that it started: a run leads its process group.
func (p *probe) kill() {
	if p.run.pid != 0 {
		_ = unix.Kill(-p.run.pid, unix.SIGKILL) // not reaped yet, so the number is its own
	}
}
