package activate

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
	"grm/internal/state"
)

// Exit statuses of grm-activate, by which scripts may branch.
const (
	StatusFailure  = 1 // anything else
	StatusUsage    = 2 // the command line is wrong
	StatusInUse    = 3 // somebody else has the address
	StatusUnfit    = 4 // the kernel, a privilege, bpffs or a setting of the unit is missing
	StatusConflict = 5 // what is asked for does not go with instances that live
	StatusUnsafe   = 6 // a record or a pin is corrupt, or another user could have put it there
)

// statusError is an error whose exit status is known.
type statusError struct {
	status int
	error
}

func (e statusError) Unwrap() error { return e.error }

// Status is the exit status for an error of this package; 0 for none.
func Status(err error) int {
	var e statusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.status
	}
	return StatusFailure
}

func withStatus(status int, err error) error {
	if err == nil {
		return nil
	}
	return statusError{status, err}
}

func inUseBy(err error) error  { return withStatus(StatusInUse, err) }
func unfit(err error) error    { return withStatus(StatusUnfit, err) }
func conflict(err error) error { return withStatus(StatusConflict, err) }

// classify gives an error that has no status yet the one that its cause implies.
func classify(err error) error {
	var e statusError
	switch {
	case err == nil || errors.As(err, &e):
		return err
	case errors.Is(err, state.ErrUnsafe), errors.Is(err, state.ErrInvalid):
		return withStatus(StatusUnsafe, err)
	case errors.Is(err, bpfprog.ErrLayout):
		return conflict(err)
	case errors.Is(err, unix.EADDRINUSE):
		return inUseBy(err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, errors.ErrUnsupported):
		return unfit(err)
	}
	return err
}

// badPin is the status for a pin that cannot be opened: one that another
// version of grm has left, or that is corrupt.
func badPin(err error) error {
	if err = classify(err); err == nil || Status(err) != StatusFailure {
		return err
	}
	for _, passes := range []error{unix.ENOMEM, unix.EMFILE, unix.ENFILE, unix.EINTR} {
		if errors.Is(err, passes) {
			return err // that is not the pin's fault
		}
	}
	return withStatus(StatusUnsafe, fmt.Errorf("%w (stop the services that use it, then remove what is pinned for it below %s)", err, bpfprog.Root))
}
