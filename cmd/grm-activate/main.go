// Grm-activate is the root side of a service's unit: it makes the sockets of
// the next instance and hands them to systemd (ExecStartPre=), and cleans up
// after a stop (ExecStop=, ExecStopPost=).
//
// Whatever it has to say goes to standard error, one line each, with its name,
// in lower case and without a full stop; what --help prints goes to standard output.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"grm/activate"
)

// env is what a test gives in place of the process's own.
type env struct {
	stdout, stderr io.Writer
}

func main() {
	e := env{stdout: os.Stdout, stderr: os.Stderr}
	err := run(e, os.Args[1:])
	if err != nil {
		activate.Log(e.stderr, 3, "", err.Error())
	}
	os.Exit(status(err))
}

// status is the exit status for an error.
func status(err error) int {
	if errors.Is(err, errUsage) {
		return activate.StatusUsage
	}
	return activate.Status(err)
}

func run(e env, args []string) error {
	// A start that is told to end undoes what it has done so far.
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	where := activate.Env{Log: e.stderr}
	p, err := parse(args)
	if err != nil {
		activate.Hesitate(ctx, p.request, where)
		return err
	}
	switch p.mode {
	case help:
		_, err := fmt.Fprint(e.stdout, usage)
		return err
	case stop:
		err = activate.Stop(p.request, where)
	case stopPost:
		err = activate.StopPost(ctx, p.request, where)
	default:
		if err := readPrograms(p.request.Listeners); err != nil {
			activate.Hesitate(ctx, p.request, where)
			return err
		}
		err = activate.Start(ctx, p.request, where)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.request.Service, err)
	}
	return nil
}

const usage = `usage: grm-activate [flags] NAME ADDRESS... [-- COMMAND [ARGS...]]
       grm-activate --stop NAME
       grm-activate --stop-post NAME

Makes the sockets of service NAME's next instance, all or none, and puts them
into systemd's fd store; with a command it becomes that, with the sockets, and
needs no systemd. Until the new instance says that it is ready the one that
runs gets everything. After a crash the next start gets the same sockets again.

An ADDRESS is udp://IP:PORT or tcp://IP:PORT. What differs from the flags may
follow it: udp://[::]:443?name=quic&sockets=4. With several addresses each
needs a name.

  -c, --count N             sockets per address, 1 to 256, or "cpus" (1)
  -4, --also-ipv4           take IPv4 on [::] as well
      --freebind            bind although no interface has the address yet
      --rcvbuf BYTES        receive buffer of each socket, 0 for the kernel's default (16MiB)
  -f, --flow-timeout TIME   forget a flow that is silent for so long (124s)
  -n, --noop                no flows: each packet goes to the newest instance
  -b, --bpf FILE            find the flow with a classic BPF program
      --assure HOW          a flow is real after a reply, a packet, or explicit word (reply)
  -a, --app N               number of this service among those that share the address (0)
  -m, --apps-max N          how many services may share the address (1)
      --no-register         leave the sockets' generation to the server
      --advance-working-gen the new instance gets new flows at once, ready or not
      --user USER           whose the sockets are (the unit's User=)
      --max-instances N     end the oldest instance when there are more (refuse at 32)
      --unit UNIT           name of the unit (that of the cgroup)
  -v, --verbose             say more
  -h, --help                this text

In the unit, all with the plus sign:
  ExecStartPre=+grm-activate NAME ADDRESS...
  ExecStop=+grm-activate --stop NAME          tell the decoy: a stop, or a restart?
  ExecStopPost=+grm-activate --stop-post NAME after a stop end everything, else what never became ready

Exit status:
  0  done
  1  something else failed
  2  the command line is wrong
  3  an address is in use by somebody else
  4  the kernel, a privilege, bpffs, or a setting of the unit is missing
  5  what is asked for does not go with instances that live
  6  a record in /run/grm or a pin is corrupt, or somebody else could have put it there

Example:
  ExecStartPre=+/usr/lib/grm/grm-activate echo udp://0.0.0.0:5201?sockets=4
`
