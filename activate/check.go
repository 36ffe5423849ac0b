package activate

import (
	"bytes"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/config"
	"grm/internal/systemd"
)

// minKernel is the oldest kernel whose BPF has what the programs use.
const minMajor, minMinor = 6, 1

// Capabilities are those that a start needs: to load programs, to give sockets to the service's user and a large
// buffer, to bind low ports, and to see and end the service's processes.
var Capabilities = map[string]int{
	"CAP_BPF": unix.CAP_BPF, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_KILL": unix.CAP_KILL, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE,
	"CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
}

// checkMachine says whether this kernel and this process can do what is to come.
func checkMachine() error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	if err := checkKernel(string(bytes.TrimRight(u.Release[:], "\x00"))); err != nil {
		return unfit(err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read own capabilities: %w", err)
	}
	if err := checkCapabilities(uint64(data[1].Effective)<<32 | uint64(data[0].Effective)); err != nil {
		return unfit(err)
	}
	return unfit(bpfprog.Mount())
}

func checkKernel(release string) error {
	majorText, rest, _ := strings.Cut(release, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err1 := strconv.Atoi(majorText)
	minor, err2 := strconv.Atoi(rest[:end])
	if err1 != nil || err2 != nil {
		return nil // an unknown kind of number: the kernel itself will say what it lacks
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return fmt.Errorf("kernel %s is too old: grm needs Linux %d.%d (boot a newer kernel; grm doctor says what is missing)", release, minMajor, minMinor)
	}
	return nil
}

func checkCapabilities(effective uint64) error {
	var missing []string
	for _, name := range sortedKeys(Capabilities) {
		if effective&(1<<Capabilities[name]) == 0 {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing %s (run it as root; in a unit write ExecStartPre=+/usr/lib/grm/grm-activate with the plus sign)", strings.Join(missing, ", "))
	}
	return nil
}

// checkUnit says whether the unit has what the fd store needs. Whoever wrote
// the unit by hand learns everything that is missing at once.
func (r *run) checkUnit() error {
	if len(r.Command) > 0 {
		return nil
	}
	if err := r.checkSettings(); err != nil || r.store != nil {
		return err
	}
	return unfit(fmt.Errorf("no NOTIFY_SOCKET: there is no fd store to put the sockets into (start it from a unit with Type=notify and NotifyAccess=all, or add -- COMMAND)"))
}

// checkSettings looks at what systemd says of the unit. With NotifyAccess=main
// systemd does not even give the command a NOTIFY_SOCKET.
func (r *run) checkSettings() error {
	if !r.known {
		return nil
	}
	var wrong []string
	if r.unit.PrivateNetwork {
		wrong = append(wrong, "PrivateNetwork=yes would bind the sockets in a network of their own (remove it)")
	}
	if a := r.unit.NotifyAccess; a != "all" && a != "exec" {
		wrong = append(wrong, fmt.Sprintf("NotifyAccess=%s makes systemd ignore the sockets that ExecStartPre= stores (write NotifyAccess=all)", a))
	}
	if r.unit.StoreMax == 0 {
		wrong = append(wrong, fmt.Sprintf("FileDescriptorStoreMax= is not set (write FileDescriptorStoreMax=%d)", config.FileDescriptorStoreMax(len(r.Listeners))))
	}
	if len(wrong) > 0 {
		return unfit(fmt.Errorf("unit %s: %s", r.Unit, strings.Join(wrong, "; ")))
	}
	return nil
}

// checkRoom says whether the fd store has room for the new generation's
// sockets, and for the maps if they are not there yet.
func (s *start) checkRoom() error {
	if s.store == nil || !s.known {
		return nil
	}
	stored := map[string]bool{}
	for _, b := range s.before.Banks {
		for _, l := range b.Listeners {
			stored[l.Name] = true
		}
	}
	more := 0
	if len(stored) == 0 {
		more++ // the control map
	}
	for _, l := range s.Listeners {
		more += int(l.Sockets)
		if !stored[l.Name] {
			more++ // its flow table
		}
	}
	fits := func() bool { return int64(s.unit.Stored)+int64(more) <= int64(s.unit.StoreMax) }
	if fits() {
		return nil
	}
	// What was stored when this run began may have been released since.
	if err := s.ask(); err != nil || fits() {
		return err
	}
	return unfit(fmt.Errorf("unit %s: FileDescriptorStoreMax=%d is too small: %d descriptors are stored, %d more are to come (write FileDescriptorStoreMax=%d)",
		s.Unit, s.unit.StoreMax, s.unit.Stored, more, max(config.FileDescriptorStoreMax(len(s.Listeners)), int(s.unit.Stored)+more)))
}

// owner is the server's uid, and the user's name.
func (r *run) owner() (uint32, string, error) {
	name := r.User
	if name == "" && r.known {
		name = r.unit.User
	}
	if name == "" {
		return uint32(unix.Geteuid()), "root", nil
	}
	if uid, err := strconv.ParseUint(name, 10, 32); err == nil && uint32(uid) != systemd.NoUID {
		return uint32(uid), name, nil
	}
	u, err := user.Lookup(name)
	switch {
	case err == nil && u.Uid == "0" && name != "root":
		// Where /etc/passwd cannot be read Go takes $USER, which is the unit's user, for the name of whoever runs this: root.
		err = errors.New("it is not known as another one than root")
	case err == nil:
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		return uint32(uid), name, err
	case errors.As(err, new(user.UnknownUserError)) && r.known && name == r.unit.User && r.unit.UID != systemd.NoUID && r.unit.UID != 0:
		return r.unit.UID, name, nil // a DynamicUser= is in no file; systemd knows it since it forked us
	}
	return 0, "", unfit(fmt.Errorf("user %q: %w (create it, or change User=)", name, err))
}

// checkPins says whether only root can have put there what is pinned. Each
// directory is looked at once the ones above it are known to be root's.
func checkPins() error {
	dir, err := bpfprog.Dir()
	if err != nil {
		return unfit(err)
	}
	for _, path := range []string{bpfprog.Root, dir, dir + "/groups", dir + "/services"} {
		var st unix.Stat_t
		err := unix.Lstat(path, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case err != nil:
			return fmt.Errorf("pins: %s: %w", path, err)
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return withStatus(StatusUnsafe, fmt.Errorf("pins: %s is no directory (see who made it, then remove it)", path))
		case st.Uid != 0 || st.Mode&0o022 != 0:
			return withStatus(StatusUnsafe, fmt.Errorf("pins: %s belongs to uid %d with mode %#o: others could have put there what is in it (see who did; then chown root and chmod 0700, or remove it)",
				path, st.Uid, st.Mode&0o7777))
		}
	}
	return nil
}
