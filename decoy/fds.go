package decoy

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Names in the fd store. All that begin with grm. are grm's.
const (
	ours        = "grm."
	nameControl = "grm.ctl"
	nameFlows   = "grm.flows."  // and a listener
	nameKeeper  = "grm.keeper." // and a generation: the decoys' end of the link to its keeper
	nameLink    = "grm.link"    // the keeper's end of it, never stored
)

// named is a descriptor and its name.
type named struct {
	name string
	fd   int
}

// socket is a socket of an instance: grm.<listener>.<generation>.<index>.
type socket struct {
	named
	listener string
	index    int
}

// inherited are the descriptors that a process was started with, by what their
// names say. Their order says nothing.
type inherited struct {
	control int // -1: none
	link    int // -1: none
	flows   map[string]int
	keepers map[uint64]int
	sockets map[uint64][]socket
	servers []named // the server's own, as they came
	strange []named // grm.something that this version does not know, and what came twice
}

// parseSocketName takes grm.<listener>.<generation>.<index> apart.
func parseSocketName(name string) (listener string, generation uint64, index int, ok bool) {
	rest, found := strings.CutPrefix(name, ours)
	parts := strings.Split(rest, ".")
	if !found || len(parts) != 3 || parts[0] == "" {
		return "", 0, 0, false
	}
	generation, ok = parseNumber(parts[1])
	i, ok2 := parseNumber(parts[2])
	if !ok || !ok2 || generation == 0 || i > 1<<16 {
		return "", 0, 0, false
	}
	return parts[0], generation, int(i), true
}

// parseNumber takes numbers in the one form in which they are written.
func parseNumber(s string) (uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil && strconv.FormatUint(n, 10) == s
}

func socketName(listener string, generation uint64, index int) string {
	return fmt.Sprintf("%s%s.%d.%d", ours, listener, generation, index)
}

// sortOut looks at what LISTEN_FDS and LISTEN_FDNAMES say, and makes the
// descriptors ones that no child inherits by accident. A name may be missing.
func sortOut(fds []named) inherited {
	in := inherited{control: -1, link: -1, flows: map[string]int{}, keepers: map[uint64]int{}, sockets: map[uint64][]socket{}}
	for _, d := range fds {
		if !in.take(d) {
			in.strange = append(in.strange, d)
		}
	}
	for _, group := range in.sockets {
		slices.SortFunc(group, func(a, b socket) int {
			if c := strings.Compare(a.listener, b.listener); c != 0 {
				return c
			}
			return a.index - b.index
		})
	}
	return in
}

// take puts d where it belongs, or returns false.
func (in *inherited) take(d named) bool {
	if !strings.HasPrefix(d.name, ours) {
		in.servers = append(in.servers, d)
		return true
	}
	if listener, generation, index, ok := parseSocketName(d.name); ok {
		for _, s := range in.sockets[generation] {
			if s.name == d.name {
				return false
			}
		}
		in.sockets[generation] = append(in.sockets[generation], socket{d, listener, index})
		return true
	}
	single := func(to *int) bool {
		if *to >= 0 {
			return false
		}
		*to = d.fd
		return true
	}
	switch {
	case d.name == nameControl:
		return single(&in.control)
	case d.name == nameLink:
		return single(&in.link)
	}
	if listener, found := strings.CutPrefix(d.name, nameFlows); found {
		if _, twice := in.flows[listener]; twice {
			return false
		}
		in.flows[listener] = d.fd
		return true
	}
	if text, found := strings.CutPrefix(d.name, nameKeeper); found {
		generation, ok := parseNumber(text)
		if _, twice := in.keepers[generation]; twice || !ok {
			return false
		}
		in.keepers[generation] = d.fd
		return true
	}
	return false
}

// listenFDs takes the descriptors that the environment tells the process with
// that pid of.
func listenFDs(env environ, pid int) ([]named, error) {
	text := env.get("LISTEN_FDS")
	if text == "" {
		return nil, nil
	}
	if to := env.get("LISTEN_PID"); to != "" && to != strconv.Itoa(pid) {
		return nil, nil // for another process
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > 1<<16 {
		return nil, fmt.Errorf("LISTEN_FDS=%s: no number of descriptors", text)
	}
	var names []string
	if text := env.get("LISTEN_FDNAMES"); text != "" {
		names = strings.Split(text, ":")
	}
	fds := make([]named, n)
	for i := range fds {
		fds[i].fd = 3 + i
		if i < len(names) {
			fds[i].name = names[i]
		}
		if _, err := unix.FcntlInt(uintptr(3+i), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("LISTEN_FDS=%s: descriptor %d: %w", text, 3+i, err)
		}
	}
	return fds, nil
}

// instance are the sockets of a generation in the order in which the server is
// to get them: listeners as listed, those not listed behind them, then by
// index.
func (in *inherited) instance(generation uint64, listen []string) ([]socket, error) {
	rank := func(s socket) int {
		if i := slices.Index(listen, s.listener); i >= 0 {
			return i
		}
		return len(listen)
	}
	sockets := slices.Clone(in.sockets[generation])
	slices.SortStableFunc(sockets, func(a, b socket) int { return rank(a) - rank(b) })
	const hint = "is FileDescriptorStoreMax= of the unit large enough, and does NotifyAccess= let ExecStartPre= store?"
	for _, listener := range listen {
		if !slices.ContainsFunc(sockets, func(s socket) bool { return s.listener == listener }) {
			return nil, fmt.Errorf("listener %s: no socket %s in the fd store (%s)", listener, socketName(listener, generation, 0), hint)
		}
	}
	for i, s := range sockets {
		want := 0
		if i > 0 && sockets[i-1].listener == s.listener {
			want = sockets[i-1].index + 1
		}
		if s.index != want {
			return nil, fmt.Errorf("listener %s: no socket %s in the fd store (%s)", s.listener, socketName(s.listener, generation, want), hint)
		}
	}
	return sockets, nil
}

func closeAll[T interface{ descriptor() int }](fds []T) {
	for _, d := range fds {
		_ = unix.Close(d.descriptor()) // inherited and unused: nothing can be lost
	}
}

func (d named) descriptor() int { return d.fd }
