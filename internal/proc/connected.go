package proc

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

const tcpEstablished = 1 // also what a connected UDP socket is in

// Connected counts the sockets of a network ("udp" or "tcp") in this namespace
// that have a peer, one of the local ports, and an inode that is wanted. For
// TCP that is every one that a process has and that does not listen.
func Connected(network string, ports map[uint16]bool, wanted func(inode uint64) bool) (n int, err error) {
	for _, family := range []string{"", "6"} {
		err := eachLine("/proc/self/net/"+network+family, func(s socket) {
			connected := s.state == tcpEstablished || network == "tcp" && s.state != tcpListen
			if connected && s.inode != 0 && ports[s.local.Port()] && wanted(s.inode) {
				n++
			}
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // no IPv6 here
			return 0, err
		}
	}
	return n, nil
}

// eachLine reads a table line by line: it may have many.
func eachLine(path string, do func(socket)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if s, ok := parseSocket(lines.Bytes()); ok {
			do(s)
		}
	}
	if err := errors.Join(lines.Err(), f.Close()); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
