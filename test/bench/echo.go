package main

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// echoClients is how many datagrams are under way at once, each of a client of
// its own. Their sockets are connected, as those of real clients are.
const echoClients = batch

// echo runs a server on the target, lets the clients exchange n datagrams with
// it, and says how many came back per second and how much processor time the
// server's thread spent on each.
func echo(t *target, n int) (perSecond float64, server time.Duration, err error) {
	var clients []int
	defer func() { err = errors.Join(err, closeAll(clients)) }()
	for range echoClients {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, 0, err
		}
		clients = append(clients, fd)
		err = errors.Join(
			unix.Connect(fd, &unix.SockaddrInet4{Port: t.port, Addr: [4]byte{127, 0, 0, 1}}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}))
		if err != nil {
			return 0, 0, fmt.Errorf("client: %w", err)
		}
	}
	var stop atomic.Bool
	type outcome struct {
		cpu time.Duration
		err error
	}
	served := make(chan outcome, len(t.sockets))
	for _, fd := range t.sockets {
		go func() {
			cpu, err := serve(fd, &stop)
			served <- outcome{cpu, err}
		}()
	}
	payload := make([]byte, payloadSize)
	fill(payload)
	began := time.Now()
	for done := 0; done < n && err == nil; done += echoClients {
		err = roundTrip(clients, payload)
	}
	perSecond = float64(n) / time.Since(began).Seconds()
	stop.Store(true)
	for range t.sockets {
		o := <-served
		server += o.cpu
		err = errors.Join(err, o.err)
	}
	return perSecond, server / time.Duration(n), err
}

func roundTrip(clients []int, payload []byte) error {
	for _, fd := range clients {
		if _, err := unix.Write(fd, payload); err != nil {
			return fmt.Errorf("client sends: %w", err)
		}
	}
	answer := make([]byte, payloadSize)
	for _, fd := range clients {
		if _, err := unix.Read(fd, answer); err != nil {
			return fmt.Errorf("client waits for its answer: %w", err)
		}
	}
	return nil
}

// serve answers what comes to the socket until stop, and returns the processor
// time that its thread has spent on that.
func serve(fd int, stop *atomic.Bool) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// How often a server without traffic looks whether it is to stop.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000}); err != nil {
		return 0, err
	}
	m := newMessages()
	before, err := threadTime()
	if err != nil {
		return 0, err
	}
	for !stop.Load() {
		n, err := m.receive(fd, unix.MSG_WAITFORONE)
		if err == nil && n > 0 {
			err = m.send(fd, n)
		}
		if err != nil {
			return 0, fmt.Errorf("server: %w", err)
		}
	}
	after, err := threadTime()
	return after - before, err
}

func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("thread's clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
