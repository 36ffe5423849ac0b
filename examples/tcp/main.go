// Tcp answers each line with its own process id, a space and the line. A connection stays with the instance that accepted it.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"sync"

	"grm"
)

func main() {
	listen := flag.String("listen", "[::]:5204", "where to listen when started without sockets")
	flag.Parse()
	if err := run(*listen); err != nil {
		fmt.Fprintln(os.Stderr, "tcp:", err)
		os.Exit(1)
	}
}

func run(listen string) error {
	listeners, err := grm.ListenTCP("", listen)
	if err != nil {
		return err
	}
	// A drained instance goes on: it accepts what is still in its queue, serves what it has, and is ended when all of that is over.
	ctx, cancel := grm.StopContext(context.Background())
	defer cancel()
	ended := make(chan error, len(listeners))
	var conns sync.WaitGroup
	for _, l := range listeners {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		go func() { ended <- accept(ctx, l, &conns) }()
	}
	if err := grm.Ready(); err != nil {
		return err
	}
	for range listeners {
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			return err
		}
	}
	conns.Wait()
	return nil
}

func accept(ctx context.Context, l *net.TCPListener, conns *sync.WaitGroup) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		conns.Go(func() {
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if _, err := fmt.Fprintf(c, "%d %s\n", os.Getpid(), lines.Text()); err != nil {
					return
				}
			}
		})
	}
}
