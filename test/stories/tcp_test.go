package stories

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inBox runs f on a thread that is in the box's network. Sockets that are made there stay there.
func (s *story) inBox(f func() error) error {
	ended := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread must not serve other goroutines afterwards
		ns, err := os.Open(s.NetNS())
		if err == nil {
			defer ns.Close()
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		ended <- err
	}()
	return <-ended
}

// ask sends one line and returns which instance answered it.
func ask(c net.Conn, answers *bufio.Reader, line string) (string, error) {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c, "%s\n", line); err != nil {
		return "", err
	}
	answer, err := answers.ReadString('\n')
	if err != nil {
		return "", err
	}
	instance, rest, _ := strings.Cut(strings.TrimSuffix(answer, "\n"), " ")
	if rest != line {
		return "", fmt.Errorf("%q answers %q", answer, line)
	}
	return instance, nil
}

// TestTCP restarts a TCP server: each connection stays where it was accepted, none is refused or reset, and new ones go to the new instance.
func TestTCP(t *testing.T) {
	s := newStory(t)
	tcp := s.install("tcp", quickly("1s")...)
	tcp.start()
	target := tcp.Targets()[0].String()
	var conns []net.Conn
	s.must(s.inBox(func() error {
		for range 50 {
			c, err := net.Dial("tcp", target)
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
		return nil
	}))
	var running sync.WaitGroup
	stop := make(chan struct{})
	var ended sync.Once
	end := func() {
		ended.Do(func() { close(stop) })
		running.Wait()
	}
	t.Cleanup(func() {
		end()
		for _, c := range conns {
			c.Close()
		}
	})
	first := tcp.instance()
	for i, c := range conns {
		running.Go(func() {
			answers := bufio.NewReader(c)
			for n := 0; ; n++ {
				if instance, err := ask(c, answers, fmt.Sprintf("line %d", n)); err != nil || instance != first {
					t.Errorf("connection %d, line %d: answered by %q, %v; %s had accepted it", i, n, instance, err, first)
					return
				}
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	// Short connections, one after another, all the time.
	var short atomic.Int64
	var newest atomic.Value
	running.Go(func() {
		err := s.inBox(func() error {
			for {
				c, err := net.Dial("tcp", target)
				if err != nil {
					return err
				}
				instance, err := ask(c, bufio.NewReader(c), "short")
				c.Close()
				if err != nil {
					return err
				}
				newest.Store(instance)
				short.Add(1)
				select {
				case <-stop:
					return nil
				case <-time.After(time.Millisecond):
				}
			}
		})
		if err != nil {
			t.Errorf("after %d short connections: %v", short.Load(), err)
		}
	})
	for range 3 {
		tcp.restart()
		now, goal := tcp.instance(), short.Load()+200
		s.must(s.Wait("short connections go to the new instance", func() (bool, error) {
			return newest.Load() == now && short.Load() >= goal || t.Failed(), nil
		}))
	}
	if procs := tcp.processes(); len(procs.Servers) < 2 {
		t.Errorf("the first server must live as long as its connections do: %+v", procs.Servers)
	}
	end()
	for _, c := range conns {
		c.Close()
	}
	tcp.drained()
	s.must(tcp.Stop())
	s.nothingLeft(tcp)
}
