package stories

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"grm/test/install"
	"grm/test/rig"
)

func example(t *testing.T, name string, oldnew ...string) string {
	t.Helper()
	text, err := rig.Example(name, oldnew...)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// copyDir copies a directory of programs.
func copyDir(from, to string) error {
	if err := os.Chmod(to, 0o755); err != nil {
		return err
	}
	return os.CopyFS(to, os.DirFS(from))
}

// otherBuild replaces the commands in a directory by another build of them, as a package's upgrade does: by renames, while the old ones run.
func otherBuild(ctx context.Context, dir string) error {
	fresh, err := os.MkdirTemp(dir, "upgrade-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(fresh)
	if err := install.Build(ctx, fresh, "./cmd/..."); err != nil {
		return err
	}
	names, err := os.ReadDir(fresh)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Rename(filepath.Join(fresh, name.Name()), filepath.Join(dir, name.Name())); err != nil {
			return err
		}
	}
	return nil
}
