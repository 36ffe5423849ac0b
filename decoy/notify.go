package decoy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"grm/control"
	"grm/internal/notify"
)

const (
	// A server may send that many messages at once, and so many a second in the
	// long run. Beyond it its messages wait, and it with them: none is dropped.
	relayBurst = 512
	relayRate  = 100
	// maxStatus is how much of a server's STATUS= is shown.
	maxStatus = 200
	// goneDelay is how long a server that says STOPPING=1 has to end before it
	// is taken for one that drains by itself.
	goneDelay = time.Second
)

// relay stands between a server and systemd: what it hears from the server's
// processes it passes on to the decoy that speaks for this instance, less what
// is not theirs to say.
type relay struct {
	k        *keeper
	listener *notify.Listener
	path     string // of the socket, to be removed; "" for an abstract one
	tokens   float64
	filled   time.Duration
	resume   timer // when to read on
	mainPid  int   // what the server says its main process is
	refused  map[string]bool
}

// newRelay makes the socket for the server. In the unit's runtime directory
// only the service's user can write to it; an abstract one, which needs no
// directory, can be written to by everybody, as systemd's own.
func newRelay(k *keeper) (*relay, error) {
	r := &relay{k: k, tokens: relayBurst, filled: control.Now(), refused: map[string]bool{}}
	address := "@"
	if dir, _, _ := strings.Cut(k.env.get("RUNTIME_DIRECTORY"), ":"); dir != "" && os.Geteuid() != 0 {
		r.path = filepath.Join(dir, notifyName(k.generation, k.pid))
		_ = os.Remove(r.path) // of a keeper that was killed; bind tells if it is in the way
		address = r.path
	}
	var err error
	r.listener, err = notify.Listen(address)
	if err != nil && r.path != "" {
		say("%s: %v: using an abstract socket", k, err)
		r.path = ""
		r.listener, err = notify.Listen("@")
	}
	if err != nil {
		return nil, err
	}
	k.loop.add(r.listener.FD(), r.receive)
	return r, nil
}

// notifyName is the name of an instance's socket, which no other one has: the
// keeper of a server that drains by itself removes its own when that has ended.
func notifyName(generation uint64, keeper int) string {
	if generation == 0 { // a server without grm's sockets
		return fmt.Sprintf(".grm-notify-pid-%d", keeper)
	}
	return fmt.Sprintf(".grm-notify-%d", generation)
}

func (r *relay) close() {
	if r == nil {
		return
	}
	_ = r.listener.Close() // only ever read
	if r.path != "" {
		_ = os.Remove(r.path) // the runtime directory may be gone already
	}
}

// step reads on after a pause.
func (r *relay) step(now time.Duration) {
	if r.resume.due(now) {
		r.resume = 0
		r.k.loop.pause(r.listener.FD(), false)
	}
}

// receive takes what has come, as far as the budget goes.
func (r *relay) receive() error {
	now := control.Now()
	r.tokens = min(relayBurst, r.tokens+float64(now-r.filled)/float64(time.Second)*relayRate)
	r.filled = now
	for r.tokens >= 1 {
		m, err := r.listener.Receive()
		if errors.Is(err, notify.ErrNone) {
			return nil
		}
		r.tokens--
		if err != nil {
			r.refuse("message", err.Error())
			continue
		}
		r.message(m)
		m.Close()
	}
	r.k.loop.pause(r.listener.FD(), true)
	r.resume = after(100 * time.Millisecond)
	return nil
}

func (r *relay) refuse(what, why string) {
	if !r.refused[what] && len(r.refused) < 16 {
		r.refused[what] = true
		say("%s: its %s is not passed on: %s (said once)", r.k, what, why)
	}
}

// message works off one message of the server, if it is of the server.
func (r *relay) message(m notify.Message) {
	k := r.k
	if m.Pid == 0 || m.Pid != k.server.pid && !descends(m.Pid, k.pid) {
		r.refuse("message from process "+strconv.Itoa(m.Pid), "it is none of this instance")
		return
	}
	fields, err := notify.Parse(m.Text)
	if err != nil {
		r.refuse("message", err.Error())
		return
	}
	v := judge(fields)
	for _, key := range v.refused {
		r.refuse(key, "it is not a server's to say")
	}
	if v.mainPid != 0 && descends(v.mainPid, k.pid) {
		r.mainPid = v.mainPid
	}
	if v.status != nil {
		k.statusSent = *v.status
		k.tell(msgStatus, *v.status)
	}
	if v.stopping && k.phase == serving && k.goneAt == 0 {
		k.goneAt = after(goneDelay)
	}
	if v.ready && k.phase == starting && k.o.Ready == Notify {
		k.ready()
		v.ready = false // the decoy tells systemd so once it has seen the flip
	}
	if v.extend > 0 && k.phase == starting && k.readyBy != 0 {
		k.readyBy = max(k.readyBy, after(v.extend)) // as systemd does
	}
	if k.phase == starting || k.phase == serving || k.phase == stopping && k.ctl != nil && k.ctl.Closing() {
		v.pass(func(text string) { k.tell(msgNotify, text, m.FDs...) }, k.phase == serving)
	}
}

// verdict is what a message of a server comes to.
type verdict struct {
	ready    bool
	stopping bool
	mainPid  int
	status   *string
	extend   time.Duration  // how long the server asks to be waited for
	lines    []notify.Field // for systemd as they are
	refused  []string       // keys, or what was wrong
}

// judge sorts the lines of a message. What it does not know it refuses.
func judge(fields []notify.Field) verdict {
	var v verdict
	store, bad := false, ""
	for _, f := range fields {
		switch f.Key {
		case "READY":
			v.ready = v.ready || f.Value == "1"
		case "STOPPING":
			v.stopping = v.stopping || f.Value == "1"
		case "STATUS":
			s := clean(f.Value)
			v.status = &s
		case "MAINPID":
			v.mainPid, _ = strconv.Atoi(f.Value) // not a number: none
		case "EXTEND_TIMEOUT_USEC":
			if n, err := strconv.ParseUint(f.Value, 10, 32); err == nil {
				v.extend = time.Duration(n) * time.Microsecond
			}
			v.lines = append(v.lines, f)
		case "RELOADING", "MONOTONIC_USEC", "WATCHDOG", "WATCHDOG_USEC", "ERRNO", "BUSERROR", "EXIT_STATUS":
			v.lines = append(v.lines, f)
		case "BARRIER":
			v.lines = append(v.lines, f)
		case "FDSTORE", "FDSTOREREMOVE":
			store = true
			v.lines = append(v.lines, f)
		case "FDNAME":
			// Names of grm's would put descriptors among its own, or throw them away.
			if strings.HasPrefix(f.Value, ours) || notify.CheckName(f.Value) != nil {
				bad = f.Value
			}
			v.lines = append(v.lines, f)
		case "FDPOLL":
			v.lines = append(v.lines, f)
		default:
			v.refused = append(v.refused, f.Key+"=")
		}
	}
	if v.mainPid != 0 {
		v.refused = append(v.refused, "MAINPID=")
	}
	if store && bad != "" {
		v.refused = append(v.refused, "FDNAME="+clean(bad))
		v.lines = nil
	}
	return v
}

// pass hands on what is left of the message for systemd. READY=1 follows a
// reload; before the flip it is held back.
func (v verdict) pass(send func(text string), serving bool) {
	lines := v.lines
	if v.ready && serving {
		lines = append(lines, notify.Field{Key: "READY", Value: "1"})
	}
	if len(lines) > 0 {
		send(notify.Format(lines...))
	}
}

// clean makes a text of a server's fit to be shown.
func clean(s string) string {
	if len(s) > maxStatus {
		s = s[:maxStatus]
	}
	s = strings.ToValidUTF8(s, "")
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 || c == utf8.RuneError { // the control characters of ASCII and of Latin-1
			return ' '
		}
		return c
	}, s)
}
