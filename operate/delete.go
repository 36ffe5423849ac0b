package operate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/config"
	"grm/inspect"
	"grm/internal/proc"
	"grm/internal/state"
	"grm/internal/systemd"
)

// How long an ended process has until SIGKILL, and then to be gone.
const (
	grace   = 10 * time.Second
	certain = 5 * time.Second
)

// Delete removes what a service or a group has left behind, and says what that
// was. What is alive is refused with ErrLive; with force a service's unit is
// stopped and its processes are ended first.
func Delete(name string, force bool) ([]string, error) {
	group := strings.Contains(name, "://")
	if !group {
		if err := config.CheckName(name); err != nil {
			return nil, fmt.Errorf("delete %q: %w", name, err)
		}
	}
	r, err := inspect.Read()
	if err != nil {
		return nil, err
	}
	if !r.Complete {
		return nil, fmt.Errorf("delete %s: %w", name, fs.ErrPermission)
	}
	// What is alive is looked up again with the locks: a start has its service's, or waits for it.
	if group {
		return locked(func(*state.Dir) ([]string, error) { return deleteGroup(name) }, state.GroupsLock)
	}
	for _, s := range r.Services {
		if s.Name != name {
			continue
		}
		if err := end(s, force); err != nil {
			return nil, err
		}
		return locked(func(dir *state.Dir) ([]string, error) { return deleteService(dir, s) }, name, state.GroupsLock)
	}
	return nil, fmt.Errorf("service %s: %w", name, inspect.ErrNone)
}

// end sees to it that nothing of the service runs.
func end(s inspect.Service, force bool) error {
	if s.Unit == "" {
		return endByPids(s)
	}
	active, err := active(s.Unit)
	switch {
	case err != nil:
		return err
	case active && !force:
		return fmt.Errorf("delete %s: %w: %s is active (systemctl stop %s)", s.Name, ErrLive, s.Unit, s.Unit)
	case active:
		if out, err := exec.Command("systemctl", "stop", s.Unit).CombinedOutput(); err != nil {
			return fmt.Errorf("systemctl stop %s: %w: %s", s.Unit, err, strings.TrimSpace(string(out)))
		}
	}
	pids, err := pidsOf(s.Unit)
	if err != nil || len(pids) == 0 {
		return err
	}
	if !force {
		return fmt.Errorf("delete %s: %w: %s is inactive but %s (--force ends them)", s.Name, ErrLive, s.Unit, running(pids))
	}
	return endAll(s.Unit, pids)
}

// endByPids is for a service that ran without systemd: there is no cgroup by
// which to know its processes, so that none of them is touched.
func endByPids(s inspect.Service) error {
	var pids []int
	for _, g := range s.Generations {
		for _, p := range []*inspect.Process{g.Server, g.Keeper} {
			if p != nil && p.Running {
				pids = append(pids, p.PID)
			}
		}
	}
	if len(pids) == 0 {
		return bySockets(s)
	}
	return fmt.Errorf("delete %s: %w: %s, and not in a unit of systemd's (end them by hand)", s.Name, ErrLive, running(pids))
}

// bySockets is for a server that became grm-activate's command: no keeper has noted its pid.
func bySockets(s inspect.Service) error {
	for _, g := range s.Generations {
		for _, l := range g.Sockets {
			if l.Live > 0 {
				return fmt.Errorf("delete %s: %w: generation %d has sockets open for %s (end its server)", s.Name, ErrLive, g.Number, l.Listener)
			}
		}
	}
	return nil
}

func running(pids []int) string {
	var who []string
	for _, pid := range pids {
		who = append(who, fmt.Sprintf("%d (%s)", pid, proc.Comm(pid)))
	}
	return "these processes run: " + strings.Join(who, ", ")
}

func active(unit string) (bool, error) {
	c, err := systemd.Open(certain)
	if errors.Is(err, systemd.ErrAbsent) {
		return false, nil // without systemd no unit is active
	}
	if err != nil {
		return false, err
	}
	u, err := c.Unit(unit)
	if err := errors.Join(err, c.Close()); err != nil {
		return false, err
	}
	return u.ActiveState != "inactive" && u.ActiveState != "failed", nil
}

// pidsOf finds the processes of a unit by their cgroup.
func pidsOf(unit string) ([]int, error) {
	all, err := proc.All()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, pid := range all {
		c, err := proc.Of(pid)
		if err != nil {
			continue // gone
		}
		if in, err := c.IsUnit(unit); err != nil {
			return nil, err
		} else if in {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// endAll ends the processes of a unit: SIGTERM, then SIGKILL, each only if the
// process that is hit is the unit's. Those that they start meanwhile are found
// in the next round.
func endAll(unit string, pids []int) error {
	deadline := time.Now().Add(grace + certain)
	sig := unix.SIGTERM
	for len(pids) > 0 {
		if time.Now().After(deadline) {
			return fmt.Errorf("end %s: %s, even after SIGKILL", unit, running(pids))
		}
		var held []*proc.Process
		for _, pid := range pids {
			c, err := proc.Of(pid)
			if err != nil {
				continue // gone
			}
			if in, err := c.IsUnit(unit); err != nil || !in {
				continue // another one's by now
			}
			if p, err := c.Find(pid); err == nil {
				_ = p.Signal(sig) // one that cannot be signalled is named when the time is up
				held = append(held, p)
			}
		}
		patience := time.Now().Add(grace)
		if sig == unix.SIGKILL {
			patience = time.Now().Add(time.Second)
		}
		for _, p := range held {
			p.Wait(time.Until(patience))
			_ = p.Close() // a pidfd has nothing to flush
		}
		sig = unix.SIGKILL
		var err error
		if pids, err = pidsOf(unit); err != nil {
			return err
		}
	}
	return nil
}

// locked calls do while it has the locks, whose files go afterwards.
func locked(do func(*state.Dir) ([]string, error), names ...string) (removed []string, err error) {
	dir, err := state.Open(state.Root)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, name := range names {
		lock, e := dir.Lock(ctx, name)
		if e != nil {
			return nil, e
		}
		defer func() { err = errors.Join(err, lock.Remove()) }()
	}
	return do(dir)
}

// deleteService removes the pins, state and lock of a service that has ended,
// and the groups that nobody else uses.
func deleteService(dir *state.Dir, found inspect.Service) (removed []string, err error) {
	r, err := inspect.Read()
	if err != nil {
		return nil, err
	}
	for _, s := range r.Services {
		if s.Name != found.Name {
			continue
		}
		// It may have been started since.
		if err := end(s, false); err != nil {
			return nil, err
		}
	}
	groups := map[string]int{} // the service's number in each
	for _, l := range found.Listeners {
		groups[l.Group] = l.App
	}
	if st, err := dir.Read(found.Name); err == nil { // it goes in any case
		for _, g := range st.Groups {
			groups[g.Address] = g.App
		}
	}
	for _, g := range r.Groups {
		app, ok := groups[g.Name]
		if !ok {
			continue
		}
		gone, err := leave(g, found, app)
		if err != nil {
			return removed, err
		}
		if gone {
			removed = append(removed, "group "+g.Name)
		}
	}
	s, err := bpfprog.OpenService(found.Name)
	switch {
	case err == nil:
		if err := errors.Join(s.Remove(), s.Close()); err != nil {
			return removed, err
		}
	case errors.Is(err, bpfprog.ErrLayout):
		if err := bpfprog.RemoveService(found.Name); err != nil {
			return removed, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return removed, err
	}
	if err := dir.Remove(found.Name); err != nil {
		return removed, err
	}
	return append(removed, "service "+found.Name), nil
}

// leave empties the slots that a service has in a group, and removes the group
// if no other service uses it.
func leave(group inspect.Group, s inspect.Service, app int) (removed bool, err error) {
	g, err := inspect.OpenGroup(group.Name)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	other, err := user(g, app)
	if err != nil {
		return false, err
	}
	if other < 0 && !slices.ContainsFunc(group.Services, func(other string) bool { return other != s.Name }) {
		return true, g.Remove()
	}
	for _, generation := range s.Generations {
		if err := g.Clear(app, generation.Bank); err != nil {
			return false, err
		}
	}
	return false, nil
}

// deleteGroup removes a group that no service uses.
func deleteGroup(name string) (removed []string, err error) {
	r, err := inspect.Read()
	if err != nil {
		return nil, err
	}
	for _, g := range r.Groups {
		if g.Name == name && len(g.Services) > 0 {
			return nil, fmt.Errorf("delete group %s: %w: services use it: %s (delete these)", name, ErrLive, strings.Join(g.Services, ", "))
		}
	}
	g, err := inspect.OpenGroup(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	app, err := user(g, -1)
	if err != nil {
		return nil, err
	}
	if app >= 0 {
		return nil, fmt.Errorf("delete group %s: %w: some service has sockets in it, as app %d (stop it)", name, ErrLive, app)
	}
	if err := g.Remove(); err != nil {
		return nil, err
	}
	return []string{"group " + name}, nil
}

// user is an app, other than the given one, that has sockets in a group, whether or not a record tells of it; -1 if none has.
func user(g *bpfprog.Group, except int) (int, error) {
	for app := range g.Spec.MaxApps {
		if app == except {
			continue
		}
		if has, err := g.HasSockets(app); has || err != nil {
			return app, err
		}
	}
	return -1, nil
}
