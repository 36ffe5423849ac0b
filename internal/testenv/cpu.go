package testenv

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// OneCPU keeps the calling goroutine on one CPU until the function that it
// returns is called, by the same goroutine.
func OneCPU(t testing.TB) (release func()) {
	t.Helper()
	runtime.LockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		t.Fatal(err)
	}
	for cpu := range len(all) * 64 {
		if all.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	return func() {
		t.Helper()
		if err := unix.SchedSetaffinity(0, &all); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	}
}
