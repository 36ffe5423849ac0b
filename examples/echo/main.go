// Echo answers each datagram with its own process id, a space and what it was sent: one sees who answers, and whether that changes.
//
// It is the example of a server that uses package grm; examples/echo-python does the same without knowing anything of grm.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"

	"grm"
)

func main() {
	listen := flag.String("listen", "[::]:5201", "where to listen when started without sockets")
	name := flag.String("name", "", "the listener to serve, all of them by default")
	flag.Parse()
	if err := run(*name, *listen); err != nil {
		fmt.Fprintln(os.Stderr, "echo:", err)
		os.Exit(1)
	}
}

func run(name, listen string) error {
	conns, err := grm.ListenUDP(name, listen)
	if err != nil {
		return err
	}
	ctx, cancel := grm.StopContext(context.Background())
	defer cancel()
	ended := make(chan error)
	for _, c := range conns {
		go func() { ended <- serve(c) }()
	}
	if err := grm.Ready(); err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// serve answers what comes until the socket is closed.
func serve(c *net.UDPConn) error {
	buf := make([]byte, 1<<16)
	head := strconv.AppendInt(nil, int64(os.Getpid()), 10)
	head = append(head, ' ')
	copy(buf, head)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf[len(head):])
		if err != nil {
			return err
		}
		// A client that is not there any more, or no route to it, is no reason to stop serving the others.
		_, _ = c.WriteToUDPAddrPort(buf[:len(head)+n], from)
	}
}
