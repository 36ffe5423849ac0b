package decoy

import (
	"time"

	"grm/control"
	"grm/internal/flowtable"
)

// beginDrain is called once another instance works and its watch is over, or
// when this one was found wanting: new flows go elsewhere, and this server ends
// when it has no flows any more.
func (k *keeper) beginDrain(now time.Duration) {
	k.phase = draining
	k.probe.cancel()
	if k.ctl.Bank(k.bank).DrainUntil == 0 { // else an operator was faster
		k.ctl.SetDrainUntil(k.bank, now+k.o.DrainTimeout)
	}
	k.ctl.SetState(k.bank, control.Draining)
	say("%s drains for at most %v", k, k.o.DrainTimeout)
	if k.o.DrainSignal != 0 && !k.selfDrain {
		k.told = true
		k.server.kill(k.o.DrainSignal)
	}
}

// drain looks whether the server may end.
func (k *keeper) drain(now time.Duration) {
	if k.ctl.Working() == k.bank {
		// It works again, or still: it must not end. If the server was told
		// nothing it is as good as before.
		if !k.told && !k.selfDrain {
			k.phase = serving
			k.ctl.SetState(k.bank, control.Serving)
			k.ctl.SetDrainUntil(k.bank, 0)
			say("%s works again", k)
		}
		return
	}
	// The deadline is the one in the map: an operator may have moved it.
	over := now >= k.ctl.Bank(k.bank).DrainUntil
	if !over && (!k.quiet() || k.queued()) {
		return
	}
	if over {
		say("%s: the time for its drain is up", k)
	}
	// From here on its flows are new flows, of which nothing is lost: what its
	// queues hold is still answered.
	k.ctl.Withdraw(k.bank)
	k.phase, k.emptyBy = leaving, after(emptying)
}

// quiet says whether nothing is left to wait for: no packet came for the grace,
// and either no assured flow lives or none had a packet for the idle time.
func (k *keeper) quiet() bool {
	s := k.ctl.Stats(k.bank)
	longer := func(since, than time.Duration) bool { return since < 0 || since >= than }
	if !longer(s.SincePacket, k.o.DrainGrace) {
		return false
	}
	return longer(s.SinceAssured, k.o.DrainIdle) || k.flowless()
}

// flowless says whether it is known that no assured flow lives.
func (k *keeper) flowless() bool {
	if len(k.flows) == 0 {
		return false
	}
	n, known := countFlows(k.flows, k.bank)
	return known && n == 0
}

// countFlows adds up the live flows of a bank in all tables.
func countFlows(tables []int, bank int) (flows int, known bool) {
	for _, fd := range tables {
		perBank, err := flowtable.Count(fd)
		if err != nil {
			return 0, false
		}
		flows += perBank[bank]
	}
	return flows, len(tables) > 0
}

func (k *keeper) queued() bool {
	for _, s := range k.sockets {
		if queued(s.fd) {
			return true
		}
	}
	return false
}

// leave waits until the server has taken what its queues hold, then stops it.
func (k *keeper) leave(now time.Duration) {
	if k.queued() && !k.emptyBy.due(now) {
		return
	}
	k.emptyBy = 0
	k.terminate()
	say("%s is drained: %s to pid %d", k, signalName(k.o.StopSignal), k.server.pid)
}
