package systemd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"maps"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// fake answers as systemd does on its private socket. A property that it
// does not have is an error; a nil one is never answered.
func fake(t *testing.T, properties map[string]any) *Conn {
	t.Helper()
	properties = maps.Clone(properties)
	socket := filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn, properties)
	}()
	c, err := dial(socket, 2*time.Second, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func serve(conn net.Conn, properties map[string]any) {
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadString('\n')
		switch {
		case err != nil:
			return
		case strings.Contains(line, "AUTH EXTERNAL"):
			conn.Write([]byte("OK 0123456789abcdef0123456789abcdef\r\n"))
			continue
		case strings.HasPrefix(line, "NEGOTIATE"):
			conn.Write([]byte("ERROR\r\n"))
			continue
		case strings.Contains(line, "AUTH"):
			conn.Write([]byte("REJECTED EXTERNAL\r\n"))
			continue
		}
		break // BEGIN
	}
	for {
		call, err := dbus.DecodeMessage(in)
		if err != nil {
			return
		}
		key := call.Body[0].(string) + "." + call.Body[1].(string)
		path := call.Headers[dbus.FieldPath].Value().(dbus.ObjectPath)
		value, ok := properties[strings.TrimPrefix(key, "org.freedesktop.systemd1.")+"@"+string(path)]
		if !ok {
			value, ok = properties[strings.TrimPrefix(key, "org.freedesktop.systemd1.")]
		}
		reply := &dbus.Message{Type: dbus.TypeMethodReply, Headers: map[dbus.HeaderField]dbus.Variant{
			dbus.FieldReplySerial: dbus.MakeVariant(call.Serial()),
		}}
		switch {
		case !ok:
			reply.Type = dbus.TypeError
			reply.Headers[dbus.FieldErrorName] = dbus.MakeVariant("org.freedesktop.DBus.Error.UnknownObject")
			reply.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(""))
			reply.Body = []any{"no " + key}
		case value == nil:
			continue
		default:
			v := dbus.MakeVariant(value)
			reply.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(v))
			reply.Body = []any{v}
		}
		if err := reply.EncodeTo(conn, binary.LittleEndian); err != nil {
			return
		}
	}
}

type job struct {
	ID   uint32
	Path dbus.ObjectPath
}

func unit() map[string]any {
	return map[string]any{
		"Unit.LoadState": "loaded", "Unit.ActiveState": "activating", "Unit.SubState": "start-pre", "Unit.Job": job{0, "/"},
		"Service.Type": "notify", "Service.NRestarts": uint32(3), "Service.NotifyAccess": "all", "Service.NFileDescriptorStore": uint32(6),
		"Service.FileDescriptorStoreMax": uint32(64), "Service.Restart": "always", "Service.User": "echo", "Service.UID": NoUID,
		"Service.PrivateNetwork": false, "Service.MainPID": uint32(12), "Service.TimeoutStopUSec": uint64(30e6),
		"Service.ExecStart": []command{{Path: "/decoy", Arguments: []string{"decoy", "--", "/server"}, PID: 12}},
	}
}

func TestUnit(t *testing.T) {
	u, err := fake(t, unit()).Unit("e-1.service")
	want := Unit{Name: "e-1.service", LoadState: "loaded", ActiveState: "activating", SubState: "start-pre", Type: "notify", Restarts: 3,
		NotifyAccess: "all", Stored: 6, StoreMax: 64, Restart: "always", User: "echo", UID: NoUID, MainPID: 12, StopTimeout: 30 * time.Second, Command: []string{"decoy", "--", "/server"}}
	if err != nil || !reflect.DeepEqual(u, want) {
		t.Fatalf("%v\n%+v\n%+v", err, u, want)
	}
}

func TestInfinity(t *testing.T) {
	properties := unit()
	properties["Service.TimeoutStopUSec"] = ^uint64(0)
	if u, err := fake(t, properties).Unit("e.service"); err != nil || u.StopTimeout != 0 {
		t.Fatalf("%v: %v", err, u.StopTimeout)
	}
}

func TestJob(t *testing.T) {
	properties := unit()
	properties["Unit.Job@/org/freedesktop/systemd1/unit/e_2d1_2eservice"] = job{7, "/org/freedesktop/systemd1/job/7"}
	properties["Job.JobType@/org/freedesktop/systemd1/job/7"] = "restart"
	if u, err := fake(t, properties).Unit("e-1.service"); err != nil || u.Job != "restart" {
		t.Fatalf("%v: job %q", err, u.Job)
	}
	delete(properties, "Job.JobType@/org/freedesktop/systemd1/job/7")
	if u, err := fake(t, properties).Unit("e-1.service"); err != nil || u.Job != "" {
		t.Fatalf("a job that has just ended: %v: job %q", err, u.Job)
	}
}

func TestStopping(t *testing.T) {
	for state, want := range map[string]bool{"running": false, "degraded": false, "stopping": true} {
		if got, err := fake(t, map[string]any{"Manager.SystemState": state}).Stopping(); err != nil || got != want {
			t.Errorf("%s: %v, %v", state, got, err)
		}
	}
}

func TestErrors(t *testing.T) {
	properties := unit()
	properties["Service.NRestarts"] = "three"
	if _, err := fake(t, properties).Unit("e.service"); err == nil || !strings.Contains(err.Error(), "NRestarts") {
		t.Errorf("a property of another type: %v", err)
	}
	delete(properties, "Service.NRestarts")
	if _, err := fake(t, properties).Unit("e.service"); err == nil || !strings.Contains(err.Error(), "ask systemd about e.service: Service.NRestarts") {
		t.Errorf("a property that is missing: %v", err)
	}
	properties["Service.NRestarts"] = nil
	c := fake(t, properties)
	c.timeout = 50 * time.Millisecond
	if _, err := c.Unit("e.service"); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("no answer: %v", err)
	}
	if _, err := dial(filepath.Join(t.TempDir(), "none"), time.Second, true); !errors.Is(err, ErrAbsent) {
		t.Errorf("no socket: %v", err)
	}
}

func TestSilentManager(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := dial(socket, 50*time.Millisecond, true); err == nil || errors.Is(err, ErrAbsent) {
		t.Fatalf("a manager that is there, accepts and says nothing: %v", err)
	}
}

// FuzzReply: no value that systemd could reply with panics, whatever was asked
// for, and one of the right type is read as what it says.
func FuzzReply(f *testing.F) {
	f.Add("/decoy", uint64(7))
	f.Add("\x00", ^uint64(0))
	f.Fuzz(func(t *testing.T, text string, n uint64) {
		// As the library hands values over: structures are []any.
		values := []any{
			text, uint32(n), n, n%2 == 1, []any{uint32(n), dbus.ObjectPath(text)},
			[][]any{{text, []string{text, ""}, true, n, n, n, n, uint32(n), int32(n), int32(n)}},
			byte(n), int16(n), int64(n), float64(n), dbus.ObjectPath(text), dbus.MakeVariant(text), []string{text}, []byte(text), []any{}, []any{text, n}, []any{uint32(n), text, n},
			[][]any{}, [][]any{{}}, [][]any{{text}}, [][]any{{n, n, n, n, n, n, n, n, n, n}}, map[string]dbus.Variant{text: dbus.MakeVariant(n)}, []any{[]any{n}, []any{text}},
		}
		right := []any{text, uint32(n), n, n%2 == 1, job{uint32(n), dbus.ObjectPath(text)},
			[]command{{text, []string{text, ""}, true, n, n, n, n, uint32(n), int32(n), int32(n)}}}
		for i, value := range values {
			for k := range right {
				answer := reflect.New(reflect.TypeOf(right[k]))
				err := read([]any{dbus.MakeVariantWithSignature(value, dbus.Signature{})}, answer.Interface())
				if got := answer.Elem().Interface(); i == k && (err != nil || !reflect.DeepEqual(got, right[k])) {
					t.Fatalf("%#v was read as %#v, %v", value, got, err)
				}
			}
		}
		if err := read(nil, new(string)); err == nil {
			t.Fatal("an empty reply is an answer")
		}
	})
}

func TestUnitPath(t *testing.T) {
	for name, want := range map[string]string{
		"echo.service":   "/org/freedesktop/systemd1/unit/echo_2eservice",
		"9a-b@c.service": "/org/freedesktop/systemd1/unit/_39a_2db_40c_2eservice",
	} {
		if got := unitPath(name); string(got) != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}
