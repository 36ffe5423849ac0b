package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// MaxFileSize is the largest file that is read.
const MaxFileSize = 1 << 20

// Load reads and checks a service's file. The error lists everything that is wrong with it, each a *Problem.
func Load(path string) (*Service, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// No stat: its size says nothing about a pipe or a device.
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, err
	}
	return Parse(path, data)
}

// Parse is Load for a file that is in memory already; name is for the messages and for Service.Path.
func Parse(name string, data []byte) (*Service, error) {
	d := &document{file: name}
	if s := d.parse(data); len(d.problems) == 0 {
		return s, nil
	}
	for _, p := range d.problems {
		p.File = name
	}
	slices.SortStableFunc(d.problems, func(a, b *Problem) int { return a.Line - b.Line })
	if more := len(d.problems) - maxProblems; more > 0 {
		d.problems = d.problems[:maxProblems]
		last := problemf("is this the right file?", "%d problems more", more)
		last.File, last.Line = name, d.problems[maxProblems-1].Line
		d.problems = append(d.problems, last)
	}
	return nil, d.problems.err()
}

// maxProblems is how many problems of a file are shown.
const maxProblems = 100

// document is a file while it is read.
type document struct {
	file     string
	lines    map[string]int // where each key stands
	problems problems
}

// report adds a problem with the value of a key.
func (d *document) report(key string, err error) {
	d.problems.add(key, err)
	p := d.problems[len(d.problems)-1]
	for k := key; p.Line == 0 && k != ""; k = parent(k) {
		p.Line = d.lines[k] // a key that is missing is reported where its table begins
	}
}

// reported tells whether a key has a problem already.
func (d *document) reported(key string) bool {
	return slices.ContainsFunc(d.problems, func(p *Problem) bool { return p.Key == key })
}

// parent is the key of the table in which a key stands.
func parent(key string) string {
	i := strings.LastIndexByte(key, '.')
	return key[:max(i, 0)]
}

// parse returns a service that is whole if there are no problems.
func (d *document) parse(data []byte) *Service {
	if len(data) > MaxFileSize {
		d.report("", problemf("is this the right file?", "more than %s", Size(MaxFileSize)))
		return nil
	}
	if i := bytes.IndexByte(data, 0); i >= 0 {
		p := problemf("save it as UTF-8", "NUL byte: this is not a text file")
		p.Line = 1 + bytes.Count(data[:i], []byte("\n"))
		d.report("", p)
		return nil
	}
	lines, err := findLines(data)
	if err != nil {
		d.report("", err)
		return nil
	}
	d.lines = lines
	values := map[string]any{}
	if _, err := toml.Decode(string(data), &values); err != nil {
		var syntax toml.ParseError
		if !errors.As(err, &syntax) {
			d.report("", err)
			return nil
		}
		p := problemf("", "%s", oneLine(strings.TrimSuffix(syntax.Message, ".")))
		if strings.Contains(p.What, "already been defined") {
			p.Hint = "each key and each table can stand in the file once"
		}
		if p.Line = syntax.Position.Line; p.Line == 0 {
			p.Line = 1 + bytes.Count(data, []byte("\n")) // the library has no place for a sudden end
		}
		d.report(oneLine(syntax.LastKey), p)
		return nil
	}
	return d.service(&table{doc: d, values: values})
}

// oneLine escapes what the TOML library repeats of the document, and what it takes for a character at its end.
func oneLine(s string) string {
	if strings.IndexFunc(s, unicode.IsControl) < 0 && utf8.ValidString(s) {
		return s
	}
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

func (d *document) service(t *table) *Service {
	s := Default()
	s.Path = d.file

	t.required("name", fmt.Sprintf("add name = %q", nameFor(d.file)))
	t.str("name", &s.Name, checkServiceName)
	t.str("description", &s.Description, optional(checkLine))
	t.required("exec", `add the server's command line: exec = ["/usr/bin/server", "argument"]`)
	t.command("exec", &s.Exec)
	t.required("user", `add the account that the server is to run as: user = "myserver"; "root" if it must`)
	t.str("user", &s.User, checkUser)
	t.str("group", &s.Group, optional(checkUser))
	t.str("working_directory", &s.WorkingDirectory, optional(checkPath))
	t.environment("environment", &s.Environment)

	ready := t.table("ready")
	ready.text("kind", &s.Ready.Kind)
	ready.command("exec", &s.Ready.Exec)
	ready.duration("delay", &s.Ready.Delay, 0, 10*time.Minute)
	ready.duration("timeout", &s.Ready.Timeout, time.Second, time.Hour)
	switch {
	case s.Ready.Kind == ReadyExec && len(s.Ready.Exec) == 0 && !d.reported("ready.exec"):
		d.report("ready.exec", problemf(`add exec = ["/usr/lib/myserver/probe"]`, `missing, and kind is "exec"`))
	case s.Ready.Kind != ReadyExec && len(s.Ready.Exec) > 0:
		d.report("ready.exec", problemf(`set kind = "exec", or leave exec out`, "a probe is of no use where kind is %q", s.Ready.Kind))
	case s.Ready.Kind == ReadyDelay && s.Ready.Delay.Duration >= s.Ready.Timeout.Duration:
		d.report("ready.delay", problemf("raise ready.timeout", "%s is not less than the timeout of %s", s.Ready.Delay, s.Ready.Timeout))
	}
	ready.end()

	watch := t.table("watch")
	watch.duration("time", &s.Watch.Time, 0, time.Hour)
	watch.command("probe", &s.Watch.Probe)
	if s.Watch.Time.Duration == 0 && len(s.Watch.Probe) > 0 {
		d.report("watch.probe", problemf("set watch.time, or leave the probe out", "there is no watch to run a probe in: watch.time is 0"))
	}
	watch.end()

	d.listeners(s, t)

	drain := t.table("drain")
	drain.text("signal", &s.Drain.Signal)
	drain.text("stop_signal", &s.Drain.StopSignal)
	if s.Drain.StopSignal == NoSignal {
		d.report("drain.stop_signal", problemf(`write "SIGTERM", or "SIGKILL" for a server that needs no good-bye`, "a server must be told to stop"))
	}
	for _, l := range s.Listen {
		if !drain.has("idle") && l.FlowTimeout.Duration > s.Drain.Idle.Duration {
			s.Drain.Idle = l.FlowTimeout
		}
	}
	drain.duration("idle", &s.Drain.Idle, time.Second, MaxFlowTimeout)
	drain.duration("grace", &s.Drain.Grace, 0, time.Hour)
	drain.duration("timeout", &s.Drain.Timeout, time.Second, 30*24*time.Hour)
	if s.Drain.Timeout.Duration < s.Drain.Grace.Duration {
		d.report("drain.timeout", problemf("raise it, or lower drain.grace", "%s is less than the grace of %s", s.Drain.Timeout, s.Drain.Grace))
	}
	drain.integer("max_instances", &s.Drain.MaxInstances)
	if n := s.Drain.MaxInstances; n != 0 && (n < 2 || n > MaxInstances) {
		d.report("drain.max_instances", problemf(fmt.Sprintf("write 2 to %d, or 0 to refuse one more when there are %d", MaxInstances, MaxInstances),
			"%d instances are out of range", n))
	}
	drain.end()

	systemd := t.table("systemd")
	systemd.directives("Unit", &s.Systemd.Unit, s)
	systemd.directives("Service", &s.Systemd.Service, s)
	systemd.directives("Install", &s.Systemd.Install, s)
	systemd.end()

	t.end()
	return s
}

// MaxInstances is how many instances of a service can live at a time: one for each bank.
const MaxInstances = 32

// maxListeners keeps a unit's line, and the number of sockets that a server gets, within reason.
const maxListeners = 64

// tomlKeys are the keys of a listener that are called differently in its text form.
var tomlKeys = map[string]string{"timeout": "flow_timeout", "dualstack": "dual_stack"}

func (d *document) listeners(s *Service, t *table) {
	t.required("listen", `add [[listen]], and below it address = "udp://0.0.0.0:5201"`)
	tables := t.tables("listen")
	if len(tables) > maxListeners {
		d.report("listen", problemf("divide the service", "%d listeners are more than %d", len(tables), maxListeners))
		return
	}
	if len(tables) == 0 && t.has("listen") && !d.reported("listen") {
		d.report("listen", problemf("add one, or start the server without grm", "there is no listener"))
	}
	for _, lt := range tables {
		l := DefaultListener()
		lt.required("address", `add where to listen: address = "udp://0.0.0.0:5201"`)
		lt.text("address", &l.Address)
		addressBad := d.reported(lt.key("address"))
		l.fit()
		lt.str("name", &l.Name, optional(CheckName))
		lt.boolean("dual_stack", &l.DualStack)
		lt.text("sockets", &l.Sockets)
		lt.text("dissector", &l.Dissector)
		lt.text("flow_timeout", &l.FlowTimeout)
		lt.integer("flows", &l.Flows)
		lt.text("assure", &l.Assure)
		lt.program("program", &l.Program)
		lt.text("rcvbuf", &l.RcvBuf)
		lt.boolean("freebind", &l.Freebind)
		lt.integer("app", &l.App)
		lt.integer("max_apps", &l.MaxApps)
		lt.end()
		l.check(func(key string, err error) {
			if k, ok := tomlKeys[key]; ok {
				key = k
			}
			if d.reported(lt.key(key)) || addressBad && (key == "dual_stack" || key == "dissector") {
				return
			}
			d.report(lt.key(key), err)
		})
		if l.Name == "" && !d.reported(lt.key("name")) {
			if len(tables) == 1 {
				l.Name = s.Name
			} else {
				d.report(lt.key("name"), problemf("add one; the server sees it in LISTEN_FDNAMES", "missing, and the service has %d listeners", len(tables)))
			}
		}
		for i, other := range s.Listen {
			if l.Name != "" && other.Name == l.Name {
				d.report(lt.key("name"), problemf("choose another", "%q is the name of listen[%d] too", l.Name, i))
			}
			if !addressBad && overlap(l, other) {
				d.report(lt.key("address"), problemf("leave one of them out", "%s is taken by listen[%d], %s", l.Address, i, other.Address))
			}
		}
		s.Listen = append(s.Listen, l)
	}
}

// overlap tells whether two listeners would be in one reuseport group: the same address, or a dual-stack wildcard and
// the other family's wildcard.
func overlap(a, b Listener) bool {
	if a.Address == b.Address {
		return true
	}
	same := a.Address.Proto == b.Address.Proto && a.Address.Port() == b.Address.Port()
	wild := a.Address.Addr().IsUnspecified() && b.Address.Addr().IsUnspecified()
	return same && wild && (a.DualStack || b.DualStack)
}

// nameFor is a guess at a service's name.
func nameFor(file string) string {
	stem := strings.TrimSuffix(filepath.Base(file), ".toml")
	if checkServiceName(stem) != nil {
		return "echo"
	}
	return stem
}

// table is one table of the document. Its methods take a key's value if there is one, and leave the default if not.
type table struct {
	doc    *document
	path   string // empty for the document itself
	values map[string]any
	known  []string
}

// key is the dotted key of a key in this table.
func (t *table) key(name string) string { return join(t.path, name) }

// has tells whether the file has the key.
func (t *table) has(name string) bool {
	_, ok := t.values[name]
	return ok
}

// required reports a key that is not there.
func (t *table) required(name, hint string) {
	if !t.has(name) {
		p := problemf(hint, "missing")
		if t.path == "" {
			p.Line = 1
		}
		t.doc.report(t.key(name), p)
	}
}

// take returns a key's value, and remembers that the key is known.
func (t *table) take(name string) (any, bool) {
	t.known = append(t.known, name)
	v, ok := t.values[name]
	return v, ok
}

// wrongType reports a value that is of another type than it should be.
func (t *table) wrongType(key string, v any, want, hint string) {
	t.doc.report(key, problemf(hint, "%s, not %s", typeName(v), want))
}

// typeName says in TOML's words what a value is.
func typeName(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case int64:
		return "a number"
	case float64:
		return "a number with a fraction"
	case bool:
		return "true or false"
	case []any, []map[string]any:
		return "an array"
	case map[string]any:
		return "a table"
	default:
		return "a date"
	}
}

// str takes a string that passes the check.
func (t *table) str(name string, dst *string, check func(string) error) {
	v, ok := t.take(name)
	if !ok {
		return
	}
	s, ok := v.(string)
	if !ok {
		t.wrongType(t.key(name), v, "a string", "put it in quotes")
		return
	}
	if err := check(s); err != nil {
		t.doc.report(t.key(name), err)
		return
	}
	*dst = s
}

// optional is a check that lets "" pass, as none.
func optional(check func(string) error) func(string) error {
	return func(s string) error {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

// text takes a value whose type owns its text form. Numbers are given to it as they stand, so that it can say what it
// misses: 10 is no duration, "10s" is.
func (t *table) text(name string, dst interface{ UnmarshalText([]byte) error }) {
	v, ok := t.take(name)
	if !ok {
		return
	}
	var s string
	switch v := v.(type) {
	case string:
		s = v
	case int64, float64, bool:
		s = fmt.Sprint(v)
	default:
		t.wrongType(t.key(name), v, "a string", "put it in quotes")
		return
	}
	if err := dst.UnmarshalText([]byte(s)); err != nil {
		t.doc.report(t.key(name), err)
	}
}

// duration takes a duration within limits.
func (t *table) duration(name string, dst *Duration, low, high time.Duration) {
	before := len(t.doc.problems)
	t.text(name, dst)
	if len(t.doc.problems) == before && (dst.Duration < low || dst.Duration > high) {
		t.doc.report(t.key(name), problemf(fmt.Sprintf("write one from %s to %s", Duration{low}, Duration{high}), "%s is out of range", dst))
	}
}

func (t *table) integer(name string, dst *int) {
	v, ok := t.take(name)
	if !ok {
		return
	}
	n, ok := v.(int64)
	if !ok || n < math.MinInt32 || n > math.MaxInt32 {
		t.wrongType(t.key(name), v, "a whole number in range", "write it without quotes")
		return
	}
	*dst = int(n)
}

func (t *table) boolean(name string, dst *bool) {
	v, ok := t.take(name)
	if !ok {
		return
	}
	if *dst, ok = v.(bool); !ok {
		t.wrongType(t.key(name), v, "true or false", "write true or false, without quotes")
	}
}

// list takes an array of strings.
func (t *table) list(name, hint string) ([]string, bool) {
	v, ok := t.take(name)
	if !ok {
		return nil, false
	}
	items, ok := v.([]any)
	if !ok {
		t.wrongType(t.key(name), v, "an array of strings", hint)
		return nil, false
	}
	words := make([]string, 0, len(items))
	for i, item := range items {
		s, ok := item.(string)
		if !ok {
			t.wrongType(fmt.Sprintf("%s[%d]", t.key(name), i), item, "a string", "put it in quotes")
			continue
		}
		words = append(words, s)
	}
	return words, len(words) == len(items)
}

// maxCommand is how many bytes the words of a command may have together; systemd reads lines of a megabyte.
const maxCommand = 64 << 10

// command takes a command line: an array of words, the first of which is an absolute path. An empty array is none.
func (t *table) command(name string, dst *[]string) {
	words, ok := t.list(name, `write each word in quotes: ["/usr/bin/server", "argument"]`)
	if !ok {
		return
	}
	if len(words) == 0 {
		if name == "exec" && t.path == "" {
			t.doc.report(t.key(name), problemf(`write the server's command line: ["/usr/bin/server", "argument"]`, "empty"))
		}
		return
	}
	size := 0
	for i, w := range words {
		size += len(w) + 1
		key := fmt.Sprintf("%s[%d]", t.key(name), i)
		if strings.ContainsRune(w, 0) {
			t.doc.report(key, problemf("leave it out: no program can be given one", "NUL character in %s", quote(w)))
			return
		}
		err := checkUnicode(w) // else systemctl cannot even show the unit
		if i == 0 && err == nil {
			err = checkPath(w)
		}
		if err != nil {
			t.doc.report(key, err)
			return
		}
	}
	if size > maxCommand {
		t.doc.report(t.key(name), problemf("put the rest into a file", "%d bytes are more than %d", size, maxCommand))
		return
	}
	*dst = words
}

// program takes a file's path, or an array with one instruction per string.
func (t *table) program(name string, dst *Program) {
	if _, isArray := t.values[name].([]any); !isArray {
		t.text(name, dst)
		return
	}
	words, ok := t.list(name, "")
	if !ok || len(words) == 0 {
		return
	}
	insns, err := parseInstructions(words)
	if err != nil {
		t.doc.report(t.key(name), err)
		return
	}
	*dst = Program{Instructions: insns}
}

// environment takes a table of strings.
func (t *table) environment(name string, dst *map[string]string) {
	env := t.table(name)
	for _, k := range slices.Sorted(maps.Keys(env.values)) {
		v, _ := env.take(k)
		s, ok := v.(string)
		if !ok {
			env.wrongType(env.key(k), v, "a string", "put it in quotes")
			continue
		}
		if err := checkEnvironment(k, s); err != nil {
			t.doc.report(env.key(k), err)
			continue
		}
		if *dst == nil {
			*dst = map[string]string{}
		}
		(*dst)[k] = s
	}
}

// directives takes a section of systemd's: strings, numbers, true or false, or arrays of them.
func (t *table) directives(section string, dst *Directives, s *Service) {
	given := t.table(section)
	for _, k := range slices.Sorted(maps.Keys(given.values)) {
		v, _ := given.take(k)
		items, isArray := v.([]any)
		if !isArray {
			items = []any{v}
		}
		values := make([]string, 0, len(items))
		for _, item := range items {
			value, err := directiveValue(item)
			if err != nil {
				t.doc.report(given.key(k), err)
				break
			}
			values = append(values, value)
		}
		if len(values) < len(items) {
			continue
		}
		if err := checkDirective(section, k, values, s); err != nil {
			t.doc.report(given.key(k), err)
			continue
		}
		if *dst == nil {
			*dst = Directives{}
		}
		(*dst)[k] = values
	}
}

// directiveValue is a TOML value as systemd writes it.
func directiveValue(v any) (string, error) {
	switch v := v.(type) {
	case string:
		return v, checkLine(v)
	case int64:
		return strconv.FormatInt(v, 10), nil
	case bool:
		if v {
			return "yes", nil
		}
		return "no", nil
	default:
		return "", problemf(`write it as systemd does, in quotes; several lines of one key as an array`, "%s, not a string, a number, true or false", typeName(v))
	}
}

// table takes a table; one that is not there is empty.
func (t *table) table(name string) *table {
	sub := &table{doc: t.doc, path: t.key(name)}
	v, ok := t.take(name)
	if !ok {
		return sub
	}
	if sub.values, ok = v.(map[string]any); !ok {
		t.wrongType(t.key(name), v, "a table", "write ["+sub.path+"] on a line of its own, and its keys below")
	}
	return sub
}

// tables takes an array of tables.
func (t *table) tables(name string) []*table {
	v, ok := t.take(name)
	if !ok {
		return nil
	}
	maps, ok := v.([]map[string]any)
	if list, isList := v.([]any); isList { // inline tables, or none
		ok = true
		for _, item := range list {
			m, isTable := item.(map[string]any)
			maps, ok = append(maps, m), ok && isTable
		}
	}
	if !ok {
		t.wrongType(t.key(name), v, "an array of tables", "write [["+t.key(name)+"]] on a line of its own, and its keys below")
		return nil
	}
	tables := make([]*table, len(maps))
	for i, m := range maps {
		tables[i] = &table{doc: t.doc, path: fmt.Sprintf("%s[%d]", t.key(name), i), values: m}
	}
	return tables
}

// end reports keys that nobody took.
func (t *table) end() {
	for _, k := range slices.Sorted(maps.Keys(t.values)) {
		if slices.Contains(t.known, k) {
			continue
		}
		hint := "known here: " + strings.Join(t.known, ", ")
		if near := nearest(k, t.known); near != "" {
			hint = "did you mean " + near + "?"
		}
		t.doc.report(t.key(k), problemf(hint, "unknown key"))
	}
}

// nearest is the name that was probably meant, "" if none is like it.
func nearest(s string, names []string) string {
	best, bound := "", len(s)/3+2
	for _, n := range names {
		if len(s) > 2*MaxNameLen {
			break
		}
		if d := distance(strings.ToLower(s), strings.ToLower(n)); d < bound {
			best, bound = n, d
		}
	}
	return best
}

// distance is how many letters must be put in, left out or replaced to make b of a.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
