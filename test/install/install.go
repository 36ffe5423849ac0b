// Package install builds grm and its examples into a directory, laid out as /usr/lib/grm is in a box: the commands at the top, the examples'
// servers and files in "examples".
package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Root is the root of the source tree, found from the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if mod, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && bytes.HasPrefix(mod, []byte("module grm\n")) {
			return dir, nil
		}
		if dir == "/" {
			return "", errors.New("find the source tree: not below it (run from within a checkout)")
		}
	}
}

// goCommand finds the go command, also where sudo's PATH lacks it.
func goCommand() (string, error) {
	for _, name := range []string{os.Getenv("GO"), "go", "/usr/local/go/bin/go"} {
		if name == "" {
			continue
		}
		if found, err := exec.LookPath(name); err == nil {
			return found, nil
		}
	}
	return "", errors.New("find the go command: not in PATH nor in /usr/local/go/bin (set GO=/path/to/go)")
}

// Build builds the packages of the source tree that are given, such as "./cmd/...", into dir.
func Build(ctx context.Context, dir string, packages ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	command, err := goCommand()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, command, append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir + "/"}, packages...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(packages, " "), err, out)
	}
	return nil
}

// All builds everything, and copies the examples' files that are no Go. Every user may read and run what is in dir afterwards.
func All(ctx context.Context, dir string) error {
	examples := filepath.Join(dir, "examples")
	if err := errors.Join(Build(ctx, dir, "./cmd/..."), Build(ctx, examples, "./examples/...")); err != nil {
		return err
	}
	root, err := Root()
	if err != nil {
		return err
	}
	for _, name := range []string{"echo-python/echo.py", "unbound/unbound.conf"} {
		data, err := os.ReadFile(filepath.Join(root, "examples", name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(examples, filepath.Base(name)), data, 0o755); err != nil {
			return err
		}
	}
	return readable(dir)
}

// readable opens dir to everybody, whatever the umask: services run as users of their own.
func readable(dir string) error {
	return filepath.WalkDir(dir, func(name string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chmod(name, 0o755))
	})
}
