// Package vm runs static programs as root on other kernels than the machine's
// own: Debian's, under qemu's software emulation, in an initramfs that holds
// nothing else. It needs no privilege, no KVM, no disk and no network.
package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Command is one program to run in the machine.
type Command struct {
	Args []string // the program's path in the machine, and its arguments
	Dir  string   // its working directory, made if it is not there
	Env  []string
}

// What init writes on the console at the beginning of a line.
const (
	ExitMark = "##grm-exit " // "##grm-exit INDEX STATUS": a command has ended
	FailMark = "##grm-fail " // "##grm-fail WHY": init itself gave up
)

// Machine is what to run, and on which kernel.
type Machine struct {
	Kernel   string            // a vmlinuz
	Init     string            // the program of test/vm/init
	Files    map[string]string // path in the machine, without the leading slash → file or directory here
	Commands []Command
}

// Result is what became of a run.
type Result struct {
	Console  string
	Statuses []int // exit statuses of the commands that ended, in their order
}

// Run boots the machine, lets it run its commands, and waits until it is off.
// It fails if not all commands ended; the console is returned in any case.
// The machine ends with ctx.
func (m Machine) Run(ctx context.Context) (Result, error) {
	dir, err := os.MkdirTemp("", "grm-vm-")
	if err != nil {
		return Result{}, err
	}
	defer os.RemoveAll(dir)
	initramfs := filepath.Join(dir, "initramfs")
	if err := m.pack(initramfs); err != nil {
		return Result{}, fmt.Errorf("build initramfs: %w", err)
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1G",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", m.Kernel, "-initrd", initramfs,
		// Mitigations cost time and protect nothing here; a clock that an
		// emulated machine's irregular time makes "unstable" would be reported
		// in the middle of a line of output.
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off tsc=reliable rcupdate.rcu_expedited=1")
	var console bytes.Buffer
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	if errors.Is(err, exec.ErrNotFound) {
		return Result{}, fmt.Errorf("%w (apt-get install qemu-system-x86)", err)
	}
	result := Result{Console: strings.ReplaceAll(console.String(), "\r", "")}
	statuses, failure := result.parse()
	result.Statuses = statuses
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("machine was still running: %w", context.Cause(ctx))
	case err != nil:
		err = fmt.Errorf("qemu: %w", err)
	case failure != "":
		err = errors.New("init: " + failure)
	case len(statuses) != len(m.Commands):
		err = fmt.Errorf("machine went off after %d of %d commands", len(statuses), len(m.Commands))
	}
	return result, err
}

// parse finds init's marks on the console.
func (r Result) parse() (statuses []int, failure string) {
	lines := bufio.NewScanner(strings.NewReader(r.Console))
	lines.Buffer(nil, len(r.Console)+1)
	for lines.Scan() {
		// A program may have left its last line unfinished.
		if _, text, found := strings.Cut(lines.Text(), ExitMark); found {
			_, status, _ := strings.Cut(text, " ")
			if n, err := strconv.Atoi(status); err == nil {
				statuses = append(statuses, n)
			}
		}
		if _, text, found := strings.Cut(lines.Text(), FailMark); found {
			failure = text
		}
	}
	return statuses, failure
}

// output is what command i wrote (and, for the first one, what came before it).
func (r Result) output(i int) string {
	text := r.Console
	for range i {
		_, text, _ = strings.Cut(text, ExitMark)
		_, text, _ = strings.Cut(text, "\n")
	}
	text, _, _ = strings.Cut(text, ExitMark)
	return text
}

func (m Machine) pack(file string) error {
	plan, err := json.Marshal(m.Commands)
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	buffered := bufio.NewWriterSize(out, 1<<20)
	a := newArchive(buffered)
	a.console()
	a.copyFile("init", m.Init)
	text := func(name, content string) {
		a.file(name, 0o644, int64(len(content)), strings.NewReader(content))
	}
	text("plan.json", string(plan))
	text("etc/passwd", "root:x:0:0::/:\ndaemon:x:1:1::/:\nnobody:x:65534:65534::/:\n")
	text("etc/group", "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n")
	text("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")
	names := make([]string, 0, len(m.Files))
	for name := range m.Files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		info, err := os.Stat(m.Files[name])
		switch {
		case err != nil:
			a.fail(err)
		case info.IsDir():
			a.copyTree(path.Clean(name), m.Files[name])
		default:
			a.copyFile(path.Clean(name), m.Files[name])
		}
	}
	return errors.Join(a.close(), buffered.Flush(), out.Close())
}
