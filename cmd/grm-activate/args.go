package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"grm/activate"
	"grm/bpfprog/cbpf"
	"grm/config"
)

// mode is which of the unit's commands this is.
type mode int

const (
	start mode = iota
	stop
	stopPost
	help
)

// errUsage is a command line that makes no sense.
var errUsage = errors.New("see grm-activate --help")

func misused(format string, args ...any) error {
	return fmt.Errorf("%w (%w)", fmt.Errorf(format, args...), errUsage)
}

// option is one flag: its names, and what it does with its value; a flag without one gets "".
type option struct {
	short, long string
	value       bool
	set         func(value string) error
}

// parsed is a command line.
type parsed struct {
	mode    mode
	request activate.Request
}

// parse reads a command line. Flags may stand anywhere before "--".
func parse(args []string) (parsed, error) {
	p := parsed{}
	defaults := config.DefaultListener()
	var words []string
	options := p.options(&defaults)
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if arg == "--" {
			if len(args) == 0 {
				return p, misused("no command after --")
			}
			p.request.Command = args
			break
		}
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			words = append(words, arg)
			continue
		}
		name, value, has := cutOption(arg)
		i := slices.IndexFunc(options, func(o option) bool { return name == "-"+o.short || name == "--"+o.long })
		if i < 0 {
			return p, misused("flag %s is not known", name)
		}
		switch o := options[i]; {
		case !o.value && has:
			return p, misused("flag %s takes no value", name)
		case o.value && !has && len(args) == 0:
			return p, misused("flag %s needs a value", name)
		case o.value && !has:
			value, args = args[0], args[1:]
		}
		if err := options[i].set(value); err != nil {
			return p, misused("flag %s: %w", name, err)
		}
	}
	if p.mode == help {
		return p, nil
	}
	return p, p.words(words, defaults)
}

// cutOption takes "--count=4", "-c4" and "-c=4" apart.
func cutOption(arg string) (name, value string, has bool) {
	if strings.HasPrefix(arg, "--") {
		return cut(arg, strings.IndexByte(arg, '='), 1)
	}
	if len(arg) == 2 {
		return arg, "", false
	}
	if arg[2] == '=' {
		return cut(arg, 2, 1)
	}
	return cut(arg, 2, 0)
}

func cut(arg string, at, skip int) (name, value string, has bool) {
	if at < 0 {
		return arg, "", false
	}
	return arg[:at], arg[at+skip:], true
}

func (p *parsed) options(l *config.Listener) []option {
	yes := func(b *bool) func(string) error {
		return func(string) error { *b = true; return nil }
	}
	text := func(into *string) func(string) error {
		return func(s string) error {
			if s == "" {
				return errors.New("empty value")
			}
			*into = s
			return nil
		}
	}
	number := func(into *int, least, most int) func(string) error {
		return func(s string) error {
			n, err := strconv.Atoi(s)
			if err != nil || n < least || n > most {
				return fmt.Errorf("%q is not a number from %d to %d", s, least, most)
			}
			*into = n
			return nil
		}
	}
	unsupported := func(why string) func(string) error {
		return func(string) error { return errors.New("not supported: " + why) }
	}
	change := func(to mode) func(string) error {
		return func(string) error {
			if p.mode != start && p.mode != to && to != help {
				return errors.New("give either --stop or --stop-post")
			}
			p.mode = to
			return nil
		}
	}
	return []option{
		{"c", "count", true, func(s string) error { return l.Sockets.UnmarshalText([]byte(s)) }},
		{"4", "also-ipv4", false, yes(&l.DualStack)},
		{"", "freebind", false, yes(&l.Freebind)},
		{"", "rcvbuf", true, func(s string) error { return l.RcvBuf.UnmarshalText([]byte(s)) }},
		{"f", "flow-timeout", true, func(s string) error { return setTimeout(&l.FlowTimeout, s) }},
		{"n", "noop", false, func(string) error { l.Dissector = config.DissectorNoop; return nil }},
		{"b", "bpf", true, func(s string) error {
			l.Dissector = config.DissectorCBPF
			return l.Program.UnmarshalText([]byte(s))
		}},
		{"", "assure", true, func(s string) error { return l.Assure.UnmarshalText([]byte(s)) }},
		{"a", "app", true, number(&l.App, 0, config.MaxApps-1)},
		{"m", "apps-max", true, number(&l.MaxApps, 1, config.MaxApps)},
		{"t", "tubular", true, unsupported("grm has no daemon that could hand sockets to tubular")},
		{"s", "sni", true, unsupported("the TLS server name cannot choose the app yet; let the apps share the address with --app, by a --bpf program")},
		{"d", "digest", true, unsupported("there are no compiled-in dissectors to choose from by digest; use --bpf")},
		{"", "no-register", false, yes(&p.request.NoRegister)},
		{"", "advance-working-gen", false, yes(&p.request.Advance)},
		{"", "user", true, text(&p.request.User)},
		{"", "unit", true, text(&p.request.Unit)},
		{"", "max-instances", true, number(&p.request.MaxInstances, 2, 32)},
		{"v", "verbose", false, yes(&p.request.Verbose)},
		{"", "stop", false, change(stop)},
		{"", "stop-post", false, change(stopPost)},
		{"h", "help", false, change(help)},
	}
}

// setTimeout takes seconds, as udpgrm_activate.py does, or a duration.
func setTimeout(d *config.Duration, s string) error {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		d.Duration = time.Duration(n) * time.Second
		return nil
	}
	return d.UnmarshalText([]byte(s))
}

// words takes what is no flag: the service's name and the addresses.
func (p *parsed) words(words []string, defaults config.Listener) error {
	if len(words) == 0 {
		return misused("no service name")
	}
	p.request.Service = words[0]
	if err := config.CheckName(words[0]); err != nil {
		return misused("service name: %w", err)
	}
	addresses := words[1:]
	if p.mode != start {
		if len(addresses) > 0 || len(p.request.Command) > 0 {
			return misused("a stop takes the service's name and nothing else")
		}
		return nil
	}
	if len(addresses) == 0 {
		return misused("no address to listen on, such as udp://0.0.0.0:5201")
	}
	var errs []error
	for _, address := range addresses {
		if !strings.Contains(address, "://") {
			address = "udp://" + address // as udpgrm_activate.py, which knows UDP only
		}
		l, err := config.ParseListener(address, defaults)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if l.Name == "" && len(addresses) == 1 {
			l.Name = p.request.Service
		}
		if err := p.add(l); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return misused("%w", err)
	}
	return nil
}

// add takes one listener if it goes with the others.
func (p *parsed) add(l config.Listener) error {
	if l.Name == "" {
		return fmt.Errorf("%s: no name (with several addresses each needs one: %s?name=NAME)", l.Address, l.Address)
	}
	for _, other := range p.request.Listeners {
		switch {
		case other.Name == l.Name:
			return fmt.Errorf("%s: name %q is taken by %s", l.Address, l.Name, other.Address)
		case other.Address == l.Address:
			return fmt.Errorf("%s: given twice", l.Address)
		case other.Address.Proto == l.Address.Proto && other.Address.Port() == l.Address.Port() && (takes(other, l) || takes(l, other)):
			return fmt.Errorf("%s: %s takes its packets too (leave one out, or the dual-stack)", l.Address, other.Address)
		}
	}
	p.request.Listeners = append(p.request.Listeners, l)
	return nil
}

// takes says whether a dual-stack listener would be bound to another one's IPv4 address.
func takes(l, other config.Listener) bool { return l.DualStack && other.Address.Addr().Is4() }

// maxProgram is more than the longest program needs in any form.
const maxProgram = 1 << 20

// readProgram reads a file that the service's user may be able to replace: a
// pipe would keep root waiting, and a device would have no end.
func readProgram(file string) ([]byte, error) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("%w (put the program there, or name another file)", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxProgram {
		return nil, fmt.Errorf("%s is no file of at most %d bytes (name one that tcpdump -ddd or bpf_asm has written)", file, maxProgram)
	}
	return io.ReadAll(io.LimitReader(f, maxProgram))
}

// readPrograms reads the files of the listeners' cBPF programs.
func readPrograms(ls []config.Listener) error {
	for i := range ls {
		p := &ls[i].Program
		if p.File == "" {
			continue
		}
		text, err := readProgram(p.File)
		if err != nil {
			return fmt.Errorf("program of %s: %w", ls[i].Address, err)
		}
		program, err := cbpf.Parse(text)
		if err != nil {
			return fmt.Errorf("program of %s: %s: %w", ls[i].Address, p.File, err)
		}
		p.Instructions = nil
		for _, in := range program {
			p.Instructions = append(p.Instructions, bpf.RawInstruction{Op: in.Op, Jt: in.JT, Jf: in.JF, K: in.K})
		}
	}
	return nil
}
