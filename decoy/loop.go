package decoy

import (
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"grm/control"
)

// loop is the one place where a decoy or keeper waits.
type loop struct {
	polls   []unix.PollFd
	do      []func() error
	removed bool
	busy    bool          // something was done since memory was given back
	trimmed time.Duration // when that was
}

// trimEvery is how often memory is given back at most.
const trimEvery = 10 * time.Second

// add calls do whenever fd has something to read or was hung up. The
// descriptor stays the caller's.
func (l *loop) add(fd int, do func() error) {
	l.polls = append(l.polls, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	l.do = append(l.do, do)
}

// remove forgets fd, which may have been closed already. It may be called from
// a function that the loop calls.
func (l *loop) remove(fd int) {
	for i := range l.polls {
		if l.polls[i].Fd == int32(fd) {
			l.polls[i].Fd, l.do[i] = -1, nil
			l.removed = true
		}
	}
}

// pause stops or resumes asking for what fd has to read.
func (l *loop) pause(fd int, paused bool) {
	for i := range l.polls {
		if l.polls[i].Fd == int32(fd) {
			l.polls[i].Events = unix.POLLIN
			if paused {
				l.polls[i].Events = 0
			}
		}
	}
}

// wait waits until there is something to do, and does it, or for at most d.
func (l *loop) wait(d time.Duration) error {
	if l.removed {
		l.compact()
	}
	// Rounded up: a deadline must have passed when its poll returns.
	ms := int((max(0, d) + time.Millisecond - 1) / time.Millisecond)
	n, err := unix.Poll(l.polls, ms)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("poll: %w", err)
	}
	if n == 0 {
		l.idle(control.Now())
		return nil
	}
	l.busy = true
	for i := range len(l.polls) { // what is added meanwhile has its turn next time
		if do := l.do[i]; do != nil && l.polls[i].Revents != 0 {
			l.polls[i].Revents = 0
			if err := do(); err != nil {
				return err
			}
		}
	}
	return nil
}

// idle gives back what the start, or a burst of messages, has taken: these
// processes live for long and do little, and each instance has one.
func (l *loop) idle(now time.Duration) {
	if l.busy && (l.trimmed == 0 || now >= l.trimmed+trimEvery) {
		l.busy, l.trimmed = false, now
		debug.FreeOSMemory()
	}
}

func (l *loop) compact() {
	n := 0
	for i := range l.polls {
		if l.do[i] != nil {
			l.polls[n], l.do[n] = l.polls[i], l.do[i]
			n++
		}
	}
	clear(l.do[n:])
	l.polls, l.do, l.removed = l.polls[:n], l.do[:n], false
}

// timer is a deadline on control.Now's clock; the zero value is never due.
type timer time.Duration

func after(d time.Duration) timer { return timer(control.Now() + d) }

func (t timer) due(now time.Duration) bool { return t != 0 && time.Duration(t) <= now }

// until is the time left until the first of the timers, at most most.
func until(now, most time.Duration, timers ...timer) time.Duration {
	for _, t := range timers {
		if t != 0 {
			most = min(most, time.Duration(t)-now)
		}
	}
	return max(0, most)
}
