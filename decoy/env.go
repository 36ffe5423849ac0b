package decoy

import (
	"strconv"
	"strings"

	"grm/internal/notify"
)

// environ is an environment, KEY=VALUE. Keys are compared whole: LISTEN_PID is
// not a prefix of anything.
type environ []string

func (e environ) get(key string) string {
	for _, kv := range e {
		if k, v, found := strings.Cut(kv, "="); found && k == key {
			return v
		}
	}
	return ""
}

// without is e less some keys. It never changes e.
func (e environ) without(keys ...string) environ {
	rest := make(environ, 0, len(e)+1)
next:
	for _, kv := range e {
		k, _, _ := strings.Cut(kv, "=")
		for _, key := range keys {
			if k == key {
				continue next
			}
		}
		rest = append(rest, kv)
	}
	return rest
}

func (e environ) set(key, value string) environ {
	return append(e.without(key), key+"="+value)
}

// What a server of an instance may know. Package grm reads the signals.
const (
	envGeneration  = "GRM_GENERATION"
	envDrainSignal = "GRM_DRAIN_SIGNAL"
	envStopSignal  = "GRM_STOP_SIGNAL"
)

// forKeeper is the environment for a keeper with those descriptors from 3 on.
func (e environ) forKeeper(st stage, names []string) environ {
	return e.set(stageVar, st.with(partKeeper)).listen(names)
}

// forServer is the environment for the stage that becomes the server.
func (e environ) forServer(st stage, names []string, notifySocket string) environ {
	return e.without(bankVar, verbVar, adoptVar, envGeneration, envDrainSignal, envStopSignal).
		set(stageVar, st.with(partServer)).
		set(notify.Env, notifySocket).
		listen(names)
}

// forProbe is the environment for the stage that becomes a probe of a server.
func (e environ) forProbe(st stage, part string, server int) environ {
	return e.without(bankVar, verbVar, adoptVar, notify.Env, "WATCHDOG_PID", "WATCHDOG_USEC").
		set(stageVar, st.with(part)).
		set("MAINPID", strconv.Itoa(server)).
		listen(nil)
}

// listen replaces what tells a process of its descriptors. LISTEN_PID follows
// when the process knows its pid.
func (e environ) listen(names []string) environ {
	e = e.without("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "LISTEN_PIDFDID")
	if len(names) == 0 {
		return e
	}
	e = append(e, "LISTEN_FDS="+strconv.Itoa(len(names)))
	if strings.Join(names, "") == "" {
		return e // nobody gave them names
	}
	return append(e, "LISTEN_FDNAMES="+strings.Join(names, ":"))
}

// own is the environment for what the process with that pid executes: grm's
// own variables are gone, and the per-process ones name it.
func (e environ) own(pid int) environ {
	had := func(key string) bool { return e.get(key) != "" }
	text := strconv.Itoa(pid)
	out := e.without(stageVar)
	if had("LISTEN_FDS") {
		out = out.set("LISTEN_PID", text)
	}
	for _, key := range []string{"WATCHDOG_PID", "SYSTEMD_EXEC_PID"} {
		if had(key) {
			out = out.set(key, text)
		}
	}
	return out
}
