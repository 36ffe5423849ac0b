// Package grm is what a server may use to work with grm: its sockets by name,
// the word that it is ready, the notice that it is to drain, and what the
// kernel side knows of a socket.
//
// None of it is needed. A server that takes its sockets from the environment
// as sd_listen_fds(3) says, in any language, restarts without losing a packet.
// And none of it needs grm: in a process that was started by a plain .socket
// unit, or by hand, the functions find what there is and do nothing else. They
// need no privilege.
//
//	conns, err := grm.ListenUDP("quic", "[::]:4433") // from grm, or bound here
//	...
//	ctx, cancel := grm.DrainContext(context.Background())
//	defer cancel()
//	if err := grm.Ready(); err != nil { ... } // new flows come here from now on
//	serve(ctx, conns)                         // ctx ends: finish what is there
package grm

import (
	"fmt"
	"strings"

	"grm/internal/notify"
)

// Ready says that this instance serves: new flows go to it as soon as its
// decoy has seen that, and the instance before it is drained. It is to be
// called once everything works. Without a service manager it does nothing.
func Ready() error { return tell("READY=1") }

// Status shows text in "systemctl status", beside what grm itself says there.
// Without a service manager it does nothing.
func Status(text string) error {
	return tell("STATUS=" + strings.ReplaceAll(text, "\n", " "))
}

// Stopping says that this instance ends by itself: the one that still serves
// its address takes new flows at once.
func Stopping() error { return tell("STOPPING=1") }

func tell(state string) error {
	c, err := notify.Open()
	if err != nil {
		return err
	}
	if err := c.Send(state); err != nil {
		_ = c.Close() // nothing was sent that closing could lose
		return fmt.Errorf("tell the service manager %s: %w", state, err)
	}
	return c.Close()
}
