// Command bench measures grm and prints it as ratios, all from one run on one
// machine: against the kernel's own choice, against programs that do nothing,
// and against udpgrm if UDPGRM_DIR names a directory with its built binaries.
//
//	go run ./test/bench [-plots DIR] [-short] [-run REGEXP]
//
// It needs root. It works in network and mount namespaces and in a cgroup of
// its own, so that nothing of it is left when it ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"grm/bpfprog"
)

// insideVariable says that this process runs in the benchmark's namespaces.
const insideVariable = "GRM_BENCH_INSIDE"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if os.Getenv(insideVariable) == "" {
		err = outside(ctx)
	} else {
		err = inside(ctx, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// outside runs this program again in namespaces of its own.
func outside(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGTERM,
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	err := cmd.Run()
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("%w (run it as root)", err)
	}
	return err
}

// bench is one run.
type bench struct {
	room
	*traffic
	ctx    context.Context
	udpgrm *udpgrm // or nil
	plots  string  // directory for them, or ""
	short  bool
	table  [][]string
}

// section is a part of the report.
type section struct {
	name string
	run  func(*bench) error
}

var sections = []section{
	{"programs", (*bench).programs},
	{"echo", (*bench).endToEnd},
	{"memory", (*bench).memory},
	{"sockets", (*bench).socketCurve},
	{"generations", (*bench).generationCurve},
	{"flows", (*bench).flowCurve},
	{"groups", (*bench).groupCurve},
	{"services", (*bench).services},
}

func inside(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	plots := flags.String("plots", "", "write the curves as SVG into `DIR`")
	short := flags.Bool("short", false, "fewer rounds and smaller tables: does it run at all?")
	only := flags.String("run", ".", "only the sections that match `REGEXP`: programs echo memory sockets generations flows groups services")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	cgroup, err := prepare()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, leave(cgroup)) }()
	stats, err := enableStats()
	if err != nil {
		return err
	}
	defer unix.Close(stats)
	t, err := newTraffic()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	b := &bench{
		room: room{cgroup: cgroup, port: 1024}, traffic: t, ctx: ctx, plots: *plots, short: *short,
	}
	fmt.Printf("%s, %s, %d CPUs\n", strings.Join(append([]string{"bench"}, args...), " "), kernel(), runtime.NumCPU())
	for _, s := range sections {
		if !chosen.MatchString(s.name) {
			continue
		}
		if err := b.do(s); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// do runs one section, with an udpgrm of its own if there is one: its table is
// that of all groups, and its daemon does not survive all sections.
func (b *bench) do(s section) (err error) {
	defer b.flush()
	if dir := os.Getenv("UDPGRM_DIR"); dir != "" {
		if b.udpgrm, err = startUdpgrm(b.ctx, &b.room, dir); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, b.udpgrm.stop()) }()
	}
	return s.run(b)
}

func kernel() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "unknown kernel"
	}
	return "Linux " + unix.ByteSliceToString(name.Release[:])
}

// prepare furnishes the namespaces, and returns the benchmark's cgroup.
func prepare() (string, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return "", fmt.Errorf("keep mounts to ourselves: %w", err)
	}
	if err := unix.Mount("bpf", filepath.Dir(bpfprog.Root), "bpf", 0, "mode=0700"); err != nil {
		return "", fmt.Errorf("mount a bpffs: %w", err)
	}
	if err := loopback(); err != nil {
		return "", err
	}
	root, err := unifiedHierarchy()
	if err != nil {
		return "", err
	}
	return os.MkdirTemp(root, "grm-bench-")
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("bring lo up", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request))
}

// unifiedHierarchy is where the cgroup2 file system is mounted.
func unifiedHierarchy() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("no cgroup2 file system is mounted (mount -t cgroup2 none /sys/fs/cgroup/unified)")
}

// leave moves the process out of the benchmark's cgroups and removes them.
func leave(cgroup string) error {
	if err := join(filepath.Dir(cgroup)); err != nil {
		return fmt.Errorf("leave cgroup: %w", err)
	}
	below, err := os.ReadDir(cgroup)
	for _, entry := range below {
		if entry.IsDir() {
			err = errors.Join(err, os.Remove(filepath.Join(cgroup, entry.Name())))
		}
	}
	return errors.Join(err, os.Remove(cgroup))
}

// title prints the table before, and begins one.
func (b *bench) title(format string, args ...any) {
	b.flush()
	fmt.Printf("\n"+format+"\n", args...)
}

// row adds a line to the table.
func (b *bench) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, c := range cells {
		texts[i] = fmt.Sprint(c)
		if f, ok := c.(float64); ok {
			texts[i] = fmt.Sprintf("%.0f", f)
		}
	}
	b.table = append(b.table, texts)
}

// flush prints the table: names to the left, numbers to the right.
func (b *bench) flush() {
	var widths []int
	for _, row := range b.table {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range b.table {
		for i, cell := range row {
			if i == 0 {
				fmt.Printf("%-*s", widths[i], cell)
			} else {
				fmt.Printf("  %*s", widths[i], cell)
			}
		}
		fmt.Println()
	}
	b.table = nil
}

// draw writes a curve's plot, if plots are wanted.
func (b *bench) draw(file string, p plot) (err error) {
	if b.plots == "" {
		return nil
	}
	if err := os.MkdirAll(b.plots, 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(b.plots, file))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return p.write(f)
}
