// Package config reads a service's TOML file and the text form of a listener.
//
// One file describes one service: what to run, where it listens, how it becomes ready, how long its predecessor is kept
// in reserve, and how that drains. Parse reports everything that is wrong with a file at once, each with its line, its
// key and a hint, and yields a Service only when nothing is. Types with a syntax of their own (Address, Duration,
// Signal, Count, Size, Program, Listener) own their text form; what a Service holds has been checked.
//
// The package reads that one file and does no other I/O.
package config

import "time"

// Service is one TOML file.
type Service struct {
	Path        string            // the file it was read from, as given; empty for one made in memory
	Name        string            // the service's and its unit's name: [a-z][a-z0-9_-]{0,31}
	Description string            // one line for people; empty: the name
	Exec        []string          // the server's command line; Exec[0] is an absolute path
	User        string            // whom the server, decoy and keepers run as: a name or a number
	Group       string            // empty: the user's own group
	Environment map[string]string // for the server; none of the names that grm or systemd set themselves
	// WorkingDirectory is absolute, or empty for systemd's default ("/").
	WorkingDirectory string
	Ready            Ready
	Listen           []Listener // at least one; names and addresses are unique; their order is the order of the server's sockets
	Watch            Watch
	Drain            Drain
	Systemd          Systemd
}

// Ready says how a new instance shows that it can serve. Until then it gets no traffic.
type Ready struct {
	Kind    ReadyKind
	Exec    []string // ReadyExec: the probe, run again and again until it exits 0; Exec[0] is an absolute path
	Delay   Duration // ReadyDelay: the time after which a server that still runs is ready; 0 to 10m
	Timeout Duration // an instance that is not ready by then has failed; 1s to 1h
}

// ReadyKind is a way to become ready.
type ReadyKind string

// The ways to become ready.
const (
	ReadyNotify ReadyKind = "notify" // the server sends READY=1 to NOTIFY_SOCKET
	ReadyExec   ReadyKind = "exec"   // a probe command exits 0
	ReadyDelay  ReadyKind = "delay"  // the server still runs after a fixed time
)

// Watch is the time after a flip in which the old instance stays whole, ready to take over again.
type Watch struct {
	Time  Duration // 0 to 1h; 0: no watch, the drain begins at the flip
	Probe []string // run again and again during the watch; a failure flips back. Empty: only the server's death does
}

// Drain says how an old instance ends.
type Drain struct {
	Signal     Signal   // sent when the drain begins; NoSignal: the old server is told nothing and just goes on
	StopSignal Signal   // sent when the drain is over, and when the unit is stopped
	Idle       Duration // the drain is over when no packet of an assured flow came for this long; 1s to 24h
	Grace      Duration // but not before this long after the last packet of any kind; 0 to 1h
	Timeout    Duration // at the latest after this long; 1s to 30 days
	// MaxInstances is how many instances may live at a time, 2 to 32: one more start ends the oldest.
	// 0: as many as there are banks, and one more start is refused.
	MaxInstances int
}

// Systemd holds directives to hand through to the unit, by section.
// A key given here replaces every generated line of that key, and an empty list removes them; ExecStartPre alone is
// additional. Parse has made sure that nothing is here which the mechanism needs otherwise.
type Systemd struct {
	Unit    Directives
	Service Directives
	Install Directives
}

// Directives are the values of each key, in systemd's own syntax, one per line of the unit.
type Directives map[string][]string

// Default is what a file that says nothing means: the one place for defaults. Name, Exec, User and Listen have none.
func Default() *Service {
	return &Service{
		Ready: Ready{
			Kind:    ReadyNotify,
			Delay:   Duration{time.Second},
			Timeout: Duration{30 * time.Second},
		},
		Watch: Watch{Time: Duration{10 * time.Second}},
		Drain: Drain{
			StopSignal: SIGTERM,
			// Where the file does not say, Parse takes the longest flow_timeout of the service.
			Idle:    DefaultListener().FlowTimeout,
			Grace:   Duration{5 * time.Second},
			Timeout: Duration{10 * time.Minute},
		},
		Systemd: Systemd{
			Unit:    Directives{"After": {"network.target"}},
			Install: Directives{"WantedBy": {"multi-user.target"}},
		},
	}
}
