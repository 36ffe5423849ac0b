package bpfprog

import (
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"grm/internal/reuseport"
	"grm/internal/testenv"
)

// Sockets come to the group and leave it again, as the first that the kernel
// finds and as the last, while packets come as fast as they can: each of these
// is somewhere, where somebody can read it. A close instead would lose some.
func TestLeaveLosesNothing(t *testing.T) {
	for _, address := range []string{"127.0.0.1:5001", "[::1]:5001"} {
		r := newRig(t, noopSpec(address))
		working := r.generation(0, 1, 1)[0]
		r.ctl.Flip(0)
		var sent, got atomic.Uint64
		read := make(chan struct{})
		go func() {
			defer close(read)
			buf := make([]byte, 16)
			for {
				if _, _, err := working.ReadFromUDPAddrPort(buf); err != nil {
					return
				}
				got.Add(1)
			}
		}()
		c := dial(t, r.Spec.Address)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if sent.Load() > got.Load()+1000 {
					continue // no more than the queue has room for
				}
				if _, err := c.Write([]byte("hello")); err != nil {
					t.Error(err)
				}
				sent.Add(1)
			}
		}()
		// A packet that was under way is in the queue of the one that left. It is looked for when the kernel has long been through with it.
		var left []*net.UDPConn
		strays := uint64(0)
		retire := func(c *net.UDPConn) {
			raw := must(c.SyscallConn())(t)
			check(t, raw.Control(func(fd uintptr) {
				for {
					if _, _, err := unix.Recvfrom(int(fd), nil, unix.MSG_DONTWAIT|unix.MSG_TRUNC); errors.Is(err, syscall.EAGAIN) {
						return
					} else if err != nil {
						t.Error(err)
						return
					}
					strays++
				}
			}))
			check(t, c.Close())
		}
		for range testenv.Scale(3000) {
			c := r.bind()
			check(t, reuseport.Leave(fd(t, c)))
			if left = append(left, c); len(left) > 100 {
				retire(left[0])
				left = left[1:]
			}
		}
		close(stop)
		<-stopped
		for _, c := range left {
			retire(c)
		}
		// Loopback has delivered all: what is not read yet is in the queue.
		for deadline := time.Now().Add(patience); got.Load()+strays < sent.Load() && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if sum := got.Load() + strays; sum != sent.Load() {
			t.Errorf("%s: %d sent, %d in the working generation, %d in sockets that left", address, sent.Load(), got.Load(), strays)
		}
		t.Logf("%s: %d sent, %d of them to sockets that left", address, sent.Load(), strays)
		check(t, working.Close())
		<-read
		check(t, r.Remove())
	}
}
