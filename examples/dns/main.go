// Dns answers every TXT question with its own process id, as a name server would: one query, one answer, nothing to remember.
//
// It is the example for the dissector noop: no flow is followed, and after the flip each query goes to the new instance. The old one stays
// for the drain's grace, so that what it has read it also answers.
package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/net/dns/dnsmessage"

	"grm"
)

func main() {
	listen := flag.String("listen", "[::]:5300", "where to listen when started without sockets")
	flag.Parse()
	if err := run(*listen); err != nil {
		fmt.Fprintln(os.Stderr, "dns:", err)
		os.Exit(1)
	}
}

func run(listen string) error {
	conns, err := grm.ListenUDP("", listen)
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

func serve(c *net.UDPConn) error {
	buf := make([]byte, 1<<16)
	name := strconv.Itoa(os.Getpid())
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		if packet, err := answer(buf[:n], name); err == nil {
			_, _ = c.WriteToUDPAddrPort(packet, from) // a client that is gone is no reason to stop serving the others
		}
	}
}

// answer makes the response to a query; what is no query gets none.
func answer(query []byte, name string) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	if m.Response || len(m.Questions) != 1 {
		return nil, fmt.Errorf("response %v with %d questions", m.Response, len(m.Questions))
	}
	m.Response, m.Authoritative = true, true
	m.Answers, m.Authorities, m.Additionals = nil, nil, nil
	if q := m.Questions[0]; q.Type == dnsmessage.TypeTXT {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.TXTResource{TXT: []string{name}},
		}}
	}
	return m.Pack()
}
