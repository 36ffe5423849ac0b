package bpfprog

import (
	"fmt"
)

// Counter is an event of a group. What a bank got is in package control.
type Counter int

// As enum grm_counter in c/group.h.
const (
	DroppedClosing Counter = iota
	DroppedNoSocket
	DeadSlot
	StaleFlow
	TableFull
	EmbryoEvicted
	InsertRace
	TooShort
	BadCookie
	CBPFError
	BadApp
	AppGone
	Guarded
	ABIError
	counterCount
)

// CounterInfo says what a counter is called and what it counts.
type CounterInfo struct{ Name, Help string }

var counterInfo = [counterCount]CounterInfo{
	DroppedClosing:  {"dropped_closing", "packets of new flows dropped because the service stops"},
	DroppedNoSocket: {"dropped_no_socket", "packets dropped because no bank of the order has a live socket"},
	DeadSlot:        {"dead_slot", "packets of known flows whose own socket was gone"},
	StaleFlow:       {"stale_flow", "packets of known flows whose bank was not alive any more: new flows"},
	TableFull:       {"table_full", "new flows that the table had no place for"},
	EmbryoEvicted:   {"embryo_evicted", "embryos that gave their place to a new flow"},
	InsertRace:      {"insert_race", "new flows that two CPUs had at once; one gave way"},
	TooShort:        {"too_short", "packets whose sender could not be read: new flows"},
	BadCookie:       {"bad_cookie", "packets with a cookie that names no live socket: new flows"},
	CBPFError:       {"cbpf_error", "packets that the cbpf program read past the end of, or divided by 0 for: new flows"},
	BadApp:          {"bad_app", "packets for an app beyond max_apps: app 0"},
	AppGone:         {"app_gone", "packets for an app without a service: app 0"},
	Guarded:         {"guarded", "attempts of a server to replace the group's program, or to leave the group with its address"},
	ABIError:        {"abi_error", "socket options of grm that were refused"},
}

// Info says what c is called and what it counts.
func (c Counter) Info() CounterInfo {
	if c < 0 || c >= counterCount {
		return CounterInfo{Name: fmt.Sprintf("counter_%d", int(c))}
	}
	return counterInfo[c]
}

func (c Counter) String() string { return c.Info().Name }

// Counters are the events of a group, summed over the CPUs, by Counter.
type Counters [counterCount]uint64

// Counters reads the group's counters.
func (g *Group) Counters() (Counters, error) {
	var sum Counters
	var perCPU []Counters
	if err := g.counters.Lookup(uint32(0), &perCPU); err != nil {
		return sum, fmt.Errorf("counters of group %s: %w", g.Key(), err)
	}
	for _, c := range perCPU {
		for i, n := range c {
			sum[i] += n
		}
	}
	return sum, nil
}
