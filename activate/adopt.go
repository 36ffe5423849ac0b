package activate

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"

	"golang.org/x/sys/unix"

	"grm/config"
	"grm/control"
	"grm/internal/proc"
	"grm/internal/state"
)

// adopt makes up for a record that is lost: somebody removed /run/grm, or the
// file in it that was corrupt. What generations there are is in the control
// map and in the slots of the groups that are asked for; which sockets are in
// a process's hands is asked of those.
func (r *run) adopt() error {
	if r.service == nil || r.st.Plan != nil || len(r.st.Banks) > 0 {
		return nil
	}
	inodes, err := r.inodesByCookie()
	if err != nil {
		return err
	}
	ctl := r.service.Control()
	for n := range control.Banks {
		b := state.Bank{Bank: n, Generation: ctl.Bank(n).Generation}
		if b.Generation == 0 || b.Generation > math.MaxInt64 {
			continue
		}
		for _, l := range r.Listeners {
			g, err := r.group(l)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			cookies, err := g.Slots(l.App, n)
			if err != nil {
				return err
			}
			if len(cookies) == 0 || len(cookies) > control.Slots {
				continue
			}
			l.Sockets = config.Count(len(cookies))
			found := state.Listener{Name: l.Name, Address: l.String()}
			for _, cookie := range cookies {
				found.Inodes = append(found.Inodes, inodes[cookie]) // 0: no process of the service has it
			}
			b.Listeners = append(b.Listeners, found)
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
	if r.st.UID, r.st.User, err = r.owner(); err != nil {
		return err
	}
	r.log(notice, "%s was lost: %d generations found again", r.dir.Path(r.Service), len(r.st.Banks))
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
