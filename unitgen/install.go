package unitgen

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Unit is a unit's file.
type Unit struct {
	Name string // FileName
	Text []byte // what Render wrote
}

// State is how an installed unit compares with what it should be.
type State int

// The states of an installed unit.
const (
	Current State = iota // equal, byte by byte
	Stale                // made by grm-unitgen, from something else or for another systemd
	Missing              // not there
	Changed              // made by grm-unitgen and changed since by someone else
	Other                // not made by grm-unitgen
)

// String says what an operator should know.
func (s State) String() string {
	return [...]string{
		Current: "current",
		Stale:   "stale",
		Missing: "missing",
		Changed: "changed by hand since grm-unitgen wrote it",
		Other:   "not made by grm-unitgen",
	}[s]
}

// Compare tells how a unit in a directory compares with what it should be. Nothing is followed: a symbolic link, which
// systemctl makes of a masked or aliased unit, is not made by grm-unitgen.
func Compare(dir string, u Unit) (State, error) {
	file := filepath.Join(dir, u.Name)
	info, err := os.Lstat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Missing, nil
	case err != nil:
		return Missing, err
	case !info.Mode().IsRegular() || info.Size() > maxUnit:
		return Other, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return Missing, err
	}
	if bytes.Equal(text, u.Text) {
		return Current, nil
	}
	return [...]State{Foreign: Other, Edited: Changed, Ours: Stale}[OriginOf(text)], nil
}

// maxUnit is larger than any unit that Render writes.
const maxUnit = 64 << 20

// Install writes units into a directory: all, or none if one of them would replace what grm-unitgen did not write.
// It returns the state in which each was before. Whoever reads a unit meanwhile sees the old or the new text.
func Install(dir string, units []Unit) ([]State, error) {
	states := make([]State, len(units))
	var refused []error
	for i, u := range units {
		state, err := Compare(dir, u)
		if err == nil && (state == Changed || state == Other) {
			err = fmt.Errorf("%s: %v (move it away, and run grm-unitgen again)", filepath.Join(dir, u.Name), state)
		}
		states[i], refused = state, append(refused, err)
	}
	if err := errors.Join(refused...); err != nil {
		return nil, err
	}
	// All that can fail for want of space comes first; the renames follow at a stretch.
	staged := make([]string, len(units))
	defer func() {
		for _, name := range staged {
			if name != "" {
				_ = os.Remove(name) // the error that brought us here is the one to tell
			}
		}
	}()
	for i, u := range units {
		if states[i] == Current {
			continue
		}
		var err error
		if staged[i], err = stage(dir, u); err != nil {
			return nil, err
		}
	}
	for i, u := range units {
		if staged[i] == "" {
			continue
		}
		if err := os.Rename(staged[i], filepath.Join(dir, u.Name)); err != nil {
			return nil, err
		}
		staged[i] = ""
	}
	if !slices.ContainsFunc(states, func(s State) bool { return s != Current }) {
		return states, nil
	}
	return states, sync(dir)
}

// stage writes a unit under a name that systemd does not look at, and sees to it that it is on the disk.
func stage(dir string, u Unit) (name string, err error) {
	f, err := os.CreateTemp(dir, "."+u.Name+".*")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, bytes.NewReader(u.Text))
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	return f.Name(), errors.Join(err, f.Close())
}

// sync makes renames last.
func sync(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
