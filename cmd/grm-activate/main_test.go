package main

import (
	"bytes"
	"errors"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"grm/activate"
	"grm/config"
)

func TestHelp(t *testing.T) {
	for _, flag := range []string{"-h", "-help", "--help"} {
		var out, log bytes.Buffer
		err := run(env{&out, &log}, []string{flag})
		if flag == "-help" {
			// A single dash has one letter behind it: this is -h with a value.
			if !errors.Is(err, errUsage) {
				t.Errorf("%s: %v", flag, err)
			}
			continue
		}
		if err != nil || out.String() != usage || log.Len() > 0 {
			t.Errorf("%s: %v, %q, %q", flag, err, out.String(), log.String())
		}
	}
	for _, o := range (&parsed{}).options(new(config.Listener)) {
		refused := o.value && o.set("x") != nil && strings.Contains(o.set("x").Error(), "not supported")
		if named := strings.Contains(usage, "--"+o.long); named == refused {
			t.Errorf("--%s: in the usage text %v, refused %v", o.long, named, refused)
		}
		if o.short != "" && !refused && !strings.Contains(usage, "-"+o.short+", --"+o.long) {
			t.Errorf("-%s is not in the usage text", o.short)
		}
	}
}

func TestParse(t *testing.T) {
	listener := func(text string, change func(*config.Listener)) config.Listener {
		l, err := config.ParseListener(text, config.DefaultListener())
		if err != nil {
			t.Fatal(err)
		}
		l.Name = "echo"
		if change != nil {
			change(&l)
		}
		return l
	}
	const address = "udp://0.0.0.0:5201"
	for line, want := range map[string]parsed{
		"echo " + address:        {request: activate.Request{Listeners: []config.Listener{listener(address, nil)}}},
		"echo 0.0.0.0:5201":      {request: activate.Request{Listeners: []config.Listener{listener(address, nil)}}},
		"-c4 -v echo " + address: {request: activate.Request{Verbose: true, Listeners: []config.Listener{listener(address, func(l *config.Listener) { l.Sockets = 4 })}}},
		"echo " + address + " --count cpus --rcvbuf=1MiB --freebind": {request: activate.Request{Listeners: []config.Listener{
			listener(address, func(l *config.Listener) { l.Sockets, l.RcvBuf, l.Freebind = config.CPUs, 1<<20, true })}}},
		"-4 -f 30 echo udp://[::]:53": {request: activate.Request{Listeners: []config.Listener{
			listener("udp://[::]:53", func(l *config.Listener) {
				l.DualStack, l.FlowTimeout = true, config.Duration{Duration: 30 * time.Second}
			})}}},
		"-n -f=1m echo " + address: {request: activate.Request{Listeners: []config.Listener{
			listener(address, func(l *config.Listener) {
				l.Dissector, l.FlowTimeout = config.DissectorNoop, config.Duration{Duration: time.Minute}
			})}}},
		"-b /x.bpf -a 1 -m 2 echo " + address: {request: activate.Request{Listeners: []config.Listener{listener(address, func(l *config.Listener) {
			l.Dissector, l.Program, l.App, l.MaxApps = config.DissectorCBPF, config.Program{File: "/x.bpf"}, 1, 2
		})}}},
		"--assure packet -c 2 echo " + address + "?sockets=3": {request: activate.Request{Listeners: []config.Listener{
			listener(address, func(l *config.Listener) { l.Assure, l.Sockets = config.AssurePacket, 3 })}}},
		"--no-register --advance-working-gen --user nobody --max-instances 3 --unit e.service echo " + address + " -- /bin/server -c 4": {request: activate.Request{
			NoRegister: true, Advance: true, User: "nobody", MaxInstances: 3, Unit: "e.service",
			Listeners: []config.Listener{listener(address, nil)}, Command: []string{"/bin/server", "-c", "4"}}},
		"--stop echo":                       {mode: stop},
		"--stop-post --unit e.service echo": {mode: stopPost, request: activate.Request{Unit: "e.service"}},
	} {
		want.request.Service = "echo"
		got, err := parse(strings.Fields(line))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n got %+v\nwant %+v", line, err, got, want)
		}
	}
}

func TestTwoAddresses(t *testing.T) {
	p, err := parse(strings.Fields("e udp://0.0.0.0:443?name=quic tcp://0.0.0.0:443?name=web"))
	if err != nil || len(p.request.Listeners) != 2 || p.request.Listeners[0].Name != "quic" || p.request.Listeners[1].Dissector != config.DissectorNoop {
		t.Fatalf("%v: %+v", err, p)
	}
}

// Each wrong command line is refused with what is wrong, by status 2.
func TestMisuse(t *testing.T) {
	for line, says := range map[string]string{
		"":                                  "no service name",
		"echo":                              "no address",
		"Echo udp://0.0.0.0:1":              "service name",
		"../x udp://0.0.0.0:1":              "service name",
		"-c 0 echo udp://0.0.0.0:1":         "0 sockets are out of range",
		"-c 300 echo udp://0.0.0.0:1":       "300 sockets are out of range",
		"-c x echo udp://0.0.0.0:1":         "not a number of sockets",
		"echo udp://0.0.0.0:1 -c":           "flag -c needs a value",
		"echo udp://0.0.0.0:0":              "port 0",
		"echo sctp://0.0.0.0:1":             "not a protocol",
		"echo udp://localhost:1":            "not a literal IP address",
		"echo udp://0.0.0.0:1?x=1":          "not a setting",
		"echo udp://0.0.0.0:1?sockets=0":    "out of range",
		"echo udp://0.0.0.0:1 udp://[::]:1": "no name",
		"echo udp://0.0.0.0:1?name=a udp://[::]:1?name=a":               "is taken by",
		"echo udp://0.0.0.0:1?name=a udp://0.0.0.0:1?name=b":            "given twice",
		"echo udp://0.0.0.0:1?name=a udp://[::]:1?name=b&dualstack=1":   "takes its packets too",
		"echo udp://[::]:1?name=a&dualstack=1 udp://127.0.0.1:1?name=b": "takes its packets too",
		"--sni=a:1 echo udp://0.0.0.0:1":                                "not supported",
		"-d abc echo udp://0.0.0.0:1":                                   "not supported",
		"-t abc echo udp://0.0.0.0:1":                                   "not supported",
		"--app 16 echo udp://0.0.0.0:1":                                 "not a number from 0 to 15",
		"--max-instances 1 echo udp://[::]:1":                           "not a number from 2 to 32",
		"--freebind=1 echo udp://0.0.0.0:1":                             "takes no value",
		"--frobnicate echo udp://0.0.0.0:1":                             "--frobnicate is not known",
		"--user= echo udp://0.0.0.0:1":                                  "empty value",
		"echo udp://0.0.0.0:1 --":                                       "no command",
		"--stop":                                                        "no service name",
		"--stop echo udp://0.0.0.0:1":                                   "nothing else",
		"--stop echo -- x":                                              "nothing else",
		"--stop --stop-post echo":                                       "either --stop or --stop-post",
		"--rcvbuf -5 echo udp://0.0.0.0:1":                              "--rcvbuf",
		"-f 5parsecs echo udp://0.0.0.0:1":                              "not a duration",
		"--assure never echo udp://0.0.0.0:1":                           "--assure",
	} {
		var out, log bytes.Buffer
		err := run(env{&out, &log}, strings.Fields(line))
		if status(err) != activate.StatusUsage || !strings.Contains(err.Error(), says) || out.Len() > 0 {
			t.Errorf("%q: status %d: %v", line, status(err), err)
		}
	}
}

func TestPrograms(t *testing.T) {
	file := t.TempDir() + "/x.bpf"
	ls := []config.Listener{{}, {Program: config.Program{File: file}}}
	if err := readPrograms(ls); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "(put the program there, or name another file)") {
		t.Errorf("no file: %v", err)
	}
	if err := syscall.Mkfifo(file, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{file, "/dev/zero", "/"} {
		ls[1].Program.File = other
		if err := readPrograms(ls); err == nil || !strings.Contains(err.Error(), other+" is no file of at most") {
			t.Errorf("%s: %v", other, err)
		}
	}
	ls[1].Program.File = file
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := readPrograms(ls); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("garbage: %v", err)
	}
	if err := os.WriteFile(file, []byte("1\n6 0 0 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := readPrograms(ls); err != nil || len(ls[1].Program.Instructions) != 1 {
		t.Errorf("%v: %+v", err, ls[1].Program)
	}
}

// FuzzParse: a command line is either refused as misuse, or names a service,
// and listeners with different names whose text form means the same again.
func FuzzParse(f *testing.F) {
	f.Add("-c4 echo udp://0.0.0.0:5201?timeout=3s -- x y")
	f.Add("--stop-post\x00echo")
	f.Add("e udp://0.0.0.0:443?name=quic tcp://[::]:443?name=web&sockets=cpus")
	f.Fuzz(func(t *testing.T, line string) {
		p, err := parse(strings.FieldsFunc(line, func(r rune) bool { return r == ' ' }))
		if err != nil {
			if status(err) != activate.StatusUsage {
				t.Fatalf("%q: %v", line, err)
			}
			return
		}
		if p.mode == help {
			return
		}
		if config.CheckName(p.request.Service) != nil {
			t.Fatalf("%q: service %q", line, p.request.Service)
		}
		names := map[string]bool{}
		for _, l := range p.request.Listeners {
			if names[l.Name] || config.CheckName(l.Name) != nil {
				t.Fatalf("%q: listener %q", line, l.Name)
			}
			names[l.Name] = true
			again, err := config.ParseListener(l.String(), config.DefaultListener())
			again.Name = l.Name
			if err != nil || again.String() != l.String() {
				t.Fatalf("%q: %s became %s, %v", line, l, again, err)
			}
		}
		if p.mode == start && len(names) == 0 {
			t.Fatalf("%q: a start without a listener", line)
		}
	})
}
