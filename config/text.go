package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Duration is a time.Duration with the text form of Go's, as short as it gets: "10s", "2m4s", "1h".
type Duration struct{ time.Duration }

// UnmarshalText reads "10s", "1m30s", "250ms". A number without a unit is refused, a negative one too.
func (d *Duration) UnmarshalText(text []byte) error {
	const hint = `write a number and a unit, such as "10s", "1m30s" or "250ms"`
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return problemf(hint, "%s is not a duration", quote(string(text)))
	}
	if v < 0 {
		return problemf(hint, "%s is negative", quote(string(text)))
	}
	d.Duration = v
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String leaves out the units that are zero at the end, which time.Duration prints: "10m", not "10m0s".
func (d Duration) String() string {
	s := d.Duration.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// Signal is a signal number, NoSignal for none. Its text form is the name, "SIGTERM"; "" for none.
type Signal syscall.Signal

// Signals that have a meaning by default.
const (
	NoSignal = Signal(0)
	SIGTERM  = Signal(syscall.SIGTERM)
)

// UnmarshalText reads a name with or without SIG, in capitals, or "" for none.
func (s *Signal) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*s = NoSignal
		return nil
	}
	name := string(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	n := unix.SignalNum(name)
	switch n {
	case 0:
		return problemf(`write its name, such as "SIGTERM" or "SIGUSR1"`, "%s is not a signal", quote(string(text)))
	case unix.SIGSTOP, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		return problemf(`use a signal that the server can handle, such as "SIGTERM" or "SIGUSR1"`,
			"%s would freeze the server instead of ending it", name)
	}
	*s = Signal(n)
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (s Signal) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String is the signal's name, "" for none.
func (s Signal) String() string { return unix.SignalName(syscall.Signal(s)) }

// MaxSockets is how many sockets one generation can have in one listener: the slots of a bank.
const MaxSockets = 256

// Count is a number of sockets, 1 to MaxSockets, or CPUs. Its text form is the number, or "cpus".
type Count int

// CPUs stands for one socket per CPU that the activation may run on.
const CPUs Count = 0

// UnmarshalText reads 1 to 256, or "cpus".
func (c *Count) UnmarshalText(text []byte) error {
	if string(text) == "cpus" {
		*c = CPUs
		return nil
	}
	n, err := strconv.Atoi(string(text))
	if err != nil {
		return problemf(fmt.Sprintf(`write a number from 1 to %d, or "cpus"`, MaxSockets), "%s is not a number of sockets", quote(string(text)))
	}
	if n < 1 || n > MaxSockets {
		return problemf(fmt.Sprintf(`write a number from 1 to %d, or "cpus"`, MaxSockets), "%d sockets are out of range", n)
	}
	*c = Count(n)
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (c Count) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// String is the number, or "cpus".
func (c Count) String() string {
	if c == CPUs {
		return "cpus"
	}
	return strconv.Itoa(int(c))
}

// Of is the number of sockets on a machine with that many CPUs.
func (c Count) Of(cpus int) int {
	if c != CPUs {
		return int(c)
	}
	return min(max(cpus, 1), MaxSockets)
}

// Size is a number of bytes. Its text form is a whole number with the largest unit that fits: "16MiB", "1500B" is "1500".
type Size int64

var sizeUnits = []struct {
	name  string
	bytes int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

// UnmarshalText reads a whole number of bytes, alone or with KiB, MiB or GiB.
func (s *Size) UnmarshalText(text []byte) error {
	const hint = `write a number of bytes, or one with KiB, MiB or GiB, such as "16MiB"`
	digits, factor := string(text), int64(1)
	for _, u := range sizeUnits {
		if n, ok := strings.CutSuffix(digits, u.name); ok {
			digits, factor = n, u.bytes
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil {
		return problemf(hint, "%s is not a size", quote(string(text)))
	}
	if int64(n) > math.MaxInt64/factor {
		return problemf(hint, "%s is too large", quote(string(text)))
	}
	*s = Size(int64(n) * factor)
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String has the largest unit that leaves a whole number.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && int64(s)%u.bytes == 0 {
			return strconv.FormatInt(int64(s)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

// UnmarshalText reads "notify", "exec" or "delay".
func (k *ReadyKind) UnmarshalText(text []byte) error {
	return oneOf(k, text, ReadyNotify, ReadyExec, ReadyDelay)
}

// UnmarshalText reads "flow", "noop" or "cbpf".
func (d *Dissector) UnmarshalText(text []byte) error {
	return oneOf(d, text, DissectorFlow, DissectorNoop, DissectorCBPF)
}

// UnmarshalText reads "reply", "packet" or "explicit".
func (a *Assure) UnmarshalText(text []byte) error {
	return oneOf(a, text, AssureReply, AssurePacket, AssureExplicit)
}

// oneOf sets *p to text if that is one of the values.
func oneOf[T ~string](p *T, text []byte, values ...T) error {
	names := make([]string, len(values))
	for i, v := range values {
		if string(text) == string(v) {
			*p = v
			return nil
		}
		names[i] = strconv.Quote(string(v))
	}
	return problemf("use one of "+strings.Join(names, ", "), "%s is not a choice", quote(string(text)))
}

// MaxNameLen is the longest name of a service or a listener, in bytes.
const MaxNameLen = 32

// CheckName tells whether a service or a listener may have that name: [a-z][a-z0-9_-]{0,31}.
// Names become parts of unit names, paths under /run and bpffs, and names in the fd store.
func CheckName(name string) error {
	const hint = "use 1 to 32 of a-z, 0-9, _ and -, beginning with a letter"
	if name == "" {
		return problemf(hint, "the name is empty")
	}
	if len(name) > MaxNameLen {
		return problemf(hint, "the name %s is longer than %d bytes", quote(name), MaxNameLen)
	}
	for i := range len(name) {
		c := name[i]
		if !(c >= 'a' && c <= 'z' || i > 0 && (c >= '0' && c <= '9' || c == '_' || c == '-')) {
			return problemf(hint, "the name %s has a forbidden character at %d: %q", quote(name), i+1, c)
		}
	}
	return nil
}
