// Package rig puts a service of grm's into a box, with a load on it: what the stories, the demo and the benchmarks begin with.
package rig

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"grm/config"
	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
)

// Rig is a box with grm and its examples in it.
type Rig struct{ *box.Box }

// New boots a box. bin is a directory that install.All made.
func New(ctx context.Context, bin string, o box.Options) (*Rig, error) {
	o.Bin = bin
	b, err := box.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	return &Rig{b}, nil
}

// Example returns the text of an example's file, changed: pairs of what is in it and what is to be there instead.
// A line of an example that is to be changed but is not there is an error, so that no test runs another service than it means.
func Example(name string, oldnew ...string) (string, error) {
	root, err := install.Root()
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(root, "examples", name, name+".toml"))
	if err != nil {
		return "", err
	}
	text := string(data)
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(text, oldnew[i]) {
			return "", fmt.Errorf("example %s has no %q to change", name, oldnew[i])
		}
		text = strings.ReplaceAll(text, oldnew[i], oldnew[i+1])
	}
	return text, nil
}

// Service is a service that was installed in a rig.
type Service struct {
	*config.Service
	Unit string
	rig  *Rig
}

// Install makes the unit of a service's TOML text with grm-unitgen, and the user that it runs as.
// To install another version of a service is to install it again.
func (r *Rig) Install(toml string) (*Service, error) {
	parsed, err := config.Parse("service.toml", []byte(toml))
	if err != nil {
		return nil, err
	}
	s := &Service{parsed, parsed.Name + ".service", r}
	if err := s.needUser(); err != nil {
		return nil, err
	}
	file := "/etc/grm/" + s.Name + ".toml"
	if err := r.WriteFile(file, toml, 0o644); err != nil {
		return nil, err
	}
	if _, err := r.Exec(box.BinDir+"/grm-unitgen", file); err != nil {
		return nil, err
	}
	_, err = r.Systemctl("daemon-reload")
	return s, err
}

// InstallPlain makes a unit for the same server without grm: a simple one, as many are. The server gets the given arguments and binds for
// itself.
func (r *Rig) InstallPlain(toml string, args ...string) (*Service, error) {
	return r.installWithout(toml, func(s *Service) (string, error) {
		return "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=notify\nUser=" + s.User + "\nRestart=always\nExecStart=" + s.command(args) + "\n", nil
	})
}

// InstallControl makes the unit that grm-unitgen would, without grm: what the two differ in is grm's doing, and not the sandbox's.
func (r *Rig) InstallControl(toml string, args ...string) (*Service, error) {
	return r.installWithout(toml, func(s *Service) (string, error) {
		file := "/run/" + s.Name + ".toml"
		if err := r.WriteFile(file, toml, 0o644); err != nil {
			return "", err
		}
		unit, err := r.Exec(box.BinDir+"/grm-unitgen", "-n", file)
		if err != nil {
			return "", err
		}
		return s.withoutGrm(unit, args), nil
	})
}

func (r *Rig) installWithout(toml string, unit func(*Service) (string, error)) (*Service, error) {
	parsed, err := config.Parse("service.toml", []byte(toml))
	if err != nil {
		return nil, err
	}
	s := &Service{parsed, parsed.Name + ".service", r}
	if err := s.needUser(); err != nil {
		return nil, err
	}
	text, err := unit(s)
	if err != nil {
		return nil, err
	}
	return s, r.InstallUnits(map[string]string{s.Unit: text})
}

func (s *Service) command(args []string) string {
	return strings.Join(append(append([]string{}, s.Exec...), args...), " ")
}

// withoutGrm takes grm out of a unit's text.
func (s *Service) withoutGrm(unit string, args []string) string {
	var kept []string
	for line := range strings.Lines(strings.ReplaceAll(unit, "\\\n", " ")) {
		switch key, _, _ := strings.Cut(line, "="); key {
		case "ExecStartPre", "ExecStop", "ExecStopPost", "KillMode", "FileDescriptorStoreMax", "NotifyAccess":
		case "ExecStart":
			kept = append(kept, "ExecStart="+s.command(args)+"\n")
		default:
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

func (s *Service) needUser() error {
	users, err := s.rig.ReadFile("/etc/passwd")
	if err != nil {
		return err
	}
	if strings.HasPrefix(users, s.User+":") || strings.Contains(users, "\n"+s.User+":") {
		return nil
	}
	_, err = s.rig.AddUser(s.User)
	return err
}

// Start starts the service and waits until it is up.
func (s *Service) Start() error { _, err := s.rig.Systemctl("start", s.Unit); return s.explain(err) }

// Stop stops the service and waits until it is down.
func (s *Service) Stop() error { _, err := s.rig.Systemctl("stop", s.Unit); return s.explain(err) }

// Restart is what all of this is about. It returns how long systemctl took, measured inside of the box.
func (s *Service) Restart() (time.Duration, error) {
	// Started by a shell that takes the time itself: nsenter's own start does not count.
	out, err := s.rig.Exec("/bin/bash", "-c", `a=${EPOCHREALTIME/./}; systemctl restart "$1"; s=$?; echo $((${EPOCHREALTIME/./} - a)); exit $s`, "-", s.Unit)
	if err != nil {
		return 0, s.explain(err)
	}
	us, err := strconv.Atoi(strings.TrimSpace(out))
	return time.Duration(us) * time.Microsecond, err
}

// explain adds what systemd and the service said lately to an error.
func (s *Service) explain(err error) error {
	if err == nil {
		return nil
	}
	status, _ := s.rig.Systemctl("status", "--no-pager", "--full", "--lines=30", s.Unit) // its exit status tells the unit's state
	return fmt.Errorf("%w\n%s", err, status)
}

// Status is the unit's line in `systemctl status`.
func (s *Service) Status() (string, error) { return s.rig.Property(s.Unit, "StatusText") }

// Processes are those of a unit made by grm-unitgen, by their part.
type Processes struct {
	Decoy   *box.Process // what systemd takes for the service, if it lives
	Keepers []box.Process
	Servers []box.Process // by their number in the box, the oldest first
	Others  []box.Process // everything else: workers of servers, commands of the unit
}

// Keeper is the parent of a server, if it lives.
func (p Processes) Keeper(server box.Process) *box.Process {
	for _, k := range p.Keepers {
		if k.BoxPid == server.BoxPPid {
			return &k
		}
	}
	return nil
}

// Processes finds the service's processes.
func (s *Service) Processes() (Processes, error) {
	var found Processes
	all, err := s.rig.Processes(s.Unit)
	if err != nil {
		return found, err
	}
	main, err := s.rig.Property(s.Unit, "MainPID")
	if err != nil {
		return found, err
	}
	programs := map[int]bool{} // what is not grm's: servers and their workers
	for _, p := range all {
		switch {
		case p.Comm == "grm-decoy" && strconv.Itoa(p.BoxPid) == main:
			found.Decoy = &p
		case p.Comm == "grm-keeper":
			found.Keepers = append(found.Keepers, p)
		case strings.HasPrefix(p.Comm, "grm-"), strings.HasPrefix(p.Comm, "("): // the latter is systemd's until it has executed
		case slices.Equal(p.Args, s.Watch.Probe): // a keeper's child, as a server is
		default:
			programs[p.BoxPid] = true
		}
	}
	for _, p := range all {
		switch {
		case !programs[p.BoxPid]:
			if p.Comm != "grm-keeper" && (found.Decoy == nil || p.BoxPid != found.Decoy.BoxPid) {
				found.Others = append(found.Others, p)
			}
		case programs[p.BoxPPid]:
			found.Others = append(found.Others, p)
		default: // its parent is a keeper, or was one: then it is systemd's
			found.Servers = append(found.Servers, p)
		}
	}
	return found, nil
}

// Targets are the addresses at which the service can be reached in the box: the loopback ones of those it listens at.
func (s *Service) Targets() []netip.AddrPort {
	var targets []netip.AddrPort
	for _, l := range s.Listen {
		a := l.Address.AddrPort
		switch {
		case a.Addr() == netip.IPv4Unspecified():
			targets = append(targets, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port()))
		case a.Addr() == netip.IPv6Unspecified():
			targets = append(targets, netip.AddrPortFrom(netip.IPv6Loopback(), a.Port()))
			if l.DualStack {
				targets = append(targets, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), a.Port()))
			}
		default:
			targets = append(targets, a)
		}
	}
	return targets
}

// Load starts a load on the service, in the box's network. Unless o says otherwise it goes to all of its addresses.
// It returns once every first flow was answered.
func (s *Service) Load(ctx context.Context, o load.Options) (*load.Generator, error) {
	o.NetNS = s.rig.NetNS()
	if o.Targets == nil {
		o.Targets = s.Targets()
	}
	g, err := load.Start(ctx, o)
	if err != nil {
		return nil, err
	}
	want := uint64(200)
	if o.Flows != 0 {
		want = uint64(o.Flows)
	}
	if err := g.Until("the first flows were answered", time.Minute, func(r load.Result) bool {
		var flows uint64
		for _, in := range r.Instances {
			flows += in.Flows
		}
		return flows >= want
	}); err != nil {
		_, err2 := g.Stop()
		return nil, errors.Join(err, err2)
	}
	return g, nil
}

// Activation is how long the last run of the unit's first ExecStartPre command took.
func (s *Service) Activation() (time.Duration, error) {
	out, err := s.rig.Systemctl("show", "--timestamp=us", "--property=ExecStartPre", s.Unit)
	if err != nil {
		return 0, err
	}
	at := func(key string) (time.Time, error) {
		_, rest, ok := strings.Cut(out, " "+key+"=[")
		text, _, closed := strings.Cut(rest, "]")
		if !ok || !closed {
			return time.Time{}, fmt.Errorf("no %s in %q", key, out)
		}
		return time.Parse("Mon 2006-01-02 15:04:05.000000 MST", text)
	}
	from, err := at("start_time")
	if err != nil {
		return 0, err
	}
	to, err := at("stop_time")
	return to.Sub(from), err
}
