package decoy

import (
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
	"grm/internal/proc"
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
// either no assured flow lives or none had a packet for the idle time, and the
// server has no connection open.
func (k *keeper) quiet() bool {
	s := k.ctl.Stats(k.bank)
	longer := func(since, than time.Duration) bool { return since < 0 || since >= than }
	if !longer(s.SincePacket, k.o.DrainGrace) {
		return false
	}
	if !longer(s.SinceAssured, k.o.DrainIdle) {
		// An operator does not want to wait for flows that have all timed out.
		if !k.flows.take(tick) {
			return false
		}
		if n, known := k.flows.of(k.bank); !known || n > 0 {
			return false
		}
	}
	now := control.Now()
	if k.connected.due(now) || k.connected == 0 {
		k.connected = timer(now + connectionsEvery)
		if n, err := k.connections(); n == 0 && err == nil {
			k.connected = 0
			return true
		}
	}
	return false
}

// connectionsEvery is how often the server's connections are counted.
const connectionsEvery = time.Second

// connections counts what the group's program does not see: sockets with a
// peer on the ports of this instance that the server's processes have, TCP's
// and those of UDP servers that connect one for each flow. If a process does
// not let itself be looked at, all on those ports count.
func (k *keeper) connections() (int, error) {
	inodes, hidden, err := k.openSockets()
	if err != nil {
		return 0, err
	}
	udp, tcp := map[uint16]bool{}, map[uint16]bool{}
	for _, s := range k.sockets {
		ports := udp
		if kind, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_TYPE); err == nil && kind == unix.SOCK_STREAM {
			ports = tcp
		}
		switch sa, _ := unix.Getsockname(s.fd); sa := sa.(type) {
		case *unix.SockaddrInet4:
			ports[uint16(sa.Port)] = true
		case *unix.SockaddrInet6:
			ports[uint16(sa.Port)] = true
		}
	}
	wanted := func(inode uint64) bool { return hidden || inodes[inode] }
	n, err := proc.Connected("udp", udp, wanted)
	if err != nil {
		return 0, err
	}
	m, err := proc.Connected("tcp", tcp, wanted)
	return n + m, err
}

// queued says whether something waits for the server, in a socket that it has not
// closed.
func (k *keeper) queued() bool {
	for i, s := range k.sockets {
		if (k.given == nil || !k.given[i].left) && queued(s.fd) {
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
	k.terminate(killAfter)
	say("%s is drained: %s to pid %d", k, signalName(k.o.StopSignal), k.server.pid)
}
