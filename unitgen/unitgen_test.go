package unitgen

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"grm/config"
)

var update = flag.Bool("update", false, "write the golden units anew")

// goldens are the services in testdata, and the versions for which each has a unit there.
var goldens = map[string][]int{
	"echo":    {252, 257},
	"hostile": {252},
	"full":    {252},
}

func TestGolden(t *testing.T) {
	for name, versions := range goldens {
		for _, version := range versions {
			s := load(t, name)
			got := mustRender(t, s, Options{SystemdVersion: version})
			if again := mustRender(t, load(t, name), Options{SystemdVersion: version}); !bytes.Equal(got, again) {
				t.Errorf("%s: the second unit differs from the first", name)
			}
			file := fmt.Sprintf("testdata/%s.%d.service", name, version)
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s is not what is rendered (go test ./unitgen -update writes it, git diff shows it):\n%s", file, got)
			}
			if o := OriginOf(got); o != Ours {
				t.Errorf("%s: origin %v", file, o)
			}
		}
	}
}

// TestVerify gives each golden unit to the service manager's own check.
func TestVerify(t *testing.T) {
	needs(t, "systemd-analyze")
	for name := range goldens {
		s := load(t, name)
		dir := t.TempDir()
		// The check wants to see the commands; the directory for tests is one that the unit would hide.
		if s.Systemd.Service == nil {
			s.Systemd.Service = config.Directives{}
		}
		s.Systemd.Service["TemporaryFileSystem"] = nil
		for _, command := range []string{"grm-activate", "grm-decoy"} {
			write(t, filepath.Join(dir, command), []byte("#!/bin/sh\n"), 0o755)
		}
		unit := filepath.Join(dir, FileName(s))
		write(t, unit, mustRender(t, s, Options{SystemdVersion: DefaultSystemdVersion, BinDir: dir}), 0o644)
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", unit).CombinedOutput()
		if err != nil || strings.Contains(string(out), s.Name) {
			t.Errorf("systemd-analyze verify %s: %v\n%s", name, err, out)
		}
	}
}

// TestExposure is the promise that a unit is locked up by default.
func TestExposure(t *testing.T) {
	needs(t, "systemd-analyze")
	s := load(t, "echo")
	unit := filepath.Join(t.TempDir(), FileName(s))
	write(t, unit, mustRender(t, s, Options{SystemdVersion: DefaultSystemdVersion}), 0o644)
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", unit).CombinedOutput()
	m := regexp.MustCompile(`exposure level for echo.service: ([0-9.]+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("systemd-analyze security: %v\n%s", err, out)
	}
	if level, err := strconv.ParseFloat(string(m[1]), 64); err != nil || level > 1.8 {
		t.Errorf("exposure level %s, want at most 1.8:\n%s", m[1], out)
	}
}

// TestSystemdReadsBack has systemd itself load the units, and compares what it says that it would run.
func TestSystemdReadsBack(t *testing.T) {
	const manager = "/lib/systemd/systemd"
	needs(t, manager)
	for name := range goldens {
		s := load(t, name)
		dir := t.TempDir()
		for d := dir; d != os.TempDir(); d = filepath.Dir(d) {
			if err := os.Chmod(d, 0o755); err != nil { // for nobody
				t.Fatal(err)
			}
		}
		write(t, filepath.Join(dir, FileName(s)), mustRender(t, s, Options{SystemdVersion: DefaultSystemdVersion}), 0o644)
		cmd := exec.Command(manager, "--test", "--system", "--no-pager", "--unit="+FileName(s))
		cmd.Env = []string{"SYSTEMD_UNIT_PATH=" + dir + ":/lib/systemd/system"}
		if os.Geteuid() == 0 { // the manager's test mode refuses root
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		out, err := cmd.CombinedOutput()
		_, dump, found := strings.Cut(string(out), "-> Unit "+FileName(s)+":\n")
		dump, _, _ = strings.Cut(dump, "-> Unit ")
		if !found {
			t.Fatalf("%s --test: %v\n%s", manager, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, FileName(s)+":") && !strings.Contains(line, "-> Unit") && !strings.Contains(line, "is not executable") {
				t.Errorf("systemd complains: %s", line)
			}
		}
		var commands [][]string
		var environment []string
		description := ""
		for line := range strings.Lines(dump) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "Command Line":
				words, err := dumped(value)
				if err != nil {
					t.Errorf("%s: %q: %v", name, value, err)
				}
				commands = append(commands, words)
			case "Description":
				description = value
			}
		}
		// Values with line ends are dumped as they are: look at them in the text as a whole.
		for k, v := range s.Environment {
			if environment = append(environment, k); !strings.Contains(dump, "Environment: "+k+"="+v+"\n") {
				t.Errorf("%s: %s=%q is not in what systemd read", name, k, v)
			}
		}
		if n := strings.Count(dump, "\tEnvironment: "); n != len(environment) {
			t.Errorf("%s: systemd read %d variables of %d", name, n, len(environment))
		}
		if want := s.Description; want != "" && description != want {
			t.Errorf("%s: systemd read the description %q, want %q", name, description, want)
		}
		server := slices.IndexFunc(commands, func(c []string) bool { return c[0] == DefaultBinDir+"/grm-decoy" })
		if server < 0 {
			t.Fatalf("%s: no decoy among %q", name, commands)
		}
		_, words := cutWords(commands[server], "--")
		if !reflect.DeepEqual(words, s.Exec) {
			t.Errorf("%s: systemd would run\n%q, want\n%q", name, words, s.Exec)
		}
		for flag, want := range map[string][]string{"--ready-exec": s.Ready.Exec, "--watch-probe": s.Watch.Probe} {
			if _, rest := cutWords(commands[server], flag); len(want) > 0 {
				var got []string
				if err := json.Unmarshal([]byte(rest[0]), &got); err != nil || !reflect.DeepEqual(got, want) {
					t.Errorf("%s: %s is %q, want %q", name, flag, got, want)
				}
			}
		}
	}
}

// dumped takes a command line apart as systemd's dump writes it, for a shell, with $ as in the unit.
func dumped(s string) ([]string, error) {
	octal := regexp.MustCompile(`\\[0-3][0-7][0-7]`)
	s = octal.ReplaceAllStringFunc(s, func(o string) string {
		n, _ := strconv.ParseUint(o[1:], 8, 8)
		return fmt.Sprintf(`\x%02x`, n)
	})
	for _, c := range []string{"$", "`"} {
		s = strings.ReplaceAll(s, `\`+c, c)
	}
	for c, n := range map[string]string{"a": "07", "b": "08", "f": "0c", "r": "0d", "v": "0b"} {
		s = regexp.MustCompile(`((?:^|[^\\])(?:\\\\)*)\\`+c).ReplaceAllString(s, `${1}\x`+n)
	}
	words, err := splitWords(s)
	for i := range words {
		words[i] = strings.ReplaceAll(words[i], "$$", "$")
	}
	return words, err
}

// cutWords is what stands before and after a word.
func cutWords(words []string, at string) (before, after []string) {
	i := slices.Index(words, at)
	if i < 0 {
		return words, nil
	}
	return words[:i], words[i+1:]
}

func TestPassThrough(t *testing.T) {
	s := mustParse(t, `
[systemd.Unit]
After = ["a.service", "b.service"]
[systemd.Service]
ProtectHome = false
SystemCallFilter = []
ExecStartPre = ["/bin/first", "/bin/second"]
ReadWritePaths = ["/a", "/b"]
[systemd.Install]
WantedBy = []
`)
	p, err := parseUnit(string(mustRender(t, s, Options{SystemdVersion: 252})))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string][]string{
		"Unit.After":               {"a.service", "b.service"},
		"Service.ProtectHome":      {"no"},
		"Service.SystemCallFilter": nil,
		"Service.ExecStartPre":     {"/bin/first", "/bin/second", "+/usr/lib/grm/grm-activate echo udp://0.0.0.0:5201"},
		"Service.ReadWritePaths":   {"/a", "/b"},
		"Service.ProtectSystem":    {"strict"},
		"Install.WantedBy":         nil,
	} {
		if !slices.Equal(p[key], want) {
			t.Errorf("%s: %q, want %q", key, p[key], want)
		}
	}
}

func TestVersions(t *testing.T) {
	s := mustParse(t, "")
	for version, want := range map[int]bool{252: false, 253: false, 254: true, 257: true} {
		unit := mustRender(t, s, Options{SystemdVersion: version})
		if got := bytes.Contains(unit, []byte("\nFileDescriptorStorePreserve=")); got != want {
			t.Errorf("systemd %d: FileDescriptorStorePreserve: %v, want %v", version, got, want)
		}
	}
}

func TestLimits(t *testing.T) {
	many := mustParse(t, "sockets = 256\nname = 'a'\n[[listen]]\naddress = 'udp://[::]:5201'\nname = 'b'\nsockets = 'cpus'\n")
	p, err := parseUnit(string(mustRender(t, many, Options{SystemdVersion: 252})))
	if err != nil {
		t.Fatal(err)
	}
	if got := p["Service.LimitNOFILE"]; !slices.Equal(got, []string{"2051:524288"}) {
		t.Errorf("LimitNOFILE: %q", got)
	}
	if got := p["Service.FileDescriptorStoreMax"]; !slices.Equal(got, []string{"1074"}) {
		t.Errorf("FileDescriptorStoreMax: %q", got)
	}
	if p, _ := parseUnit(string(mustRender(t, mustParse(t, ""), Options{SystemdVersion: 252}))); p["Service.LimitNOFILE"] != nil {
		t.Error("a service with one socket does not need LimitNOFILE=")
	}
}

func TestRefused(t *testing.T) {
	for what, c := range map[string]struct {
		change func(*config.Service, *Options)
		want   string
	}{
		"version":         {func(_ *config.Service, o *Options) { o.SystemdVersion = 246 }, "echo.toml: systemd 246 is too old (grm needs 247)"},
		"bindir":          {func(_ *config.Service, o *Options) { o.BinDir = "/a b" }, `the directory of grm's commands, "/a b", is not a plain absolute path`},
		"bindir relative": {func(_ *config.Service, o *Options) { o.BinDir = "bin" }, "is not a plain absolute path"},
		"bindir hidden": {func(_ *config.Service, o *Options) { o.BinDir = "/root/grm/bin" },
			"the directory of grm's commands: /root/grm/bin would not be visible to the service, whose ProtectHome= hides /root (put it elsewhere, or set ProtectHome in [systemd.Service])"},
		"exec hidden":  {func(s *config.Service, _ *Options) { s.Exec = []string{"/tmp/server"} }, "exec: /tmp/server would not be visible to the service, whose TemporaryFileSystem= hides /tmp"},
		"probe hidden": {func(s *config.Service, _ *Options) { s.Watch.Probe = []string{"/home/me/probe"} }, "watch.probe: /home/me/probe would not be visible"},
		"injection": {func(s *config.Service, _ *Options) {
			s.Systemd.Service = config.Directives{"Nice": {"5\nExecStartPre=+/bin/sh"}}
		}, "[Service] Nice=: \"5\\nExecStartPre=+/bin/sh\" does not fit on one line"},
		"continuation": {func(s *config.Service, _ *Options) { s.Description = `a\` }, `[Unit] Description=: "a\\" does not fit on one line`},
		"long":         {func(s *config.Service, _ *Options) { s.Exec = append(s.Exec, strings.Repeat("x", maxLine)) }, "are more than the 1048575 that systemd reads"},
	} {
		s, o := mustParse(t, ""), Options{SystemdVersion: 252}
		c.change(s, &o)
		var b bytes.Buffer
		err := Render(&b, s, o)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\n got %.300v\nwant %s", what, err, c.want)
		}
		if b.Len() > 0 {
			t.Errorf("%s: a refused unit was written in part", what)
		}
	}
	s := mustParse(t, "[systemd.Service]\nProtectHome = 'read-only'\n")
	s.Exec[0] = "/home/me/server"
	mustRender(t, s, Options{SystemdVersion: 252})
}

func TestOrigin(t *testing.T) {
	unit := mustRender(t, mustParse(t, ""), Options{SystemdVersion: 252})
	for what, c := range map[string]struct {
		text []byte
		want Origin
	}{
		"ours":            {unit, Ours},
		"a line more":     {append(slices.Clone(unit), "Nice=5\n"...), Edited},
		"a byte changed":  {bytes.Replace(unit, []byte("strict"), []byte("full"), 1), Edited},
		"a hash changed":  {bytes.Replace(unit, []byte("sha256:"), []byte("sha256:0"), 1), Edited},
		"no first line":   {unit[bytes.IndexByte(unit, '\n')+1:], Foreign},
		"empty":           {nil, Foreign},
		"by hand":         {[]byte("[Unit]\nDescription=a\n"), Foreign},
		"mark of another": {[]byte("# Generated by grm-unitgen from x\n[Unit]\n"), Foreign},
	} {
		if got := OriginOf(c.text); got != c.want {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
	s := mustParse(t, "")
	s.Path = "/etc/grm/a\nExecStart=/bin/sh: edit that file, not this one. sha256:0"
	if unit := mustRender(t, s, Options{SystemdVersion: 252}); OriginOf(unit) != Ours || bytes.Contains(unit, []byte("\nExecStart=/bin/sh")) {
		t.Errorf("a hostile path:\n%s", unit)
	}
}

// FuzzRender holds that what a TOML says is what systemd would read in the unit, however hostile the strings are.
func FuzzRender(f *testing.F) {
	for _, s := range []string{
		"a", "", "two words", "line\nend", "tab\t", `quote" and 'quote'`, `back\slash\`, "%n %% %", "$HOME ${A} $$", ";", "#", "\x01\x7f", "✓ ü \u2028\u202e\ufffe\U0001f600",
		`{"a":["b"]}`, `\x41\n`, "+/bin/sh", "@x", "!", "--", "a=b", " lead", "\\\n    ",
	} {
		f.Add(s, s, s, s)
	}
	f.Fuzz(func(t *testing.T, arg, probe, env, description string) {
		doc := "name = 'a'\nuser = 'u'\ndescription = " + tomlString(description) +
			"\nexec = ['/bin/a', " + tomlString(arg) + ", " + tomlString(arg+probe) + ", 'last']" +
			"\nworking_directory = " + tomlString("/"+description) +
			"\n[environment]\nA = " + tomlString(env) + "\nB = '1'\n[ready]\nkind = 'exec'\nexec = ['/bin/p', " + tomlString(probe) + "]" +
			"\n[watch]\nprobe = ['/bin/w', " + tomlString(env) + "]\n[[listen]]\naddress = 'udp://[::]:1'\n"
		s, err := config.Parse("a.toml", []byte(doc))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := Render(&b, s, Options{SystemdVersion: 252}); err != nil {
			return
		}
		p, err := parseUnit(b.String())
		if err != nil {
			t.Fatalf("%v\n%s", err, b.String())
		}
		if len(p["Service.ExecStart"]) != 1 || len(p["Service.ExecStartPre"]) != 1 || len(p["Service.Environment"]) != 2 {
			t.Fatalf("lines were made or lost:\n%s", b.String())
		}
		words, err := commandLine(p["Service.ExecStart"][0])
		if err != nil {
			t.Fatalf("%v\n%s", err, b.String())
		}
		head, server := words, []string(nil)
		for i := range words {
			if words[i] == "--" { // the first one that is no flag's value: values are JSON or plain
				head, server = words[:i], words[i+1:]
				break
			}
		}
		if !reflect.DeepEqual(server, s.Exec) {
			t.Fatalf("systemd would run %q, want %q:\n%s", server, s.Exec, b.String())
		}
		for flag, want := range map[string][]string{"--ready-exec": s.Ready.Exec, "--watch-probe": s.Watch.Probe} {
			_, rest := cutWords(head, flag)
			var got []string
			if err := json.Unmarshal([]byte(rest[0]), &got); err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %q, %v; want %q", flag, got, err, want)
			}
		}
		words, err = splitWords(p["Service.Environment"][0])
		if err != nil || len(words) != 1 {
			t.Fatalf("Environment=%s: %q, %v", p["Service.Environment"][0], words, err)
		}
		if got, err := single(words[0], "%"); err != nil || got != "A="+s.Environment["A"] {
			t.Fatalf("Environment: %q, %v; want %q", got, err, s.Environment["A"])
		}
		for key, want := range map[string]string{"Unit.Description": s.Description, "Service.WorkingDirectory": s.WorkingDirectory} {
			if want == "" {
				continue
			}
			if got, err := single(p[key][0], "%"); err != nil || got != want {
				t.Fatalf("%s: %q, %v; want %q", key, got, err, want)
			}
		}
	})
}

// tomlString is a text as a TOML string, with all that is not plain escaped.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		if r >= ' ' && r < 0x7f && r != '"' && r != '\\' {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, `\U%08x`, r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// mustParse is a small service with some lines more.
func mustParse(t testing.TB, more string) *config.Service {
	t.Helper()
	s, err := config.Parse("echo.toml", []byte("name = 'echo'\nuser = 'echo'\nexec = ['/usr/bin/echo-server']\n[[listen]]\naddress = 'udp://0.0.0.0:5201'\n"+more))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func load(t testing.TB, name string) *config.Service {
	t.Helper()
	s, err := config.Load("testdata/" + name + ".toml")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustRender(t testing.TB, s *config.Service, o Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Render(&b, s, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func write(t testing.TB, path string, text []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, text, mode); err != nil {
		t.Fatal(err)
	}
}

// needs skips a test where a program of systemd's is missing.
func needs(t testing.TB, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("%s is not there (install systemd)", program)
	}
}
