package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/config"
	"grm/decoy"
)

func TestHelp(t *testing.T) {
	for _, flag := range []string{"-h", "-help", "--help"} {
		var out, bad bytes.Buffer
		if err := run(env{&out, &bad}, []string{flag}); err != nil || bad.Len() > 0 {
			t.Errorf("%s: %v, %q", flag, err, bad.String())
		}
		for _, want := range []string{"usage: grm-decoy", "--drain-timeout", "(10m0s)", "(SIGTERM)", "Exit status:"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%s does not say %q", flag, want)
			}
		}
		if strings.Contains(out.String(), "%!") {
			t.Error("the text and its values do not fit")
		}
	}
}

// A hand-written line without flags means what a TOML file that says nothing
// means.
func TestDefaults(t *testing.T) {
	d, c := decoy.Defaults(), config.Default()
	for what, pair := range map[string][2]any{
		"ready":         {string(d.Ready), string(c.Ready.Kind)},
		"watch":         {d.Watch, c.Watch.Time.Duration},
		"drain idle":    {d.DrainIdle, c.Drain.Idle.Duration},
		"drain grace":   {d.DrainGrace, c.Drain.Grace.Duration},
		"drain timeout": {d.DrainTimeout, c.Drain.Timeout.Duration},
		"stop signal":   {unix.SignalName(d.StopSignal), c.Drain.StopSignal.String()},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %v here, %v in config", what, pair[0], pair[1])
		}
	}
}

func TestParse(t *testing.T) {
	got, err := parse([]string{"--name", "full", "--listen", "quic,app", "--ready", "exec", "--ready-exec", `["/bin/probe","a b","\"c\""]`,
		"--ready-timeout", "1m", "--watch", "0s", "--watch-probe", "/bin/true  x", "--drain-signal", "SIGUSR1", "--stop-signal", "int",
		"--drain-idle", "1m", "--drain-grace", "10s", "--drain-timeout", "1h", "--", "/usr/sbin/full", "--foreground", "--", "-x"})
	if err != nil {
		t.Fatal(err)
	}
	want := decoy.Options{Name: "full", Listen: []string{"quic", "app"}, Command: []string{"/usr/sbin/full", "--foreground", "--", "-x"},
		Ready: decoy.Exec, ReadyExec: []string{"/bin/probe", "a b", `"c"`}, ReadyTimeout: time.Minute,
		WatchProbe: []string{"/bin/true", "x"}, DrainSignal: unix.SIGUSR1, StopSignal: unix.SIGINT,
		DrainIdle: time.Minute, DrainGrace: 10 * time.Second, DrainTimeout: time.Hour}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("parsed\n%+v, want\n%+v", got, want)
	}
	if o, err := parse([]string{"server", "--ready", "x"}); err != nil || !slices.Equal(o.Command, []string{"server", "--ready", "x"}) {
		t.Errorf("as mmdecoy's: %v, %v", o.Command, err)
	}
	if o, err := parse([]string{"--drain-signal", "36", "x"}); err != nil || o.DrainSignal != 36 {
		t.Errorf("a number for a signal: %v, %v", o.DrainSignal, err)
	}
}

func TestBadFlags(t *testing.T) {
	for _, c := range []struct{ line, message string }{
		{"", "no server to run"},
		{"--", "no server to run"},
		{"--what x", "flag provided but not defined: -what (see grm-decoy --help)"},
		{"--ready never x", "notify, exec or delay is wanted"},
		{"--ready exec x", "give --ready-exec"},
		{"--ready delay x", "give --ready-delay"},
		{"--ready-exec [1] x", "no JSON array of strings"},
		{"--ready-exec [] x", "no command in it"},
		{`--ready-exec ["a"]] x`, "neither a comma nor its end"},
		{`--ready-exec ["a",] x`, "no string at"},
		{`--ready-exec ['a'] x`, "no string at"},
		{"--ready-exec [`a`] x", "no string at"},
		{`--watch-probe [""] x`, "no command in it"},
		{`--watch-probe ["a\u0000"] x`, "a NUL in it"},
		{"--watch 10 x", "missing unit"},
		{"--watch -1s x", "less than nothing"},
		{"--drain-signal SIGNOTHING x", "no such signal"},
		{"--stop-signal 65 x", "no such signal"},
		{"--stop-signal 0 x", "no such signal"},
	} {
		var bad bytes.Buffer
		err := run(env{io.Discard, &bad}, strings.Fields(c.line))
		if err == nil || !strings.Contains(bad.String(), c.message) || !strings.HasPrefix(bad.String(), "grm-decoy: ") || strings.Count(bad.String(), "\n") != 1 {
			t.Errorf("%q: %q", c.line, bad.String())
		}
		if status(err) != decoy.ExitUsage {
			t.Errorf("%q: status %d", c.line, status(err))
		}
	}
}

func TestStatus(t *testing.T) {
	for want, err := range map[int]error{0: nil, 139: exit{139, nil}, 127: exit{127, errors.New("x")}, 2: errors.New("x")} {
		if got := status(err); got != want {
			t.Errorf("%v: %d", err, got)
		}
	}
}

func FuzzParseCommand(f *testing.F) {
	f.Add(`["a","b c"]`)
	f.Add("a  b")
	f.Add("[ \"\\u00e9\\n\" ,\t\"\\\"]\"\n]")
	f.Add(" [")
	f.Fuzz(func(t *testing.T, s string) {
		words, err := parseCommand(s)
		if err != nil {
			return
		}
		if len(words) == 0 || words[0] == "" || slices.ContainsFunc(words, func(w string) bool { return strings.ContainsRune(w, 0) }) {
			t.Fatalf("%q became %q", s, words)
		}
		// What encoding/json writes comes back; it can write valid UTF-8 only.
		for i := range words {
			words[i] = strings.ToValidUTF8(words[i], "")
		}
		array, err := json.Marshal(words)
		if err != nil {
			t.Fatal(err)
		}
		if words[0] == "" {
			return
		}
		if again, err := parseCommand(string(array)); err != nil || !slices.Equal(again, words) {
			t.Fatalf("%s became %q: %v", array, again, err)
		}
	})
}
