package config

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Limits of a listener.
const (
	MinFlows       = 1024
	MaxFlows       = 4 << 20
	MaxApps        = 16
	MaxRcvBuf      = Size(512 << 20)
	MaxFlowTimeout = 24 * time.Hour
)

// Listener is one named address of a service.
//
// Its text form, which grm-activate takes and unitgen writes, is the address with what differs from DefaultListener as
// a query, in a fixed order:
//
//	udp://0.0.0.0:5201?name=quic&sockets=4&dissector=flow&timeout=124s&flows=65536&rcvbuf=16777216&freebind=1&dualstack=1&assure=reply&app=1&max_apps=4&program=/etc/grm/x.cbpf
type Listener struct {
	Name        string  // the sockets' name for the server; empty: the service's, possible with one listener only
	Address     Address // where it is bound
	DualStack   bool    // IPv4 packets too; only for [::]
	Sockets     Count   // how many sockets one instance has here
	Dissector   Dissector
	FlowTimeout Duration // an assured flow that was silent for so long is forgotten; 1s to 24h
	Flows       int      // how many flows the table is made for; MinFlows to MaxFlows
	Assure      Assure
	Program     Program // for DissectorCBPF, and only for it
	RcvBuf      Size    // receive buffer of each socket; 0: the kernel's default; at most MaxRcvBuf
	Freebind    bool    // bind to an address that the host does not have yet
	App         int     // which of the services behind this address this one is; 0 to MaxApps-1
	MaxApps     int     // how many services may share this address; 1 to 16
}

// Dissector is how a packet names its flow.
type Dissector string

// The dissectors.
const (
	DissectorFlow Dissector = "flow" // the remote address and port
	DissectorNoop Dissector = "noop" // it does not: each packet stands alone, as in DNS, and every TCP connection is new
	DissectorCBPF Dissector = "cbpf" // a program of the user's finds a cookie in the packet
)

// Assure is when a flow is known to be real, so that nothing but age removes it.
type Assure string

// The ways to assure a flow.
const (
	AssureReply    Assure = "reply"    // the server answered, and the client came back
	AssurePacket   Assure = "packet"   // the second packet of the client
	AssureExplicit Assure = "explicit" // the server says so, with the socket option FLOW_ASSURE
)

// DefaultListener is a listener of which only the address is known. A TCP address changes the dissector to noop.
func DefaultListener() Listener {
	return Listener{
		Sockets:     1,
		Dissector:   DissectorFlow,
		FlowTimeout: Duration{124 * time.Second},
		Flows:       65536,
		Assure:      AssureReply,
		RcvBuf:      16 << 20,
		MaxApps:     1,
	}
}

// fit changes the defaults that an address cannot have: TCP is noop, dual-stack is for [::].
func (l *Listener) fit() {
	if l.Address.Proto == TCP {
		l.Dissector = DissectorNoop
	}
	if l.DualStack && !(l.Address.Addr().Is6() && l.Address.Addr().IsUnspecified()) {
		l.DualStack = false
	}
	if l.Dissector != DissectorCBPF {
		l.Program = Program{}
	}
}

// ParseListener reads a listener's text form: an address, and a query with what differs from the defaults. Where the
// defaults do not fit the address (a dissector for TCP, dual-stack for one that is not [::]) they are left out.
// All that is wrong is reported at once. The name stays empty if it is neither in the text nor in the defaults.
func ParseListener(text string, defaults Listener) (Listener, error) {
	l := defaults
	var d problems
	addr, query, hasQuery := strings.Cut(text, "?")
	if err := l.Address.UnmarshalText([]byte(addr)); err != nil {
		return l, err
	}
	l.fit()
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(query, "&") {
		if !hasQuery {
			break
		}
		key, escaped, ok := strings.Cut(pair, "=")
		f, known := listenerField(key)
		switch {
		case !known:
			d.add("", problemf("use "+strings.Join(listenerKeys(), ", "), "%s is not a setting of a listener", quote(key)))
			continue
		case !ok:
			d.add(key, problemf("write "+key+"=VALUE", "no value"))
			continue
		case seen[key]:
			d.add(key, problemf("give it once", "given twice"))
			continue
		}
		seen[key] = true
		value, err := url.QueryUnescape(escaped)
		if err != nil {
			d.add(key, problemf("write % as %25", "%s is not escaped as a URL is", quote(escaped)))
			continue
		}
		if err := f.set(&l, value); err != nil {
			d.add(key, err)
		}
	}
	if len(d) == 0 {
		l.check(func(key string, err error) { d.add(key, err) })
	}
	for _, p := range d {
		// The text is the object: the same setting may be in several addresses of one command line.
		p.File = addr
	}
	return l, d.err()
}

// UnmarshalText is ParseListener with DefaultListener.
func (l *Listener) UnmarshalText(text []byte) error {
	v, err := ParseListener(string(text), DefaultListener())
	if err != nil {
		return err
	}
	*l = v
	return nil
}

// MarshalText is the inverse of UnmarshalText.
func (l Listener) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// String is the text form: only what differs from the defaults for the address.
func (l Listener) String() string {
	d := DefaultListener()
	d.Address = l.Address
	d.fit()
	var b strings.Builder
	b.WriteString(l.Address.String())
	sep := byte('?')
	for _, f := range listenerFields {
		if v := f.get(&l); v != f.get(&d) {
			b.WriteByte(sep)
			b.WriteString(f.key + "=" + escapeQuery(v))
			sep = '&'
		}
	}
	return b.String()
}

// field is one setting of a listener's text form.
type field struct {
	key string
	get func(*Listener) string
	set func(*Listener, string) error
}

// listenerFields are the settings in the order in which they are rendered.
var listenerFields = []field{
	{"name", func(l *Listener) string { return l.Name }, func(l *Listener, s string) error { l.Name = s; return CheckName(s) }},
	textField("sockets", func(l *Listener) *Count { return &l.Sockets }),
	textField("dissector", func(l *Listener) *Dissector { return &l.Dissector }),
	textField("timeout", func(l *Listener) *Duration { return &l.FlowTimeout }),
	intField("flows", func(l *Listener) *int { return &l.Flows }),
	{"rcvbuf", func(l *Listener) string { return strconv.FormatInt(int64(l.RcvBuf), 10) },
		func(l *Listener, s string) error { return l.RcvBuf.UnmarshalText([]byte(s)) }},
	boolField("freebind", func(l *Listener) *bool { return &l.Freebind }),
	boolField("dualstack", func(l *Listener) *bool { return &l.DualStack }),
	textField("assure", func(l *Listener) *Assure { return &l.Assure }),
	intField("app", func(l *Listener) *int { return &l.App }),
	intField("max_apps", func(l *Listener) *int { return &l.MaxApps }),
	textField("program", func(l *Listener) *Program { return &l.Program }),
}

func listenerField(key string) (field, bool) {
	for _, f := range listenerFields {
		if f.key == key {
			return f, true
		}
	}
	return field{}, false
}

func listenerKeys() []string {
	var keys []string
	for _, f := range listenerFields {
		keys = append(keys, f.key)
	}
	return keys
}

// textField is a setting whose type owns its text form.
func textField[T any, P interface {
	*T
	UnmarshalText([]byte) error
}](key string, at func(*Listener) *T) field {
	return field{key,
		func(l *Listener) string { return fmt.Sprint(*at(l)) },
		func(l *Listener, s string) error { return P(at(l)).UnmarshalText([]byte(s)) },
	}
}

func intField(key string, at func(*Listener) *int) field {
	return field{key,
		func(l *Listener) string { return strconv.Itoa(*at(l)) },
		func(l *Listener, s string) (err error) {
			if *at(l), err = strconv.Atoi(s); err != nil {
				return problemf("write a whole number", "%s is not a number", quote(s))
			}
			return nil
		},
	}
}

func boolField(key string, at func(*Listener) *bool) field {
	return field{key,
		func(l *Listener) string {
			if *at(l) {
				return "1"
			}
			return "0"
		},
		func(l *Listener, s string) error {
			if s != "0" && s != "1" {
				return problemf("write 0 or 1", "%s is neither on nor off", quote(s))
			}
			*at(l) = s == "1"
			return nil
		},
	}
}

// escapeQuery escapes what would end a value, and what would not survive as one word on a line that people read.
func escapeQuery(s string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c == ' ':
			b.WriteByte('+')
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("/.,:_-~@", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// check reports what is out of range or does not go together, under the keys of the text form.
func (l *Listener) check(report func(key string, err error)) {
	if l.Name != "" {
		if err := CheckName(l.Name); err != nil {
			report("name", err)
		}
	}
	if l.FlowTimeout.Duration < time.Second || l.FlowTimeout.Duration > MaxFlowTimeout {
		report("timeout", problemf("write one from 1s to 24h", "%s is out of range", l.FlowTimeout))
	}
	if l.Flows < MinFlows || l.Flows > MaxFlows {
		report("flows", problemf(fmt.Sprintf("write a number from %d to %d", MinFlows, MaxFlows), "%d flows are out of range", l.Flows))
	}
	if l.RcvBuf > MaxRcvBuf {
		report("rcvbuf", problemf("write at most "+MaxRcvBuf.String()+", or 0 for the kernel's default", "%s is out of range", l.RcvBuf))
	}
	if l.DualStack && !(l.Address.Addr().Is6() && l.Address.Addr().IsUnspecified()) {
		report("dualstack", problemf("leave it out, or listen on [::]", "only [::] can take IPv4 too, and this is %s", l.Address.Addr()))
	}
	if l.MaxApps < 1 || l.MaxApps > MaxApps {
		report("max_apps", problemf(fmt.Sprintf("write a number from 1 to %d", MaxApps), "%d apps are out of range", l.MaxApps))
	} else if l.App < 0 || l.App >= l.MaxApps {
		report("app", problemf("apps are counted from 0; raise max_apps, equal for all services of the address, if there are more",
			"app %d does not exist where max_apps is %d", l.App, l.MaxApps))
	} else if l.MaxApps > 1 && l.Dissector != DissectorCBPF {
		report("max_apps", problemf(`leave it out, or set dissector to "cbpf"`, "the dissector %s cannot tell apps apart", l.Dissector))
	}
	if l.Address.Proto == TCP && l.Dissector != DissectorNoop {
		report("dissector", problemf(`leave it out: the kernel itself keeps a TCP connection with its socket`, "%s is for UDP, and this is TCP", l.Dissector))
	}
	switch {
	case l.Dissector == DissectorCBPF && l.Program.IsZero():
		report("program", problemf("name the file, or write the instructions", "the dissector cbpf needs a program"))
	case l.Dissector != DissectorCBPF && !l.Program.IsZero():
		report("program", problemf(`leave it out, or set dissector to "cbpf"`, "the dissector %s takes no program", l.Dissector))
	}
}
