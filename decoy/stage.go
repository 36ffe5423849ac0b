package decoy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The parts that this program plays under one command line. They are told by
// an environment variable, which no server ever sees.
const (
	partKeeper = "keeper"
	partServer = "server" // about to become the server
	partReady  = "ready"  // about to become the readiness probe
	partWatch  = "watch"  // about to become the probe of the watch

	stageVar = "GRM_STAGE" // PART:MASK, the signal mask in hex being the one that the server is to have
	bankVar  = "GRM_BANK"  // the bank that a keeper keeps
	verbVar  = "GRM_VERB"  // what its start is: start, again
	adoptVar = "GRM_ADOPT" // the pid of a running server that it takes over
)

type stage struct {
	part string
	mask uint64
}

func currentStage() (stage, error) {
	text, found := os.LookupEnv(stageVar)
	if !found {
		mask, err := setMask(unix.SIG_BLOCK, 0)
		return stage{"", mask}, err
	}
	part, mask, _ := strings.Cut(text, ":")
	bits, err := strconv.ParseUint(mask, 16, 64)
	switch part {
	case partKeeper, partServer, partReady, partWatch:
	default:
		err = errors.New("unknown part")
	}
	if err != nil {
		return stage{}, fmt.Errorf("%s=%s: %w (it is for grm-decoy itself: unset it)", stageVar, text, err)
	}
	return stage{part, bits}, nil
}

func (s stage) with(part string) string { return fmt.Sprintf("%s:%x", part, s.mask) }

// self is the path of this program: its own, so that ps and pgrep show a name,
// unless another file has been put there since.
func self() string {
	const link = "/proc/self/exe"
	path, err := os.Readlink(link)
	if err != nil {
		return link
	}
	running, err1 := os.Stat(link)
	there, err2 := os.Stat(path)
	if err1 != nil || err2 != nil || !os.SameFile(running, there) {
		return link
	}
	return path
}

// setMask changes the calling thread's signal mask. A child inherits it.
func setMask(how int, mask uint64) (old uint64, err error) {
	var set, was unix.Sigset_t
	set.Val[0] = mask
	if err := unix.PthreadSigmask(how, &set, &was); err != nil {
		return 0, fmt.Errorf("signal mask: %w", err)
	}
	return was.Val[0], nil
}

// withMask calls f, which starts a child, with more signals blocked.
func withMask(more uint64, f func() (process, error)) (process, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	old, err := setMask(unix.SIG_BLOCK, more)
	if err != nil {
		return process{}, err
	}
	p, err := f()
	_, err2 := setMask(unix.SIG_SETMASK, old)
	return p, errors.Join(err, err2)
}

// become turns this process into the server or a probe. It returns only if
// that fails.
func (s stage) become(o Options) (int, error) {
	argv := map[string][]string{partServer: o.Command, partReady: o.ReadyExec, partWatch: o.WatchProbe}[s.part]
	if len(argv) == 0 {
		return ExitUsage, fmt.Errorf("no command to run as %s", s.part)
	}
	env := environ(os.Environ())
	path, err := lookPath(argv[0], env.get("PATH"))
	if err != nil {
		return ExitNotFound, fmt.Errorf("run %s: %w", argv[0], err)
	}
	// systemd starts services with SIGPIPE ignored (IgnoreSIGPIPE=), but the
	// Go runtime has replaced that by now.
	if env.get("INVOCATION_ID") != "" {
		signal.Ignore(unix.SIGPIPE)
	}
	runtime.LockOSThread() // for the mask, which is the thread's
	if _, err := setMask(unix.SIG_SETMASK, s.mask); err != nil {
		return ExitFailure, err
	}
	err = syscall.Exec(path, argv, env.own(os.Getpid()))
	if errors.Is(err, fs.ErrNotExist) && exists(path) {
		return ExitCannotExec, fmt.Errorf("run %s: its interpreter does not exist (install the one that it names)", path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return ExitNotFound, fmt.Errorf("run %s: %w (install it, or correct the command)", path, err)
	}
	return ExitCannotExec, fmt.Errorf("run %s: %w (it has to be a program that the service's user may execute)", path, err)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// lookPath finds a command as execvp(3) does.
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(path) {
		if file := filepath.Join(dir, name); unix.Access(file, unix.X_OK) == nil && filepath.IsAbs(file) {
			return file, nil
		}
	}
	return "", fmt.Errorf("%w in PATH=%s (give an absolute path)", fs.ErrNotExist, path)
}
