package bpfprog

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"grm/control"
)

// Service is one service's control map and its hooks. Its methods may not be
// called from several goroutines at once.
type Service struct {
	Name string

	dir     string
	control *ebpf.Map
	mapped  *control.Map
}

// Services lists the services of the caller's network namespace.
func Services() ([]string, error) {
	dir, err := Dir()
	if err != nil {
		return nil, err
	}
	names, err := entries(filepath.Join(dir, "services"))
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	return names, nil
}

// CreateService makes a service's control map, with a new epoch, and pins it.
// It fails with fs.ErrExist if there is one already.
func CreateService(name string) (*Service, error) {
	if err := createService(name); err != nil {
		return nil, fmt.Errorf("create service %s: %w", name, err)
	}
	return OpenService(name)
}

func createService(name string) error {
	if name == "" || strings.ContainsAny(name, "./") || strings.HasPrefix(name, building) {
		return errors.New("not a name for a pin")
	}
	if err := Mount(); err != nil {
		return err
	}
	dir, err := Dir()
	if err != nil {
		return err
	}
	parent := filepath.Join(dir, "services")
	unlock, err := enter(parent)
	if err != nil {
		return err
	}
	defer unlock()
	return publish(parent, name, makeService)
}

func makeService(dir string) error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "control", Type: ebpf.Array, KeySize: 4, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE,
		ValueSize: uint32(control.Size(ebpf.MustPossibleCPU())),
	})
	if err != nil {
		return fmt.Errorf("control map: %w", err)
	}
	defer m.Close()
	var epoch [8]byte
	if _, err := rand.Read(epoch[:]); err != nil {
		return err
	}
	mapped, err := control.Init(m.FD(), binary.NativeEndian.Uint64(epoch[:])|1) // 0 means none
	if err != nil {
		return err
	}
	if err := mapped.Close(); err != nil {
		return err
	}
	return errors.Join(
		m.Pin(filepath.Join(dir, "control")),
		os.Mkdir(filepath.Join(dir, "programs"), 0o700),
		os.Mkdir(filepath.Join(dir, "hooks"), 0o700),
	)
}

// OpenService opens a service by its pins. It fails with fs.ErrNotExist if
// there is none, and with ErrLayout if it was made by a grm of another layout.
func OpenService(name string) (*Service, error) {
	s := &Service{Name: name}
	if err := s.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open service %s: %w", name, err), s.Close())
	}
	return s, nil
}

func (s *Service) open() error {
	dir, err := Dir()
	if err != nil {
		return err
	}
	s.dir = filepath.Join(dir, "services", s.Name)
	if s.control, err = ebpf.LoadPinnedMap(filepath.Join(s.dir, "control"), nil); err != nil {
		return err
	}
	if s.mapped, err = control.Open(s.control.FD()); errors.Is(err, control.ErrLayout) {
		return fmt.Errorf("%w: %w", ErrLayout, err)
	}
	return err
}

// Control is the service's control map. It stays the service's.
func (s *Service) Control() *control.Map { return s.mapped }

// ControlFD is the control map's descriptor. It stays the service's.
func (s *Service) ControlFD() int { return s.control.FD() }

// Close lets go of the service, which goes on working.
func (s *Service) Close() error {
	var err error
	if s.mapped != nil {
		err = s.mapped.Close()
	}
	if s.control != nil {
		err = errors.Join(err, s.control.Close())
	}
	s.mapped, s.control = nil, nil
	return err
}

// Remove unpins everything of the service. No socket that was created in its
// cgroups may be alive any more: it would lose its hooks.
func (s *Service) Remove() error { return removeService(s.Name, s.dir) }

// RemoveService is Service.Remove for one that cannot be opened, as its layout
// is another one.
func RemoveService(name string) error {
	dir, err := Dir()
	if err != nil {
		return err
	}
	return removeService(name, filepath.Join(dir, "services", name))
}

func removeService(name, dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove service %s: %w", name, err)
	}
	tidy(filepath.Dir(dir))
	return nil
}

// AttachHooks puts the hooks of groups on a cgroup: the guard of each group's
// program, the socket options, and what sees a server's answers. Sockets keep
// the hooks of the cgroup that they were created in, so there may be links on
// older cgroups: those get this build's programs too, each in one step.
func (s *Service) AttachHooks(cgroup *os.File, groups []*Group) error {
	if err := s.attachHooks(cgroup, groups); err != nil {
		return fmt.Errorf("hooks of service %s on %s: %w", s.Name, cgroup.Name(), err)
	}
	return nil
}

func (s *Service) attachHooks(cgroup *os.File, groups []*Group) (err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(cgroup.Fd()), &st); err != nil {
		return err
	}
	id := strconv.FormatUint(st.Ino, 10)
	root := filepath.Join(s.dir, "hooks")
	if err := os.Mkdir(filepath.Join(root, id), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	cgroups, err := entries(root)
	if err != nil {
		return err
	}
	var added []string
	defer func() {
		if err == nil {
			return
		}
		for _, pin := range added { // what was there before works on, with whichever build's program
			if e := os.Remove(pin); !errors.Is(e, fs.ErrNotExist) { // the last one may not have come so far
				err = errors.Join(err, e)
			}
		}
	}()
	for _, g := range groups {
		for _, h := range g.hooks() {
			p, err := g.hookProgram(h, s, filepath.Join(s.dir, "programs"))
			if err != nil {
				return err
			}
			for _, c := range cgroups {
				pin := filepath.Join(root, c, g.name+"-"+h.program)
				if err = update(pin, p); errors.Is(err, fs.ErrNotExist) {
					if err = nil; c == id {
						err = attach(pin, cgroup, h, p)
						added = append(added, pin)
					}
				}
				if err != nil {
					return errors.Join(fmt.Errorf("%s: %w", h.program, err), p.Close())
				}
			}
			if err := p.Close(); err != nil {
				return err
			}
		}
	}
	return nil
}

// attach links p to the cgroup and pins the link.
func attach(pin string, cgroup *os.File, h hook, p *ebpf.Program) error {
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: p, Attach: h.kind})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return errors.Join(l.Pin(pin), l.Close())
}

// update gives a pinned link the program p, without a gap, unless it has it.
func update(pin string, p *ebpf.Program) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return err
	}
	pinfo, err := p.Info()
	if err != nil {
		return err
	}
	if id, _ := pinfo.ID(); id == info.Program {
		return nil
	}
	if err := l.Update(p); err != nil && !errors.Is(err, unix.ENOLINK) { // ENOLINK: its cgroup is gone
		return fmt.Errorf("update: %w", err)
	}
	return nil
}

// HookedCgroups are the ids of the cgroups that have hooks of the service.
func (s *Service) HookedCgroups() ([]uint64, error) {
	names, err := entries(filepath.Join(s.dir, "hooks"))
	if err != nil {
		return nil, fmt.Errorf("hooks of service %s: %w", s.Name, err)
	}
	var ids []uint64
	for _, name := range names {
		if id, err := strconv.ParseUint(name, 10, 64); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// PruneHooks unpins the hooks on cgroups of which inUse says that nobody needs
// them any more, and those of groups that were unpinned, which would keep the
// groups' maps.
func (s *Service) PruneHooks(inUse func(cgroupID uint64) bool) error {
	if err := s.pruneHooks(inUse); err != nil {
		return fmt.Errorf("prune hooks of service %s: %w", s.Name, err)
	}
	return nil
}

func (s *Service) pruneHooks(inUse func(cgroupID uint64) bool) error {
	root := filepath.Join(s.dir, "hooks")
	names, err := entries(root)
	for _, name := range names {
		dir := filepath.Join(root, name)
		if id, e := strconv.ParseUint(name, 10, 64); e != nil || !inUse(id) {
			err = errors.Join(err, os.RemoveAll(dir))
		} else {
			err = errors.Join(err, s.pruneGroups(dir, 1)) // <group>-<hook>
		}
	}
	return errors.Join(err, s.pruneGroups(filepath.Join(s.dir, "programs"), 2)) // <group>-<hook>-<build>
}

// pruneGroups removes from dir what is of groups that are no more. In the names
// that many dashes follow the group's.
func (s *Service) pruneGroups(dir string, dashes int) error {
	names, err := entries(dir)
	for _, name := range names {
		group := name
		for range dashes {
			group = group[:max(0, strings.LastIndexByte(group, '-'))]
		}
		if _, e := os.Lstat(filepath.Join(filepath.Dir(filepath.Dir(s.dir)), "groups", group)); errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
		}
	}
	return err
}
