// Package systemd asks the service manager about a unit: what job it has, how
// often it was restarted, what is in its fd store. Root asks over systemd's
// private socket, which works without a bus and during shutdown; others ask
// over the system bus, if there is one.
//
// The connection is godbus's, which go-systemd builds on: go-systemd's own is
// two connections and a subscription to all jobs, and asks for one property at
// a time or for all of them. That costs a start several milliseconds more.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	destination   = "org.freedesktop.systemd1"
	manager       = "/org/freedesktop/systemd1"
	privateSocket = "/run/systemd/private"
	busSocket     = "/run/dbus/system_bus_socket"
)

// ErrAbsent says that no service manager can be asked.
var ErrAbsent = errors.New("systemd cannot be asked")

// Conn is a connection to the service manager.
type Conn struct {
	bus     *dbus.Conn
	timeout time.Duration
}

// Open connects. Each question on the connection may take as long as timeout.
// It fails with ErrAbsent where nobody listens, or we are not let in; other
// errors may pass: systemd drops its connections when it executes itself again.
func Open(timeout time.Duration) (*Conn, error) {
	if os.Geteuid() == 0 {
		return dial(privateSocket, timeout, true)
	}
	return dial(busSocket, timeout, false)
}

func dial(socket string, timeout time.Duration, private bool) (*Conn, error) {
	bus, err := dbus.Dial("unix:path=" + socket)
	if err != nil {
		return nil, failed(socket, err)
	}
	c := &Conn{bus: bus, timeout: timeout}
	if err := c.greet(private); err != nil {
		_ = bus.Close() // nothing has been asked yet
		return nil, failed(socket, err)
	}
	return c, nil
}

// failed says whether err means that there is nobody to ask.
func failed(socket string, err error) error {
	for _, none := range []error{unix.ENOENT, unix.ENOTDIR, unix.ECONNREFUSED, unix.EACCES, unix.EPERM} {
		if errors.Is(err, none) {
			return fmt.Errorf("%w over %s: %w", ErrAbsent, socket, err)
		}
	}
	return fmt.Errorf("ask systemd over %s: %w", socket, err)
}

// greet authenticates, which the library does without a deadline of its own:
// closing the connection ends it. A bus, unlike systemd, wants a Hello.
func (c *Conn) greet(private bool) error {
	late := time.AfterFunc(c.timeout, func() { c.bus.Close() })
	defer late.Stop()
	if err := c.bus.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))}); err != nil {
		return err
	}
	if private {
		return nil
	}
	return c.bus.Hello()
}

// Close closes the connection.
func (c *Conn) Close() error { return c.bus.Close() }

// Unit is what is known of a service unit at one moment.
type Unit struct {
	Name        string
	LoadState   string // "loaded", "not-found", …
	ActiveState string // "active", "activating", "deactivating", "inactive", "failed", …
	SubState    string // "start-pre", "running", "stop-post", "auto-restart", …
	Job         string // type of the unit's job: "start", "restart", "stop", …; "" if it has none
	Type        string // "notify", "simple", …

	Restarts       uint32 // automatic restarts since somebody last started it
	NotifyAccess   string // "none", "main", "exec" or "all"
	Stored         uint32 // descriptors in its fd store
	StoreMax       uint32
	Restart        string // "no", "always", "on-failure", …
	User           string // User=, "" for root
	UID            uint32 // what User= or DynamicUser= came to; NoUID if not known yet
	PrivateNetwork bool
	MainPID        uint32
	StopTimeout    time.Duration // TimeoutStopSec=; 0: none
	Command        []string      // of the first ExecStart=
}

// NoUID stands for a user that systemd has not looked up yet.
const NoUID = ^uint32(0)

// Unit asks about a service unit. All questions are in flight at once: one
// round trip, and one more if the unit has a job.
func (c *Conn) Unit(name string) (Unit, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	u := Unit{Name: name}
	var job struct {
		ID   uint32
		Path dbus.ObjectPath
	}
	var stopTimeout uint64
	var commands []command
	object := c.bus.Object(destination, unitPath(name))
	const unit, service = "Unit.", "Service."
	questions := []question{
		{unit + "LoadState", &u.LoadState}, {unit + "ActiveState", &u.ActiveState}, {unit + "SubState", &u.SubState}, {unit + "Job", &job},
		{service + "Type", &u.Type}, {service + "NRestarts", &u.Restarts}, {service + "NotifyAccess", &u.NotifyAccess},
		{service + "NFileDescriptorStore", &u.Stored}, {service + "FileDescriptorStoreMax", &u.StoreMax}, {service + "Restart", &u.Restart},
		{service + "User", &u.User}, {service + "UID", &u.UID}, {service + "PrivateNetwork", &u.PrivateNetwork}, {service + "MainPID", &u.MainPID},
		{service + "TimeoutStopUSec", &stopTimeout}, {service + "ExecStart", &commands},
	}
	if err := ask(ctx, object, questions); err != nil {
		return Unit{}, fmt.Errorf("ask systemd about %s: %w", name, err)
	}
	if len(commands) > 0 {
		u.Command = commands[0].Arguments
	}
	if most := uint64(math.MaxInt64 / time.Microsecond); stopTimeout < most { // else it is systemd's infinity
		u.StopTimeout = time.Duration(stopTimeout) * time.Microsecond
	}
	if job.ID != 0 {
		err := ask(ctx, c.bus.Object(destination, job.Path), []question{{"Job.JobType", &u.Job}})
		if err != nil && !gone(err) { // the job may have ended since
			return Unit{}, fmt.Errorf("ask systemd about the job of %s: %w", name, err)
		}
	}
	return u, nil
}

// command is how systemd describes a command and its last run: a(sasbttttuii).
type command struct {
	Path                                   string
	Arguments                              []string
	IgnoreFailure                          bool
	Started, StartedMono, Ended, EndedMono uint64
	PID                                    uint32
	Code, Status                           int32
}

// Stopping says whether the whole system is going down.
func (c *Conn) Stopping() (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	var state string
	if err := ask(ctx, c.bus.Object(destination, manager), []question{{"Manager.SystemState", &state}}); err != nil {
		return false, fmt.Errorf("ask systemd for its state: %w", err)
	}
	return state == "stopping", nil
}

// question is a property (interface.name) and where its value goes.
type question struct {
	property string
	answer   any
}

func ask(ctx context.Context, object dbus.BusObject, questions []question) error {
	calls := make([]*dbus.Call, len(questions))
	for i, q := range questions {
		iface, name, _ := strings.Cut(q.property, ".")
		calls[i] = object.GoWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, make(chan *dbus.Call, 1), destination+"."+iface, name)
	}
	for i, call := range calls {
		select {
		case <-call.Done:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", questions[i].property, ctx.Err())
		}
		err := call.Err
		if err == nil {
			err = read(call.Body, questions[i].answer)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", questions[i].property, err)
		}
	}
	return nil
}

// read reads a property's value from the reply that has it.
func read(reply []any, answer any) error {
	var v dbus.Variant
	if err := dbus.Store(reply, &v); err != nil {
		return err
	}
	return dbus.Store([]any{v.Value()}, answer)
}

func gone(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && (e.Name == "org.freedesktop.DBus.Error.UnknownObject" || e.Name == "org.freedesktop.systemd1.NoSuchJob" ||
		e.Name == "org.freedesktop.DBus.Error.UnknownInterface" || e.Name == "org.freedesktop.DBus.Error.UnknownProperty")
}

// unitPath is the object of a unit.
func unitPath(name string) dbus.ObjectPath {
	return dbus.ObjectPath(manager + "/unit/" + systemd.PathBusEscape(name))
}
