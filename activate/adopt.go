package activate

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"

	"grm/config"
	"grm/control"
	"grm/internal/proc"
	"grm/internal/state"
)

// adopt makes up for a record that is lost: somebody removed /run/grm, or the
// file in it that was corrupt. What generations there are is in the groups that
// are asked for; which sockets are in
// a process's hands is asked of those.
func (r *run) adopt() error {
	if r.service == nil {
		return nil
	}
	if r.st.Plan == nil && len(r.st.Banks) == 0 {
		if err := r.findBanks(); err != nil {
			return err
		}
	}
	return r.findInodes()
}

// findBanks records the generations that root has put into the groups, as it
// noted there; which sockets they have is for findInodes.
func (r *run) findBanks() error {
	// Where its sockets were made nobody knows any more: it may be any of these.
	cgroups, err := r.service.HookedCgroups()
	if err != nil {
		return err
	}
	for n := range control.Banks {
		b := state.Bank{Bank: n, Cgroups: cgroups}
		for _, l := range r.Listeners {
			cookies, err := r.slots(l, n)
			if err != nil {
				return err
			}
			if len(cookies) == 0 || !r.groups[l.Address].Joined(l.App, r.service) {
				continue
			}
			b.Generation = max(b.Generation, r.groups[l.Address].Generation(l.App, n))
			l.Sockets = config.Count(len(cookies))
			b.Listeners = append(b.Listeners, state.Listener{Name: l.Name, Address: l.String(), Inodes: make([]uint64, len(cookies))})
			if of := (state.Group{Address: l.Address.String(), App: l.App}); !slices.Contains(r.st.Groups, of) {
				r.st.Groups = append(r.st.Groups, of)
			}
		}
		if len(b.Listeners) > 0 {
			r.st.Banks[n] = b
			r.st.Generation = max(r.st.Generation, b.Generation)
		}
	}
	if len(r.st.Banks) == 0 {
		return nil
	}
	r.log(notice, "%s was lost: %d generations found again", r.dir.Path(r.Service), len(r.st.Banks))
	r.st.UID, r.st.User, err = r.owner()
	return err
}

// slots are the cookies in a listener's slots; none if it has no group.
func (r *run) slots(l config.Listener, bank int) ([]uint64, error) {
	g, err := r.group(l)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return g.Slots(l.App, bank)
}

// findInodes fills in those that are not known, of sockets that processes of
// the service have open. One that none had so far may be taken up later.
func (r *run) findInodes() error {
	var inodes map[uint64]uint64
	for n, b := range r.st.Banks {
		ls, err := listeners(b)
		if err != nil {
			return err
		}
		for i, l := range ls {
			own := b.Listeners[i].Inodes
			if !slices.Contains(own, 0) {
				continue
			}
			if inodes == nil {
				if inodes, err = r.inodesByCookie(); err != nil {
					return err
				}
			}
			cookies, err := r.slots(l, n)
			if err != nil {
				return err
			}
			for index := range min(len(cookies), len(own)) {
				own[index] = inodes[cookies[index]]
			}
		}
	}
	return nil
}

// inodesByCookie are the sockets that the service's processes have open.
func (r *run) inodesByCookie() (map[uint64]uint64, error) {
	p, err := r.look()
	if err != nil {
		return nil, err
	}
	found := map[uint64]uint64{}
	for inode, pids := range p.holders {
		cookie, err := cookieOf(pids[0], inode)
		if err != nil {
			return nil, err
		}
		found[cookie] = inode
	}
	delete(found, 0)
	return found, nil
}

// cookieOf is the cookie of a socket that a process has open, 0 if it has not
// any more, or if it is no socket that has one.
func cookieOf(pid int, inode uint64) (uint64, error) {
	number, err := proc.SocketFD(pid, inode)
	if err != nil || number < 0 {
		return 0, err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, nil // gone
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, number, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("descriptor %d of process %d: %w", number, pid, err)
	}
	defer unix.Close(fd)
	if now, err := proc.Inode(fd); err != nil || now != inode {
		return 0, err
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("get SO_COOKIE of descriptor %d of process %d: %w", number, pid, err)
	}
	return cookie, nil
}
