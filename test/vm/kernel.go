package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Series is a line of kernels, of which Image takes the newest.
type Series struct {
	Name  string // names the series in the cache: "6.1"
	Suite string // Debian's suite that has it
	match *regexp.Regexp
}

// The cloud flavour has no drivers, and is a tenth of the size. From 7.0 on,
// linux-binary has the image and linux-image only the signed loader's.
var packageName = regexp.MustCompile(`^linux-(image|binary)-([0-9.]+(?:-[0-9]+)?(?:\+[a-z0-9]+)?)-cloud-amd64$`)

// Kernels are what the tests run on: the oldest one that grm supports, the one
// of the current Debian, and the newest that Debian has built.
var Kernels = []Series{
	{"6.1", "bookworm", regexp.MustCompile(`^6\.1\.`)},
	{"6.12", "trixie", regexp.MustCompile(`^6\.12\.`)},
	{"newest", "trixie-backports", regexp.MustCompile(`.`)},
}

// Image is a bootable kernel.
type Image struct {
	Path    string // of the vmlinuz
	Release string // as the package is named: 6.12.117+deb13
}

// Image is the newest kernel of the series: from the cache if it is there,
// else downloaded into it from the machine's own Debian mirror. Nothing of the
// machine's package state is touched. To look for a newer kernel, delete the
// series' directory.
func (s Series) Image(ctx context.Context) (Image, error) {
	dir, err := cacheDir()
	if err != nil {
		return Image{}, err
	}
	final := filepath.Join(dir, s.Name)
	image, err := cached(final)
	if !errors.Is(err, fs.ErrNotExist) {
		return image, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Image{}, err
	}
	building, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(building)
	if err := s.download(ctx, building); err != nil {
		return Image{}, fmt.Errorf("kernel %s from Debian %s: %w", s.Name, s.Suite, err)
	}
	// Whoever renames first wins; the others use theirs.
	if err := os.Rename(building, final); err != nil && !errors.Is(err, fs.ErrExist) {
		return Image{}, err
	}
	return cached(final)
}

func cacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("cache for kernels: %w (set HOME or XDG_CACHE_HOME)", err)
	}
	return filepath.Join(dir, "grm", "kernels"), nil
}

func cached(dir string) (Image, error) {
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	if err != nil {
		return Image{}, err
	}
	image := Image{Path: filepath.Join(dir, "vmlinuz"), Release: strings.TrimSpace(string(release))}
	if _, err := os.Stat(image.Path); err != nil {
		return Image{}, fmt.Errorf("cached kernel %s has no image: %v (delete %s)", image.Release, err, dir)
	}
	return image, nil
}

// download leaves vmlinuz and release in dir.
func (s Series) download(ctx context.Context, dir string) error {
	apt, err := newApt(ctx, s.Suite)
	if err != nil {
		return err
	}
	defer apt.close()
	names, err := apt.run(ctx, "apt-cache", "pkgnames", "linux-")
	if err != nil {
		return err
	}
	name, release := s.newest(strings.Fields(string(names)))
	if name == "" {
		return fmt.Errorf("no package named like %s", packageName)
	}
	if _, err := apt.run(ctx, "apt-get", "download", name); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(apt.dir, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages", name, len(debs))
	}
	tree := filepath.Join(apt.dir, "tree")
	if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", debs[0], tree).CombinedOutput(); err != nil {
		return fmt.Errorf("unpack %s: %w: %s", debs[0], err, out)
	}
	images, err := findImages(tree)
	if err != nil || len(images) != 1 {
		return fmt.Errorf("package %s has %d kernel images, want 1", name, len(images))
	}
	if err := copyFile(images[0], filepath.Join(dir, "vmlinuz")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "release"), []byte(release+"\n"), 0o644)
}

// newest picks the package of the newest kernel of the series.
func (s Series) newest(names []string) (name, release string) {
	var kind string
	for _, n := range names {
		m := packageName.FindStringSubmatch(n)
		if m == nil || !s.match.MatchString(m[2]) {
			continue
		}
		switch order := slices.Compare(numbers(m[2]), numbers(release)); {
		case order > 0, order == 0 && m[1] < kind: // "binary" before "image"
			name, kind, release = n, m[1], m[2]
		}
	}
	return name, release
}

// numbers are the numbers in a release, in their order.
func numbers(release string) []int {
	var ns []int
	for _, digits := range regexp.MustCompile(`[0-9]+`).FindAllString(release, -1) {
		n, err := strconv.Atoi(digits)
		if err != nil {
			n = 0 // longer than an int: no kernel's number
		}
		ns = append(ns, n)
	}
	return ns
}

func findImages(tree string) ([]string, error) {
	var images []string
	err := filepath.WalkDir(tree, func(p string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && strings.HasPrefix(entry.Name(), "vmlinuz") {
			images = append(images, p)
		}
		return err
	})
	return images, err
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o644)
}

// apt is a package index of its own: it knows one suite of Debian, whatever
// the machine is configured for, and takes nothing but the mirror from that.
type apt struct {
	dir     string
	options []string
}

func newApt(ctx context.Context, suite string) (*apt, error) {
	mirror, err := mirror(ctx)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "grm-apt-")
	if err != nil {
		return nil, err
	}
	a := &apt{dir: dir}
	for _, sub := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			a.close()
			return nil, err
		}
	}
	source := fmt.Sprintf("deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror, suite)
	if err := os.WriteFile(filepath.Join(dir, "sources.list"), []byte(source), 0o644); err != nil {
		a.close()
		return nil, err
	}
	for _, option := range []string{
		"Dir::Etc::sourcelist=" + filepath.Join(dir, "sources.list"),
		"Dir::Etc::sourceparts=-",
		"Dir::State::lists=" + filepath.Join(dir, "lists"),
		"Dir::Cache=" + dir,
		"Dir::Cache::archives=archives",
		"APT::Architecture=amd64",
		"APT::Sandbox::User=", // the directory is ours alone
		"Acquire::Languages=none",
		"Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
	} {
		a.options = append(a.options, "-o", option)
	}
	if _, err := a.run(ctx, "apt-get", "-q", "update", "--error-on=any"); err != nil {
		a.close()
		return nil, err
	}
	return a, nil
}

// mirror is the address of Debian's archive that the machine is configured
// with: of the suites that it has from there, the one without an extension in
// its name ("bookworm", not "bookworm-security").
func mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)",
		"Created-By: Packages", "Origin: Debian").Output()
	if err != nil {
		return "", fmt.Errorf("list the machine's package sources: %w (the kernels come from Debian's archive)", err)
	}
	for line := range bytes.Lines(out) {
		if release, address, _ := strings.Cut(strings.TrimSpace(string(line)), " "); !strings.Contains(release, "-") && address != "" {
			return address, nil
		}
	}
	return "", errors.New("no package source of this machine is Debian's archive (apt-get update?)")
}

func (a *apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), args...)...)
	var complaint bytes.Buffer
	cmd.Dir, cmd.Stderr = a.dir, &complaint
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s%s", name, strings.Join(args, " "), err, complaint.Bytes(), out)
	}
	return out, nil
}

func (a *apt) close() { _ = os.RemoveAll(a.dir) } // a temporary directory: what is left is the machine's to clean
