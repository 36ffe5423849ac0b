package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"grm/config"
	"grm/unitgen"
)

// generate is the systemd generator: systemd calls it at boot and at each daemon-reload, with directories of its own
// that are empty. A file that is wrong does not keep the others from their units.
func generate(e env, o options) error {
	dir := o.files[0]
	files, err := filepath.Glob(filepath.Join(e.configDir, "*.toml"))
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		errs = append(errs, generateOne(e, dir, file, o.Options))
	}
	return errors.Join(errs...)
}

func generateOne(e env, dir, file string, o unitgen.Options) error {
	u, s, err := renderFile(file, o)
	if err != nil {
		return err
	}
	// A unit in /etc comes first for systemd, and whether it is enabled is its own matter.
	if _, err := os.Lstat(filepath.Join(e.unitDir, u.Name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, u.Name)); err == nil {
		return fmt.Errorf("%s: the name %q is that of another file too (choose another)", file, s.Name)
	}
	if _, err := unitgen.Install(dir, []unitgen.Unit{u}); err != nil {
		return err
	}
	return enable(dir, u.Name, s.Systemd.Install)
}

// enable makes the links that systemctl enable would make: [Install] means nothing in a generator's unit.
func enable(dir, unit string, install config.Directives) error {
	for key, suffix := range map[string]string{"WantedBy": ".wants", "RequiredBy": ".requires"} {
		for target := range strings.FieldsSeq(strings.Join(install[key], " ")) {
			if filepath.Base(target) != target || strings.Contains(target, "%") {
				return fmt.Errorf("%s: %s=%s is not a unit's name (write one such as multi-user.target)", unit, key, target)
			}
			links := filepath.Join(dir, target+suffix)
			if err := os.MkdirAll(links, 0o755); err != nil {
				return err
			}
			if err := os.Symlink(filepath.Join("..", unit), filepath.Join(links, unit)); err != nil {
				return err
			}
		}
	}
	return nil
}
