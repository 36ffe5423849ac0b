package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"grm/test/box"
	"grm/test/install"
	"grm/test/rig"
)

// services measures what an operator sees, in a private systemd: how long a
// restart takes, with and without grm, and how much memory the processes need.
func (b *bench) services() (err error) {
	bin, err := os.MkdirTemp("", "grm-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(bin)) }()
	if err := install.All(b.ctx, bin); err != nil {
		return err
	}
	r, err := rig.New(b.ctx, bin, box.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Stop()) }()

	text, err := rig.Example("echo", `time = "2s"`, `time = "0s"`)
	if err != nil {
		return err
	}
	with, err := r.Install(text)
	if err != nil {
		return err
	}
	text, err = rig.Example("echo", `name = "echo"`, `name = "plain"`)
	if err != nil {
		return err
	}
	without, err := r.InstallPlain(text, "-listen", "0.0.0.0:5202")
	if err != nil {
		return err
	}

	rounds := 15
	if b.short {
		rounds = 2
	}
	var cold, warm, restart, plainRestart []float64
	for range rounds {
		if err := with.Start(); err != nil {
			return err
		}
		if cold, err = record(cold, with.Activation); err != nil {
			return err
		}
		if err := with.Stop(); err != nil {
			return err
		}
	}
	if err := errors.Join(with.Start(), without.Start()); err != nil {
		return err
	}
	for range rounds {
		if restart, err = record(restart, with.Restart); err != nil {
			return err
		}
		if warm, err = record(warm, with.Activation); err != nil {
			return err
		}
		if plainRestart, err = record(plainRestart, without.Restart); err != nil {
			return err
		}
	}
	// Looking out for a process takes a CPU: not while something is timed.
	peak := watchPeak("grm-activate")
	for range 5 {
		if _, err = with.Restart(); err != nil {
			break
		}
	}
	activate := peak()
	if err != nil {
		return err
	}

	b.title("Services in a private systemd: ms, median of %d (least, most)", rounds)
	b.row("", "ms", "least", "most")
	spread := func(name string, ms []float64) {
		b.row(name, fmt.Sprintf("%.1f", median(ms)), fmt.Sprintf("%.1f", quantile(ms, 0)), fmt.Sprintf("%.1f", quantile(ms, 1)))
	}
	spread("grm-activate, cold: nothing is pinned", cold)
	spread("grm-activate, warm: a restart", warm)
	spread("systemctl restart with grm", restart)
	spread("systemctl restart without", plainRestart)

	processes, err := with.Processes()
	if err != nil {
		return err
	}
	if processes.Decoy == nil || len(processes.Keepers) == 0 || len(processes.Servers) == 0 {
		return fmt.Errorf("%s runs %+v: no decoy, keeper or server", with.Unit, processes)
	}
	b.title("Resident memory, KiB")
	b.row("", "all", "of it not shared with a file")
	for _, p := range []struct {
		name string
		pid  int
	}{
		{"decoy", processes.Decoy.Pid},
		{"keeper", processes.Keepers[len(processes.Keepers)-1].Pid},
		{"the echo server itself", processes.Servers[len(processes.Servers)-1].Pid},
	} {
		status, err := processStatus(p.pid)
		if err != nil {
			return err
		}
		b.row(p.name, status["VmRSS"], status["RssAnon"])
	}
	b.row("grm-activate, at its peak", activate["VmHWM"], activate["RssAnon"])
	return nil
}

// record appends what a measurement took, in ms.
func record(to []float64, measure func() (time.Duration, error)) ([]float64, error) {
	took, err := measure()
	return append(to, float64(took.Microseconds())/1000), err
}

// processStatus reads the numbers in /proc/PID/status.
func processStatus(pid int) (map[string]float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	status := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		if fields := strings.Fields(value); len(fields) > 0 {
			if n, err := strconv.ParseFloat(fields[0], 64); err == nil {
				status[key] = n
			}
		}
	}
	return status, nil
}

// watchPeak looks out for short-lived processes of that name until the
// function that it returns is called, which returns the largest numbers that
// their status ever showed. wait4(2) would tell a parent's memory instead,
// which a child shares until it has become another program.
func watchPeak(name string) func() map[string]float64 {
	largest := map[string]float64{}
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			all, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
			seen := false
			for _, dir := range all {
				comm, err := os.ReadFile(dir + "/comm")
				if err != nil || strings.TrimSpace(string(comm)) != name {
					continue
				}
				seen = true
				pid, err := strconv.Atoi(filepath.Base(dir))
				if err != nil {
					continue
				}
				for {
					status, err := processStatus(pid)
					if err != nil || status["VmHWM"] == 0 {
						break // it has ended
					}
					for key, value := range status {
						largest[key] = max(largest[key], value)
					}
				}
			}
			if !seen {
				time.Sleep(200 * time.Microsecond)
			}
		}
	}()
	return func() map[string]float64 {
		stop.Store(true)
		<-done
		return largest
	}
}
