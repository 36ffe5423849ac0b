package decoy

import (
	"time"

	"grm/control"
	"grm/internal/flowtable"
)

// census counts the live assured flows of a service's generations. A table may
// have hundreds of megabytes, which are all read: so it counts now and then,
// and those who ask get what was counted last.
type census struct {
	tables  []int // descriptors, not its own
	perBank [control.Banks]int
	known   bool
	next    timer
}

// share is which part of the time, at most, is spent on counting: one in so many.
const share = 50

// take counts if the last time was longer ago than every, and long enough ago
// for what it costs. It says whether it did.
func (c *census) take(every time.Duration) bool {
	began := control.Now()
	if c.next != 0 && !c.next.due(began) {
		return false
	}
	c.perBank, c.known = [control.Banks]int{}, len(c.tables) > 0
	for _, fd := range c.tables {
		flows, err := flowtable.Count(fd)
		if err != nil {
			c.known = false
			break
		}
		for bank, n := range flows {
			c.perBank[bank] += n
		}
	}
	now := control.Now()
	c.next = timer(now + max(every, share*(now-began)))
	return true
}

// of is how many a bank has; known is false if that could not be counted.
func (c *census) of(bank int) (flows int, known bool) { return c.perBank[bank], c.known }
