package config

import (
	"encoding"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/bpf"
)

// textForm is a type that owns its text form.
type textForm interface {
	encoding.TextUnmarshaler
	encoding.TextMarshaler
}

func TestText(t *testing.T) {
	for _, c := range []struct {
		in   string
		want textForm
		out  string
	}{
		{"10s", &Duration{10 * time.Second}, "10s"},
		{"0", &Duration{}, "0s"},
		{"600s", &Duration{10 * time.Minute}, "10m"},
		{"90m", &Duration{90 * time.Minute}, "1h30m"},
		{"2h", &Duration{2 * time.Hour}, "2h"},
		{"1h0m1s", &Duration{time.Hour + time.Second}, "1h0m1s"},
		{"0.25s", &Duration{250 * time.Millisecond}, "250ms"},
		{"SIGTERM", ptr(SIGTERM), "SIGTERM"},
		{"USR1", ptr(Signal(syscall.SIGUSR1)), "SIGUSR1"},
		{"", ptr(NoSignal), ""},
		{"1", ptr(Count(1)), "1"},
		{"256", ptr(Count(256)), "256"},
		{"cpus", ptr(CPUs), "cpus"},
		{"0", ptr(Size(0)), "0"},
		{"1500", ptr(Size(1500)), "1500"},
		{"1536KiB", ptr(Size(1536 << 10)), "1536KiB"},
		{"16777216", ptr(Size(16 << 20)), "16MiB"},
		{"2GiB", ptr(Size(2 << 30)), "2GiB"},
		{"tcp://1.2.3.4:5", ptr(mustAddress(t, "tcp://1.2.3.4:5")), "tcp://1.2.3.4:5"},
		{"udp://[0:0::1]:5", ptr(mustAddress(t, "udp://[::1]:5")), "udp://[::1]:5"},
		{"", &Program{}, ""},
		{"/a b/c", &Program{File: "/a b/c"}, "/a b/c"},
		{"1,6 0 0 0x10", &Program{Instructions: []bpf.RawInstruction{{Op: 6, K: 16}}}, "1,6 0 0 16"},
	} {
		got := reflect.New(reflect.TypeOf(c.want).Elem()).Interface().(textForm)
		if err := got.UnmarshalText([]byte(c.in)); err != nil {
			t.Errorf("%T %q: %v", c.want, c.in, err)
			continue
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%T %q: %v, want %v", c.want, c.in, got, c.want)
		}
		if out, err := got.MarshalText(); err != nil || string(out) != c.out {
			t.Errorf("%T %q comes back as %q, %v; want %q", c.want, c.in, out, err, c.out)
		}
	}
}

func TestTextRefused(t *testing.T) {
	for _, c := range []struct {
		in   string
		to   encoding.TextUnmarshaler
		want string
	}{
		{"", new(Duration), `"" is not a duration`},
		{"10", new(Duration), `"10" is not a duration`},
		{"10 s", new(Duration), "is not a duration"},
		{"1d", new(Duration), "is not a duration"},
		{"300000000h", new(Duration), "is not a duration"},
		{"-10s", new(Duration), "is negative"},
		{"15", new(Signal), `"15" is not a signal`},
		{"sigterm", new(Signal), "is not a signal"},
		{"SIGTSTP", new(Signal), "freeze"},
		{"0", new(Count), "out of range"},
		{"257", new(Count), "257 sockets are out of range"},
		{"-1", new(Count), "out of range"},
		{"two", new(Count), "is not a number of sockets"},
		{"", new(Size), "is not a size"},
		{"-1", new(Size), "is not a size"},
		{"1.5MiB", new(Size), "is not a size"},
		{"16MB", new(Size), "is not a size"},
		{"9223372036854775807GiB", new(Size), "is too large"},
		{"2,6 0 0 0", new(Program), `"2" is not a number of instructions, 1 of which follow`},
		{"0", new(Program), `"0" is not a number of instructions, 0 of which follow`},
		{"1,6 0 0", new(Program), `instruction 0: "6 0 0" is not four numbers: code, jt, jf, k`},
		{"2,6 0 0 0,6 256 0 0", new(Program), `instruction 1: "256" is not a number from 0 to 255`},
		{"1,6 0 0 4294967296", new(Program), `"4294967296" is not a number from 0 to 4294967295`},
		{"1,65536 0 0 0", new(Program), "is not a number from 0 to 65535"},
		{"1,6 0 0 -1", new(Program), "is not a number from 0"},
		{"4097" + strings.Repeat(",6 0 0 0", 4097), new(Program), "the program has 4097 instructions (the kernel takes 4096 at most)"},
		{"Notify", new(ReadyKind), "is not a choice"},
		{"quic", new(Dissector), `(use one of "flow", "noop", "cbpf")`},
		{strings.Repeat("x", 1000), new(Assure), `xxx"... is not a choice`},
	} {
		before := reflect.ValueOf(c.to).Elem().Interface()
		err := c.to.UnmarshalText([]byte(c.in))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%T %q: %v, want %s", c.to, c.in, err, c.want)
		}
		if after := reflect.ValueOf(c.to).Elem().Interface(); !reflect.DeepEqual(before, after) {
			t.Errorf("%T %q: changed to %v in spite of the error", c.to, c.in, after)
		}
	}
}

func TestCountOf(t *testing.T) {
	for _, c := range []struct {
		count      Count
		cpus, want int
	}{{CPUs, 4, 4}, {CPUs, 0, 1}, {CPUs, 1000, MaxSockets}, {7, 4, 7}} {
		if n := c.count.Of(c.cpus); n != c.want {
			t.Errorf("%v of %d CPUs: %d, want %d", c.count, c.cpus, n, c.want)
		}
	}
}

func ptr[T any](v T) *T { return &v }
