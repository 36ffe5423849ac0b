package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"golang.org/x/net/bpf"
)

const samplePath = "../examples/grm.toml"

// TestSample is the promise of the sample's first line.
func TestSample(t *testing.T) {
	got, err := Load(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Path = samplePath
	want.Name = "sample"
	want.Description = "A sample"
	want.Exec = []string{"/usr/bin/sample-server", "--quiet"}
	want.User = "sample"
	l := DefaultListener()
	l.Name = "sample"
	l.Address = mustAddress(t, "udp://0.0.0.0:5201")
	want.Listen = []Listener{l}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the sample is not the default:\n got %+v\nwant %+v", got, want)
	}
}

// TestSampleIsComplete finds out which keys there are from the hints of unknown ones.
func TestSampleIsComplete(t *testing.T) {
	data, err := os.ReadFile(samplePath)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := findLines(data)
	if err != nil {
		t.Fatal(err)
	}
	const unknown = "qqqqqqqqqqqqqqqqqqqq"
	doc := unknown + " = 1\n"
	for _, table := range []string{"[ready]", "[[listen]]", "[watch]", "[drain]", "[systemd]"} {
		doc += table + "\n" + unknown + " = 1\n"
	}
	_, err = Parse("x", []byte(doc))
	found := 0
	for _, p := range problemsOf(t, err) {
		prefix, ok := strings.CutSuffix(p.Key, unknown)
		if !ok {
			continue
		}
		found++
		for _, key := range strings.Split(strings.TrimPrefix(p.Hint, "known here: "), ", ") {
			if lines[prefix+key] == 0 {
				t.Errorf("the sample does not have %s%s", prefix, key)
			}
		}
	}
	if found != 6 {
		t.Errorf("%d tables of 6 were looked at", found)
	}
}

const minimal = `name = "echo"
exec = ["/usr/bin/echo"]
user = "echo"
[[listen]]
address = "udp://0.0.0.0:5201"
`

func TestParseAll(t *testing.T) {
	got, err := Parse("a.toml", []byte(`
name = "a"
description = "Unicode ✓, 100 % \"quoted\""
exec = ["/bin/a", "", "two words", "line\nend", "$HOME %n"]
user = "1000"
group = "a.b"
working_directory = "/var/lib/a"
environment = { A = "x y", _B = "1\n2" }
ready = { kind = "exec", exec = ["/bin/probe", "-x"], timeout = "5s" }

[[listen]]
name = "one"
address = "udp://[::]:5201"
dual_stack = true
sockets = "cpus"
flow_timeout = "10m"
rcvbuf = 65536

[[listen]]
name = "two"
address = "udp://[::]:53"
dissector = "cbpf"
program = ["48 0 0 9", "0x6 0 0 0x1"]
app = 1
max_apps = 2

[[listen]]
name = "three"
address = "tcp://127.0.0.1:443"

[watch]
time = "0s"

[drain]
signal = "USR1"
max_instances = 3

[systemd.Unit]
After = []
Documentation = ["man:a(8)", "https://example.org/?a=%%20"]
[systemd.Service]
CPUWeight = 200
NoNewPrivileges = false
ExecStartPre = "+/bin/prepare"
PrivateTmp = "off"
RuntimeDirectory = "a b"
`))
	if err != nil {
		t.Fatal(err)
	}
	one, two, three := DefaultListener(), DefaultListener(), DefaultListener()
	one.Name, one.Address, one.DualStack, one.Sockets = "one", mustAddress(t, "udp://[::]:5201"), true, CPUs
	one.FlowTimeout, one.RcvBuf = Duration{10 * time.Minute}, 65536
	two.Name, two.Address, two.Dissector, two.App, two.MaxApps = "two", mustAddress(t, "udp://[::]:53"), DissectorCBPF, 1, 2
	two.Program.Instructions = []bpf.RawInstruction{{Op: 48, K: 9}, {Op: 6, K: 1}}
	three.Name, three.Address, three.Dissector = "three", mustAddress(t, "tcp://127.0.0.1:443"), DissectorNoop
	want := Default()
	want.Path = "a.toml"
	want.Name = "a"
	want.Description = `Unicode ✓, 100 % "quoted"`
	want.Exec = []string{"/bin/a", "", "two words", "line\nend", "$HOME %n"}
	want.User, want.Group, want.WorkingDirectory = "1000", "a.b", "/var/lib/a"
	want.Environment = map[string]string{"A": "x y", "_B": "1\n2"}
	want.Ready.Kind, want.Ready.Exec, want.Ready.Timeout = ReadyExec, []string{"/bin/probe", "-x"}, Duration{5 * time.Second}
	want.Listen = []Listener{one, two, three}
	want.Watch.Time = Duration{}
	want.Drain.Signal, want.Drain.MaxInstances = Signal(10), 3
	want.Drain.Idle = Duration{10 * time.Minute}
	want.Systemd.Unit = Directives{"After": {}, "Documentation": {"man:a(8)", "https://example.org/?a=%%20"}}
	want.Systemd.Service = Directives{"CPUWeight": {"200"}, "NoNewPrivileges": {"no"}, "ExecStartPre": {"+/bin/prepare"},
		"PrivateTmp": {"off"}, "RuntimeDirectory": {"a b"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %+v\nwant %+v", got, want)
	}
}

// TestInlineListeners is the same array of tables, written as values.
func TestInlineListeners(t *testing.T) {
	s, err := Parse("x", []byte("name='x'\nuser='u'\nexec=['/x']\nlisten = [\n {address='udp://[::1]:1', name='a'},\n {address='udp://[::1]:2', name='b'} ]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Listen) != 2 || s.Listen[1].Name != "b" {
		t.Errorf("listeners: %+v", s.Listen)
	}
	_, err = Parse("x", []byte("name='x'\nuser='u'\nexec=['/x']\nlisten = [\n {address='udp://[::1]:1', name='a'},\n {address='udp://[::1]:0', name='b'} ]\n"))
	if p := problemsOf(t, err); len(p) != 1 || p[0].Line != 6 || p[0].Key != "listen[1].address" {
		t.Errorf("problems: %v", err)
	}
}

// TestEverythingAtOnce has a mistake on most of its lines, and expects each to be found where it is.
func TestEverythingAtOnce(t *testing.T) {
	_, err := Parse("bad.toml", []byte(`name = "Echo"
exec = ["server", "a\u0000"]
usr = "echo"
[ready]
kind = "magic"
timeout = 30
[[listen]]
address = "udp://0.0.0.0:0"
sockets = 300
[[listen]]
name = "b"
address = "udp://0.0.0.0:53"
port = 53
flows = "many"
freebind = "yes"
[watch]
probe = "/bin/probe"
[drain]
stop_signal = "SIGFOO"
idle = "-1s"
[systemd.Service]
KillMode = "mixed"
[systemd.Servce]
`))
	want := []string{
		`bad.toml:1: name: the name "Echo" has a forbidden character at 1: 'E' (use 1 to 32 of a-z, 0-9, _ and -, beginning with a letter)`,
		`bad.toml:1: user: missing (add the account that the server is to run as: user = "myserver"; "root" if it must)`,
		`bad.toml:2: exec[0]: "server" is not an absolute path (write an absolute path: a unit runs in a directory of systemd's choice)`,
		`bad.toml:3: usr: unknown key (did you mean user?)`,
		`bad.toml:5: ready.kind: "magic" is not a choice (use one of "notify", "exec", "delay")`,
		`bad.toml:6: ready.timeout: "30" is not a duration (write a number and a unit, such as "10s", "1m30s" or "250ms")`,
		`bad.toml:7: listen[0].name: missing, and the service has 2 listeners (add one; the server sees it in LISTEN_FDNAMES)`,
		`bad.toml:8: listen[0].address: "udp://0.0.0.0:0" has port 0 (choose one: sockets of the old and the new instance must have the same port)`,
		`bad.toml:9: listen[0].sockets: 300 sockets are out of range (write a number from 1 to 256, or "cpus")`,
		`bad.toml:13: listen[1].port: unknown key (known here: address, name, dual_stack, sockets, dissector, flow_timeout, flows, assure, program, rcvbuf, freebind, app, max_apps)`,
		`bad.toml:14: listen[1].flows: a string, not a whole number in range (write it without quotes)`,
		`bad.toml:15: listen[1].freebind: a string, not true or false (write true or false, without quotes)`,
		`bad.toml:17: watch.probe: a string, not an array of strings (write each word in quotes: ["/usr/bin/server", "argument"])`,
		`bad.toml:19: drain.stop_signal: "SIGFOO" is not a signal (write its name, such as "SIGTERM" or "SIGUSR1")`,
		`bad.toml:20: drain.idle: "-1s" is negative (write a number and a unit, such as "10s", "1m30s" or "250ms")`,
		`bad.toml:22: systemd.Service.KillMode: [Service] KillMode= is not free: a restart must end the decoy only, not the old server (leave it out: grm-unitgen writes it)`,
		`bad.toml:23: systemd.Servce: unknown key (did you mean Service?)`,
	}
	if got := fmt.Sprint(err); got != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

func TestRefused(t *testing.T) {
	service := "[systemd.Service]\n"
	for _, c := range []struct{ add, want string }{
		{"sockets = 1\nsockets = 1", "7: listen.sockets: Key 'listen.sockets' has already been defined (each key and each table can stand in the file once)"},
		{"[watch]\n[watch]", "7: Key 'watch' has already been defined"},
		{"x = ", "6: listen.x: "},
		{"a = 1\nb = \"\x01\"", "7: listen.b: "},
		{"[watch]\nprobe = ['/x', 1]", "7: watch.probe[1]: a number, not a string"},
		{"[watch]\ntime = 2024-01-01", "a date, not a string"},
		{"[watch]\ntime = ['1s']", "an array, not a string"},
		{"[watch]\ntime = '2h'", "watch.time: 2h is out of range (write one from 0s to 1h)"},
		{"[watch]\ntime = '0s'\nprobe = ['/x']", "8: watch.probe: there is no watch"},
		{"watch = 10", "listen[0].watch: unknown key"},
		{"[ready]\nkind = 'exec'", `6: ready.exec: missing, and kind is "exec"`},
		{"[ready]\nexec = ['/x']", `7: ready.exec: a probe is of no use where kind is "notify"`},
		{"[ready]\nkind = 'delay'\ndelay = '30s'", `8: ready.delay: 30s is not less than the timeout of 30s`},
		{"[drain]\nstop_signal = ''", "7: drain.stop_signal: a server must be told to stop"},
		{"[drain]\nsignal = 'SIGSTOP'", "7: drain.signal: SIGSTOP would freeze the server"},
		{"[drain]\ntimeout = '2s'", "7: drain.timeout: 2s is less than the grace of 5s"},
		{"[drain]\nmax_instances = 1", "7: drain.max_instances: 1 instances are out of range (write 2 to 32, or 0"},
		{"[drain]\nmax_instances = 99999999999", "7: drain.max_instances: a number, not a whole number in range"},
		{"program = 5", "6: listen[0].program: \"5\" is not a number of instructions, 0 of which follow"},
		{"program = ['1 2 3']\ndissector='cbpf'", `6: listen[0].program: instruction 0: "1 2 3" is not four numbers`},
		{"flow_timeout = '1ms'", "6: listen[0].flow_timeout: 1ms is out of range"},
		{"dual_stack = true", "6: listen[0].dual_stack: only [::]"},
		{"app = 2", "6: listen[0].app: app 2 does not exist where max_apps is 1"},
		{"[[listen]]\naddress = 'udp://0.0.0.0:5201'\nname = 'b'", "4: listen[0].name: missing"},
		{"name = 'a'\n[[listen]]\naddress = 'udp://0.0.0.0:5201'\nname = 'a'", `9: listen[1].name: "a" is the name of listen[0] too`},
		{"name = 'a'\n[[listen]]\naddress = 'udp://0.0.0.0:5201'\nname = 'a'", "8: listen[1].address: udp://0.0.0.0:5201 is taken by listen[0]"},
		{"name = 'a'\n[[listen]]\naddress = 'udp://[::]:5201'\ndual_stack = true\nname = 'b'", "8: listen[1].address: udp://[::]:5201 is taken by listen[0], udp://0.0.0.0:5201"},
		{"[environment]\nLISTEN_PID = '1'", "7: environment.LISTEN_PID: LISTEN_PID is set for each instance"},
		{"[environment]\n'a-b' = '1'", `7: environment.a-b: "a-b" is not a variable's name`},
		{"[environment]\n'' = '1'", `7: environment."": a variable's name is empty`},
		{"[environment]\nA = 1", "7: environment.A: a number, not a string (put it in quotes)"},
		{"[environment]\nA = \"\\u0007\"", "7: environment.A: control character U+0007"},
		{"[environment]\nA = \"\\uFFFE\"", "7: environment.A: U+FFFE, which is not a character"},
		{service + "Type = 'simple'", "7: systemd.Service.Type: [Service] Type= is not free: a restart has succeeded only when"},
		{service + "Environment = 'A=b'", "(write it into [environment])"},
		{service + "ExecStartPre = ''", "(write the command)"},
		{service + "ExecStartPre = ['/a', '']", "(write the command)"},
		{service + "PrivateTmp = true", "a restart would empty /tmp"},
		{service + "PrivateTmp = 'disconnected'", "a restart would empty /tmp"},
		{service + "PrivateNetwork = 'yes'", "grm-activate would bind the sockets inside"},
		{service + "FileDescriptorStoreMax = 64", "old and new sockets are in the store together, 561 at least (leave it out, or write a larger number)"},
		{service + "RuntimeDirectory = 'other'", "keepers leave notes"},
		{service + "X = \"a\\nExecStart=/bin/sh\"", "7: systemd.Service.X: control character U+000A at byte 2"},
		{service + "X = 'a\\'", `7: systemd.Service.X: backslash at the end of "a\\"`},
		{service + "X = ' a'", "white space around"},
		{service + "X = 1.5", "7: systemd.Service.X: a number with a fraction, not a string, a number, true or false"},
		{service + "X = { a = 1 }", "7: systemd.Service.X: a table, not"},
		{service + "'X=\"' = 'a'", `7: systemd.Service."X=\"": "X=\"" is not a directive's name`},
		{"[systemd.Unit]\nStartLimitBurst = 5", "the fifth restart"},
		{"[systemd]\nUnit = 'x'", "7: systemd.Unit: a string, not a table (write [systemd.Unit] on a line of its own, and its keys below)"},
		{"[systemd.Socket]\n", "6: systemd.Socket: unknown key (known here: Unit, Service, Install)"},
	} {
		_, err := Parse("f.toml", []byte(minimal+c.add+"\n"))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s\n got %v\nwant %s", c.add, err, c.want)
		}
	}
}

// TestRefusedWhole has documents that are wrong as a whole.
func TestRefusedWhole(t *testing.T) {
	for what, c := range map[string]struct{ doc, want string }{
		"empty":           {"", "f.toml:1: name: missing (add name = \"f\")\nf.toml:1: exec: missing"},
		"no listeners":    {"listen = []", "listen: there is no listener"},
		"one table":       {"[listen]\naddress = 'udp://0.0.0.0:1'", "f.toml:1: listen: a table, not an array of tables (write [[listen]]"},
		"reserved":        {"name = 'grm'", `f.toml:1: name: the name "grm" is taken`},
		"empty name":      {"name = ''", "f.toml:1: name: the name is empty"},
		"empty exec":      {"exec = []", "f.toml:1: exec: empty"},
		"user":            {"user = 'a b'", `f.toml:1: user: "a b" is not a name that a user can have`},
		"user number":     {"user = '65535'", "f.toml:1: user: 65535 is not a number that a user can have"},
		"user empty":      {"user = ''", "f.toml:1: user: empty"},
		"description":     {"description = \"a\\nb\"", "f.toml:1: description: control character U+000A"},
		"directory":       {"working_directory = 'a'", `f.toml:1: working_directory: "a" is not an absolute path`},
		"no character":    {"exec = ['/a', \"\\uFDD0\"]", "f.toml:1: exec[1]: U+FDD0, which is not a character, at byte 1"},
		"long command":    {"exec = ['/a', '" + strings.Repeat("x", maxCommand) + "']", "f.toml:1: exec: 65540 bytes are more than 65536"},
		"NUL":             {"name = 'a'\nuser = 'b\x00'", "f.toml:2: NUL byte: this is not a text file (save it as UTF-8)"},
		"UTF-16":          {"\xff\xfen\x00", "f.toml:1: NUL byte"},
		"not UTF-8":       {"name = '\xff'", "f.toml:1: "},
		"10 MB":           {strings.Repeat("#23456789\n", 1<<20), "f.toml: more than 1MiB (is this the right file?)"},
		"brackets":        {"a = " + strings.Repeat("[", 500_000), "f.toml:1: nested more than 16 levels deep"},
		"braces":          {"\na = " + strings.Repeat("{a=", 200_000), "f.toml:2: nested more than 16 levels deep"},
		"mixed":           {"a = " + strings.Repeat("[{a=", 200_000), "f.toml:1: nested more than 16 levels deep"},
		"dots":            {strings.Repeat("a.", 400_000) + "a = 1", "f.toml:1: nested more than 16 levels deep"},
		"header":          {"[" + strings.Repeat("a.", 400_000) + "a]", "f.toml:1: nested more than 16 levels deep"},
		"many listeners":  {strings.Repeat("[[listen]]\n", 65), "listen: 65 listeners are more than 64"},
		"many problems":   {strings.Repeat("[[listen]]\naddress = 1\n", 60), "problems more (is this the right file?)"},
		"garbage":         {"\x7fELF\x02\x01\x01", "f.toml:1: "},
		"unfinished long": {"a = '''" + strings.Repeat("[", 100_000), "f.toml:"},
	} {
		_, err := Parse("f.toml", []byte(c.doc))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			text := fmt.Sprint(err)
			t.Errorf("%s:\n got %.300s\nwant %s", what, text, c.want)
		}
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "echo.toml")
	if _, err := Load(path); !os.IsNotExist(err) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte(minimal), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if s.Path != path || s.Name != "echo" || s.Listen[0].Name != "echo" {
		t.Errorf("%+v", s)
	}
	if _, err := Load("/dev/zero"); err == nil || !strings.Contains(err.Error(), "/dev/zero: more than 1MiB") {
		t.Errorf("a file without an end: %v", err)
	}
}

// FuzzParse holds that no document crashes the parser, that each problem has a place and a cause on one line, and that
// the finder knows every key of the TOML library's.
func FuzzParse(f *testing.F) {
	sample, err := os.ReadFile(samplePath)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{
		string(sample), minimal, "a.b.'c d'.\"e\\u0041\" = 1\n[x.y]\nz = {a = [1, {b = 2}], c.d = \"\"\"\n]\"\"\"\"\" }\n",
		"[[a]]\n[a.b]\nc = 1\n[[a]]\n[[a.d]]\ne = 1979-05-27 07:32:00Z # c\n[[a.d]]\ne = '''\n[[''' \n", "\ufeffname = \"x\"\r\n",
		"a = [ # c\n 1, # d\n]\nb = {x = 1}\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, doc string) {
		s, err := Parse("f", []byte(doc))
		if (s == nil) == (err == nil) {
			t.Fatalf("service %v and error %v", s, err)
		}
		if err != nil {
			for _, p := range problemsOf(t, err) {
				if p.What == "" || p.File != "f" || strings.ContainsAny(p.Error(), "\n\x00") {
					t.Errorf("a problem that says nothing, or too much: %q", p.Error())
				}
			}
		}
		var values map[string]any
		md, err := toml.Decode(doc, &values)
		lines, tooDeep := findLines([]byte(doc))
		if err != nil || tooDeep != nil {
			return
		}
		total := 1 + strings.Count(doc, "\n")
		for _, line := range lines {
			if line < 1 || line > total {
				t.Fatalf("line %d of %d", line, total)
			}
		}
		// Arrays are counted in lines only.
		plain := map[string]bool{}
		for k := range lines {
			plain[withoutIndexes(k)] = true
		}
		for _, k := range md.Keys() {
			key := ""
			for _, part := range k {
				key = join(key, part)
			}
			if !plain[withoutIndexes(key)] {
				t.Fatalf("%q has the key %s, which is on no line: %v", doc, key, lines)
			}
		}
	})
}

// withoutIndexes takes [n] out of a key.
func withoutIndexes(key string) string {
	var b strings.Builder
	for key != "" {
		before, rest, ok := strings.Cut(key, "[")
		b.WriteString(before)
		if !ok {
			break
		}
		_, key, _ = strings.Cut(rest, "]")
	}
	return b.String()
}

// problemsOf takes an error of Parse apart.
func problemsOf(t testing.TB, err error) []*Problem {
	t.Helper()
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("not a list of problems: %v", err)
	}
	var ps []*Problem
	for _, e := range joined.Unwrap() {
		ps = append(ps, e.(*Problem))
	}
	if !slices.IsSortedFunc(ps, func(a, b *Problem) int { return a.Line - b.Line }) {
		t.Errorf("problems are not in the order of lines: %v", err)
	}
	return ps
}
