package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"grm/decoy"
)

const usageText = `usage: grm-decoy [flags] [--] SERVER [ARGUMENT...]

Runs SERVER with the sockets that grm-activate put into systemd's fd store. It
is the ExecStart= of a unit with KillMode=process and Restart=always. On a
restart it ends alone: the server goes on until the next one is ready, its
flows are gone, or its time is up. Without such sockets it only supervises.

  --name NAME              the service, as grm-activate has it
  --listen NAME[,NAME...]  order in which the server gets its listeners' sockets
  --ready KIND             when the server is ready: notify (it sends READY=1,
                           the default), exec (a probe exits 0), delay
  --ready-exec COMMAND     the probe, run until it exits 0
  --ready-delay TIME       how long to wait
  --ready-timeout TIME     when to give up (never: systemd's TimeoutStartSec=)
  --watch TIME             how long the older server stays ready to take over
                           again (%v)
  --watch-probe COMMAND    run each second meanwhile: if it fails, flip back
  --drain-signal SIGNAL    tells an older server to drain (none)
  --drain-idle TIME        it ends when no flow had a packet for so long (%v),
  --drain-grace TIME       not sooner after its last packet of any kind (%v),
  --drain-timeout TIME     and at the latest after so long (%v)
  --stop-signal SIGNAL     ends a server (%s)
  -h, --help               this text

A COMMAND is a JSON array of strings, or words separated by spaces. A TIME is
such as 10s or 1m30s. A SIGNAL is a name or a number.

Exit status: the server's, or 128+n if signal n killed it; 127 if there is no
such server, 126 if it cannot be executed, 124 if it was not ready in time; 1 if
grm-decoy itself failed, 2 for bad flags.

Example, in a unit:
  ExecStartPre=+/usr/lib/grm/grm-activate echo udp://0.0.0.0:5201
  ExecStart=/usr/lib/grm/grm-decoy --name echo -- /usr/bin/echo-server
`

func usage() string {
	d := decoy.Defaults()
	return fmt.Sprintf(usageText, d.Watch, d.DrainIdle, d.DrainGrace, d.DrainTimeout, unix.SignalName(d.StopSignal))
}

var errHelp = errors.New("help was asked for")

// parse reads the command line.
func parse(args []string) (decoy.Options, error) {
	o := decoy.Defaults()
	f := flag.NewFlagSet("grm-decoy", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.Name, "name", o.Name, "")
	f.Func("listen", "", func(s string) error { o.Listen = strings.Split(s, ","); return nil })
	f.Func("ready", "", func(s string) error {
		switch o.Ready = decoy.Readiness(s); o.Ready {
		case decoy.Notify, decoy.Exec, decoy.Delay:
			return nil
		}
		return errors.New("notify, exec or delay is wanted")
	})
	command := func(name string, to *[]string) {
		f.Func(name, "", func(s string) (err error) { *to, err = parseCommand(s); return err })
	}
	duration := func(name string, to *time.Duration) {
		f.Func(name, "", func(s string) (err error) { *to, err = parseDuration(s); return err })
	}
	signal := func(name string, to *unix.Signal) {
		f.Func(name, "", func(s string) (err error) { *to, err = parseSignal(s); return err })
	}
	command("ready-exec", &o.ReadyExec)
	duration("ready-delay", &o.ReadyDelay)
	duration("ready-timeout", &o.ReadyTimeout)
	duration("watch", &o.Watch)
	command("watch-probe", &o.WatchProbe)
	signal("drain-signal", &o.DrainSignal)
	signal("stop-signal", &o.StopSignal)
	duration("drain-idle", &o.DrainIdle)
	duration("drain-grace", &o.DrainGrace)
	duration("drain-timeout", &o.DrainTimeout)
	err := f.Parse(args)
	o.Command = f.Args()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return o, errHelp
	case err != nil:
		return o, fmt.Errorf("%w (see grm-decoy --help)", err)
	case len(o.Command) == 0:
		return o, errors.New("no server to run (give its command after --)")
	case o.Ready == decoy.Exec && len(o.ReadyExec) == 0:
		return o, errors.New("--ready exec: no probe (give --ready-exec)")
	case o.Ready == decoy.Delay && o.ReadyDelay == 0:
		return o, errors.New("--ready delay: no time (give --ready-delay)")
	}
	return o, nil
}

func parseCommand(s string) ([]string, error) {
	words := strings.Fields(s)
	if array, found := strings.CutPrefix(strings.TrimSpace(s), "["); found {
		var err error
		if words, err = parseArray(array); err != nil {
			return nil, err
		}
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("no command in it")
	}
	for _, w := range words {
		if strings.ContainsRune(w, 0) {
			return nil, errors.New("a NUL in it")
		}
	}
	return words, nil
}

// parseArray takes a JSON array of strings without its first bracket; what JSON
// alone would escape (a slash, half of a surrogate pair) is not known. Package
// encoding/json would be a twelfth of what a decoy has in memory.
func parseArray(s string) (words []string, err error) {
	const what = "no JSON array of strings"
	if strings.TrimSpace(s) == "]" {
		return nil, nil
	}
	for {
		s = strings.TrimLeft(s, " \t\r\n")
		quoted, err := strconv.QuotedPrefix(s)
		if err != nil || quoted[0] != '"' {
			return nil, fmt.Errorf("%s: no string at %q", what, s)
		}
		word, err := strconv.Unquote(quoted)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", what, quoted, err)
		}
		words = append(words, word)
		s = strings.TrimLeft(s[len(quoted):], " \t\r\n")
		rest, more := strings.CutPrefix(s, ",")
		if !more {
			if strings.TrimSpace(s) != "]" {
				return nil, fmt.Errorf("%s: neither a comma nor its end at %q", what, s)
			}
			return words, nil
		}
		s = rest
	}
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d < 0 {
		err = errors.New("less than nothing")
	}
	return d, err
}

func parseSignal(s string) (unix.Signal, error) {
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 64 {
		return 0, errors.New("no such signal")
	}
	return unix.Signal(n), nil
}
