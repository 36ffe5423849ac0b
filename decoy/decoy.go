// Package decoy is the process that systemd believes to be the service, and
// what stands behind it.
//
// One program plays three parts, each started by the one before:
//
//   - The decoy is the unit's main process. It starts the keeper or, if an
//     older server still serves, stands in for it; speaks to systemd; forwards
//     signals; and ends on a restart so that the server need not.
//   - The keeper is the server's parent, one for each instance. It believes the
//     server's notifications, finds out when it is ready, flips, watches,
//     drains, and ends with the server's status. It outlives its decoy.
//   - A stage is the process that becomes the server or a probe by exec: only
//     it can know the pid that has to stand in the environment.
//
// None needs a capability or bpf(2): all control goes through the mapped
// control map (package control), and what each instance is up to is written
// there by its keeper, and by nobody else.
//
// Decoy and keeper are one goroutine each, around one poll(2) with a deadline.
//
// States of a decoy:
//
//	starting  its keeper's server is not ready: SIGTERM ends this attempt alone
//	speaking  a server is ready, its own or an older one: SIGTERM leaves it alone,
//	          or stops everything if ExecStop said so
//	stopping  waits for every instance of the service to end
//
// States of a keeper:
//
//	starting  the server is not ready; ends with its decoy
//	serving   the server is ready: working, watched or standing by
//	draining  another instance works, its watch is over: waits for its flows to end
//	leaving   takes no packets any more, its queues empty
//	stopping  the server got the stop signal
//	clearing  the server is gone, what it left behind is ended
package decoy

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// Readiness is how an instance is known to be ready.
type Readiness string

const (
	Notify Readiness = "notify" // it sends READY=1
	Exec   Readiness = "exec"   // a probe exits 0
	Delay  Readiness = "delay"  // it has lived for some time
)

// Exit statuses of grm-decoy beside the server's own (its exit status, or 128+n
// for a death by signal n).
const (
	ExitFailure    = 1   // grm's own failure, told on standard error
	ExitUsage      = 2   // bad flags
	ExitNotReady   = 124 // the server was not ready in time
	ExitCannotExec = 126 // the server's file cannot be executed
	ExitNotFound   = 127 // there is no such file
)

// Options are what the command line of grm-decoy says.
type Options struct {
	Name    string   // the service
	Listen  []string // its listeners, in the order in which the server gets their sockets
	Command []string // the server

	Ready        Readiness
	ReadyExec    []string      // Exec: the probe
	ReadyDelay   time.Duration // Delay: how long
	ReadyTimeout time.Duration // 0: as long as systemd lets it

	Watch      time.Duration
	WatchProbe []string // none: a server that lives is well

	DrainSignal  unix.Signal // 0: none
	StopSignal   unix.Signal
	DrainIdle    time.Duration
	DrainGrace   time.Duration
	DrainTimeout time.Duration
}

// Defaults are the options of a command line without flags: the same as those
// of a TOML file that says nothing.
func Defaults() Options {
	return Options{
		Ready:        Notify,
		Watch:        10 * time.Second,
		StopSignal:   unix.SIGTERM,
		DrainIdle:    124 * time.Second,
		DrainGrace:   5 * time.Second,
		DrainTimeout: 10 * time.Minute,
	}
}

// Run plays the part of grm-decoy that this process has to play. It returns the
// exit status, or an error for ExitFailure.
func Run(o Options) (int, error) {
	st, err := currentStage()
	if err != nil {
		return ExitFailure, err
	}
	switch st.part {
	case "":
		lastLong()
		return runDecoy(o, st)
	case partKeeper:
		lastLong()
		return runKeeper(o, st)
	}
	return st.become(o)
}

// lastLong is for a process that allocates next to nothing and lives for long:
// it stays small, and survives the journal. The Go runtime would end it with
// SIGPIPE when it has something to say and nobody listens any more.
func lastLong() {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(10)
	signal.Ignore(unix.SIGPIPE)
}

// say is one line of the journal.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "grm-decoy: "+format+"\n", args...)
}
