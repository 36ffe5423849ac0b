package config

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/bpf"
)

func TestListenerText(t *testing.T) {
	full := Listener{
		Name:        "quic",
		Address:     mustAddress(t, "udp://[::]:5201"),
		DualStack:   true,
		Sockets:     CPUs,
		Dissector:   DissectorCBPF,
		FlowTimeout: Duration{90 * time.Second},
		Flows:       4096,
		Assure:      AssurePacket,
		Program:     Program{File: "/etc/grm/a b%.cbpf"},
		RcvBuf:      1 << 20,
		Freebind:    true,
		App:         1,
		MaxApps:     4,
	}
	inline := DefaultListener()
	inline.Address = mustAddress(t, "udp://127.0.0.1:53")
	inline.Dissector = DissectorCBPF
	inline.Program.Instructions = []bpf.RawInstruction{{Op: 0x30, K: 9}, {Op: 6, K: 1}}
	plain := DefaultListener()
	plain.Address = mustAddress(t, "udp://0.0.0.0:5201")
	tcp := DefaultListener()
	tcp.Address = mustAddress(t, "tcp://[::1]:443")
	tcp.Dissector = DissectorNoop
	for _, c := range []struct {
		text string
		want Listener
	}{
		{"udp://0.0.0.0:5201", plain},
		{"tcp://[::1]:443", tcp},
		{"udp://127.0.0.1:53?dissector=cbpf&program=2,48+0+0+9,6+0+0+1", inline},
		{"udp://[::]:5201?name=quic&sockets=cpus&dissector=cbpf&timeout=1m30s&flows=4096&rcvbuf=1048576&freebind=1&dualstack=1&assure=packet&app=1&max_apps=4&program=/etc/grm/a+b%25.cbpf", full},
	} {
		var got Listener
		if err := got.UnmarshalText([]byte(c.text)); err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s:\n got %+v\nwant %+v", c.text, got, c.want)
		}
		if s := got.String(); s != c.text {
			t.Errorf("%s comes back as %s", c.text, s)
		}
	}
}

// TestListenerDefaults is a command line's flags: what an address cannot have is left out, what it says wins.
func TestListenerDefaults(t *testing.T) {
	flags := DefaultListener()
	flags.Sockets, flags.DualStack, flags.Freebind = 4, true, true
	for text, want := range map[string]string{
		"udp://[::]:1":                       "udp://[::]:1?sockets=4&freebind=1&dualstack=1",
		"udp://[::]:1?dualstack=0&sockets=2": "udp://[::]:1?sockets=2&freebind=1",
		"udp://0.0.0.0:1":                    "udp://0.0.0.0:1?sockets=4&freebind=1",
		"tcp://[::1]:1?freebind=0":           "tcp://[::1]:1?sockets=4",
	} {
		l, err := ParseListener(text, flags)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if l.String() != want {
			t.Errorf("%s: %s, want %s", text, l, want)
		}
	}
}

func TestListenerErrors(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                    {`"" is not an address (write protocol://address:port`},
		"0.0.0.0:53":                          {"is not an address"},
		"quic://0.0.0.0:53":                   {`"quic" is not a protocol`},
		"udp://localhost:53":                  {"is not a literal IP address and port"},
		"udp://0.0.0.0":                       {"is not a literal IP address and port"},
		"udp://0.0.0.0:70000":                 {"is not a literal IP address and port"},
		"udp://0.0.0.0:0":                     {"has port 0 (choose one"},
		"udp://[::ffff:1.2.3.4]:1":            {"IPv4 address in IPv6 clothes (write it as 1.2.3.4)"},
		"udp://[fe80::1%eth0]:1":              {"link-local"},
		"udp://224.0.0.1:1":                   {"multicast"},
		"udp://255.255.255.255:1":             {"broadcast"},
		"udp://0.0.0.0:1?":                    {`"" is not a setting of a listener`},
		"udp://0.0.0.0:1?socket=1":            {`udp://0.0.0.0:1: "socket" is not a setting of a listener (use name, sockets, `},
		"udp://0.0.0.0:1?sockets":             {"sockets: no value (write sockets=VALUE)"},
		"udp://0.0.0.0:1?sockets=1&sockets=1": {"sockets: given twice"},
		"udp://0.0.0.0:1?sockets=0":           {"udp://0.0.0.0:1: sockets: 0 sockets are out of range (write a number from 1 to 256"},
		"udp://0.0.0.0:1?sockets=300&timeout=5&name=A": {
			"sockets: 300 sockets are out of range", `timeout: "5" is not a duration`, `name: the name "A" has a forbidden character`},
		"udp://0.0.0.0:1?timeout=10ms":                    {"timeout: 10ms is out of range"},
		"udp://0.0.0.0:1?flows=7":                         {"flows: 7 flows are out of range (write a number from 1024 to 4194304)"},
		"udp://0.0.0.0:1?rcvbuf=1GiB":                     {"rcvbuf: 1GiB is out of range"},
		"udp://0.0.0.0:1?freebind=yes":                    {`freebind: "yes" is neither on nor off`},
		"udp://0.0.0.0:1?dualstack=1":                     {"dualstack: only [::] can take IPv4 too"},
		"udp://0.0.0.0:1?assure=always":                   {`assure: "always" is not a choice (use one of "reply", "packet", "explicit")`},
		"udp://0.0.0.0:1?app=1":                           {"app: app 1 does not exist where max_apps is 1"},
		"udp://0.0.0.0:1?max_apps=17":                     {"max_apps: 17 apps are out of range"},
		"udp://0.0.0.0:1?max_apps=2":                      {`max_apps: the dissector flow cannot tell apps apart (leave it out, or set dissector to "cbpf")`},
		"udp://0.0.0.0:1?dissector=cbpf":                  {"program: the dissector cbpf needs a program"},
		"udp://0.0.0.0:1?program=/x":                      {"program: the dissector flow takes no program"},
		"udp://0.0.0.0:1?program=x":                       {`program: "x" is not an absolute path`},
		"udp://0.0.0.0:1?program=/a/../b":                 {`program: "/a/../b" is not a clean path (write "/b")`},
		"udp://0.0.0.0:1?program=%0a":                     {"program:"},
		"udp://0.0.0.0:1?program=%zz":                     {"program: \"%zz\" is not escaped as a URL is"},
		"udp://0.0.0.0:1?program=2,6+0+0+1":               {"program: \"2\" is not a number of instructions, 1 of which follow"},
		"tcp://0.0.0.0:1?dissector=flow":                  {"dissector: flow is for UDP, and this is TCP"},
		"udp://0.0.0.0:1?name=" + strings.Repeat("a", 33): {"is longer than 32 bytes"},
	} {
		var l Listener
		err := l.UnmarshalText([]byte(text))
		if err == nil {
			t.Errorf("%s: no error, want %q", text, want)
			continue
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s:\n got %v\nwant %s", text, err, w)
			}
		}
		if !reflect.DeepEqual(l, Listener{}) {
			t.Errorf("%s: the listener was changed in spite of the error", text)
		}
	}
}

func FuzzListener(f *testing.F) {
	for _, s := range []string{
		"udp://0.0.0.0:5201", "tcp://[::1]:443?sockets=cpus", "udp://[::]:1?dualstack=1&timeout=1h&rcvbuf=0",
		"udp://127.0.0.1:53?dissector=cbpf&program=2,48+0+0+9,6+0+0+1", "udp://1.2.3.4:5?name=a-b_c&assure=explicit&app=1&max_apps=2",
		"udp://1.2.3.4:5?dissector=cbpf&program=/a%00b", "udp://1.2.3.4:5?dissector=cbpf&program=/%C3%A4+%2B%26%3D%25",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var l, again Listener
		if l.UnmarshalText([]byte(s)) != nil {
			return
		}
		text := l.String()
		if err := again.UnmarshalText([]byte(text)); err != nil {
			t.Fatalf("%q was read and written as %q, which is refused: %v", s, text, err)
		}
		if !reflect.DeepEqual(l, again) {
			t.Fatalf("%q, written as %q, changes:\n%+v\n%+v", s, text, l, again)
		}
		if again.String() != text {
			t.Fatalf("%q is written as %q and then as %q", s, text, again)
		}
		if strings.ContainsAny(text, " \t\n\"'\\$") {
			t.Fatalf("%q is written as %q, which is not one plain word", s, text)
		}
	})
}

func mustAddress(t testing.TB, s string) (a Address) {
	t.Helper()
	if err := a.UnmarshalText([]byte(s)); err != nil {
		t.Fatal(err)
	}
	return a
}
