// Demo shows the main job of grm: a UDP server under load in a private systemd, restarted five times by a plain `systemctl restart`; then
// the same without grm.
//
// It prints what became of each datagram and ends with status 1 if one was lost, or one flow moved, with grm. The host is not touched: it
// all happens in a box (test/box), and is gone afterwards.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"grm/test/box"
	"grm/test/install"
	"grm/test/load"
	"grm/test/rig"
)

func main() {
	var d demo
	flag.IntVar(&d.flows, "flows", 200, "flows at a time")
	flag.DurationVar(&d.pace, "pace", 20*time.Millisecond, "mean time between two datagrams of a flow")
	flag.IntVar(&d.restarts, "restarts", 5, "restarts under load")
	flag.DurationVar(&d.gap, "gap", 2*time.Second, "time between two restarts")
	flag.Uint64Var(&d.seed, "seed", 1, "seed of the load")
	flag.Parse()
	d.out = os.Stdout
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

type demo struct {
	flows    int
	pace     time.Duration
	restarts int
	gap      time.Duration
	seed     uint64
	out      io.Writer
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

func (d *demo) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root: it boots a systemd in namespaces (sudo make demo)")
	}
	bin, err := os.MkdirTemp("", "grm-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	d.say("building grm and the example server …")
	if err := install.All(ctx, bin); err != nil {
		return err
	}
	begin := time.Now()
	r, err := rig.New(ctx, bin, box.Options{Journal: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Stop()) }()
	version, err := r.Systemctl("--version")
	if err != nil {
		return err
	}
	version, _, _ = strings.Cut(version, "\n")
	d.say("booted a private %s in %v", version, time.Since(begin).Round(10*time.Millisecond))

	toml, err := rig.Example("echo", `address = "udp://0.0.0.0:5201"`, "address = \"udp://0.0.0.0:5201\"\nsockets = 4")
	if err != nil {
		return err
	}
	with, err := d.with(ctx, r, toml)
	if err != nil {
		return fmt.Errorf("with grm: %w", err)
	}
	without, err := d.without(ctx, r, toml)
	if err != nil {
		return fmt.Errorf("without grm: %w", err)
	}
	d.summary(with, without)
	if with.Lost != 0 || with.Moved != 0 {
		return fmt.Errorf("with grm %d datagrams were lost and %d flows moved; both must be 0\n%v", with.Lost, with.Moved, with.Result)
	}
	return with.Err()
}

// outcome is what one half of the demo came to.
type outcome struct {
	load.Result
	took       []time.Duration // each restart under load
	idle       []time.Duration // each restart without load
	activation []time.Duration // grm-activate, in the idle restarts
}

func (d *demo) with(ctx context.Context, r *rig.Rig, toml string) (outcome, error) {
	s, err := r.Install(toml)
	if err != nil {
		return outcome{}, err
	}
	d.say("\n%s, made by grm-unitgen, runs %s as user %s, %v sockets", s.Unit, filepath.Base(s.Exec[0]), s.User, s.Listen[0].Sockets)
	return d.drive(ctx, s, s.Activation)
}

func (d *demo) without(ctx context.Context, r *rig.Rig, toml string) (outcome, error) {
	s, err := r.InstallControl(toml, "-listen", "0.0.0.0:5201")
	if err != nil {
		return outcome{}, err
	}
	d.say("\nthe control: the same %s without grm, whose server binds for itself", s.Unit)
	return d.drive(ctx, s, nil)
}

// drive restarts a service under load, then without.
func (d *demo) drive(ctx context.Context, s *rig.Service, activation func() (time.Duration, error)) (o outcome, err error) {
	if err := s.Start(); err != nil {
		return o, err
	}
	g, err := s.Load(ctx, load.Options{Flows: d.flows, Pace: d.pace, Length: 500, Seed: d.seed})
	if err != nil {
		return o, err
	}
	d.say("%d flows, a datagram each %v:", d.flows, d.pace)
	for i := range d.restarts {
		if err := pause(ctx, d.gap); err != nil {
			return o, err
		}
		g.Mark(during(i))
		took, err := s.Restart()
		if err != nil {
			_, _ = g.Stop() // the restart's error is the one to tell
			return o, err
		}
		o.took = append(o.took, took)
		d.say("  systemctl restart %d of %d: %v", i+1, d.restarts, ms(took))
		if err := pause(ctx, time.Second); err != nil {
			return o, err
		}
		g.Mark(after(i))
	}
	if err := pause(ctx, d.gap); err != nil {
		return o, err
	}
	if o.Result, err = g.Stop(); err != nil {
		return o, err
	}
	d.table(o)
	for range d.restarts {
		took, err := s.Restart()
		if err != nil {
			return o, err
		}
		o.idle = append(o.idle, took)
		if activation != nil {
			took, err := activation()
			if err != nil {
				return o, err
			}
			o.activation = append(o.activation, took)
		}
	}
	return o, s.Stop()
}

// The account has two windows for each restart: until a second after it returned, and from there to the next one.
func during(i int) string { return fmt.Sprintf("restart %d", i+1) }
func after(i int) string  { return fmt.Sprintf("after restart %d", i+1) }

func (d *demo) table(o outcome) {
	const row = "  %-10v %10v %10v %8v %8v %10v %10v"
	d.say("\n"+row, "restart", "sent", "answered", "lost", "moved", "took", "worst")
	var longest time.Duration
	for i, took := range o.took {
		a, _ := o.Window(during(i))
		b, _ := o.Window(after(i))
		d.say(row, i+1, a.Sent+b.Sent, a.Answered+b.Answered, a.Lost+b.Lost, a.Moved+b.Moved, ms(took), ms(a.Worst))
		longest = max(longest, took)
	}
	var worst time.Duration
	for _, w := range o.Windows {
		worst = max(worst, w.Worst)
	}
	d.say(row, "in total", o.Sent, o.Answered, o.Lost, o.Moved, ms(longest), ms(worst))
	d.say("  (%d flows; sent, answered, lost: datagrams; moved: flows; took: systemctl restart; worst: the slowest answer around it)", o.Flows)
}

func (d *demo) summary(with, without outcome) {
	d.say("\n%-44s %12s %12s", "", "with grm", "without")
	d.say("%-44s %12d %12d", "datagrams lost", with.Lost, without.Lost)
	d.say("%-44s %12d %12d", "flows moved to another instance", with.Moved, without.Moved)
	d.say("%-44s %12s %12s", "systemctl restart under load, median", ms(median(with.took)), ms(median(without.took)))
	d.say("%-44s %12s %12s", "systemctl restart without load, median", ms(median(with.idle)), ms(median(without.idle)))
	d.say("%-44s %12s %12s", "of that grm-activate, warm, 4 sockets, median", ms(median(with.activation)), "-")
}

func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
