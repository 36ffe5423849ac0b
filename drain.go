package grm

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The causes with which the contexts of DrainContext and StopContext end.
var (
	ErrDrain = errors.New("this instance is to drain: another one takes the new flows")
	ErrStop  = errors.New("this instance is to stop")
)

// The environment in which a server learns which signals its keeper will send,
// by name (SIGUSR1), or by number those that have none. Without the first, there
// is no signal before the stop.
const (
	EnvDrainSignal = "GRM_DRAIN_SIGNAL"
	EnvStopSignal  = "GRM_STOP_SIGNAL"
)

// DrainContext returns a context that ends when this instance is to finish the
// flows it has: at the drain signal that the service's file sets, else at the
// stop signal, which is SIGTERM unless the file says otherwise, and at SIGINT.
// context.Cause tells ErrDrain from ErrStop. A server need not stop reading: it
// gets packets of its own flows only, and its keeper ends it when they are gone.
// After cancel the signals do again what they did before.
func DrainContext(parent context.Context) (context.Context, context.CancelFunc) {
	return onSignal(parent, drainSignal())
}

// StopContext returns a context that ends when this instance is to end at
// once: at the stop signal and at SIGINT.
func StopContext(parent context.Context) (context.Context, context.CancelFunc) {
	return onSignal(parent, 0)
}

func drainSignal() syscall.Signal { return signalIn(EnvDrainSignal) }

func stopSignal() syscall.Signal {
	if s := signalIn(EnvStopSignal); s != 0 {
		return s
	}
	return unix.SIGTERM
}

// signalIn is the signal that a variable says, 0 for none.
func signalIn(variable string) syscall.Signal {
	text := os.Getenv(variable)
	if n, err := strconv.Atoi(text); err == nil && n > 0 && n <= 64 {
		return syscall.Signal(n)
	}
	return unix.SignalNum(text)
}

// onSignal ends the context at drain, if it is one, and at what stops.
func onSignal(parent context.Context, drain syscall.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := []os.Signal{stopSignal(), unix.SIGINT}
	if drain != 0 {
		signals = append(signals, drain)
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, signals...)
	done := make(chan struct{})
	go func() {
		// Until cancel: a second signal must not kill a server that is just finishing.
		defer signal.Stop(c)
		for {
			select {
			case s := <-c:
				if s == drain {
					cancel(ErrDrain)
				} else {
					cancel(ErrStop)
				}
			case <-done:
				return
			case <-parent.Done():
				return
			}
		}
	}()
	stop := sync.OnceFunc(func() { close(done) })
	return ctx, func() {
		cancel(context.Canceled)
		stop()
	}
}
