// Package docs checks that the documents tell the truth: commands, flags,
// files, links and tests that they name exist, and their samples are accepted.
package docs

import (
	"bytes"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"grm/activate"
	"grm/bpfprog"
	"grm/config"
)

var commands = []string{"grm", "grm-activate", "grm-decoy", "grm-unitgen"}

// documents are all Markdown files, by path from the root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	docs := map[string]string{}
	sources(t, regexp.MustCompile(`\.md$`), func(path string, text []byte) { docs[path] = string(text) })
	return docs
}

var fence = regexp.MustCompile("(?ms)^```([a-z]*)[^\n]*\n(.*?)^```")

// blocks are the code blocks of a document in one language; "" is any.
func blocks(text, language string) []string {
	var all []string
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		if language == "" || m[1] == language {
			all = append(all, m[2])
		}
	}
	return all
}

var span = regexp.MustCompile("`([^`\n]+)`")

// code is everything in a document that is meant to be taken literally.
func code(text string) []string {
	all := blocks(text, "")
	for _, m := range span.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		all = append(all, m[1])
	}
	return all
}

func TestMakeTargetsExist(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	call := regexp.MustCompile(`(?m)(?:^|\$ |sudo |&& )make ([a-z][a-z-]*)`)
	for path, text := range documents(t) {
		for _, c := range code(text) {
			for _, m := range call.FindAllStringSubmatch(c, -1) {
				if !regexp.MustCompile(`(?m)^[a-z -]*\b` + m[1] + `\b[a-z -]*:`).Match(makefile) {
					t.Errorf("%s: the Makefile has no target %s", path, m[1])
				}
			}
		}
	}
}

// base makes a whole file of a sample that shows a part of one.
const base = "name = \"sample\"\nexec = [\"/usr/bin/sample\"]\nuser = \"sample\"\n"

func TestSamplesAreAccepted(t *testing.T) {
	n := 0
	for path, text := range documents(t) {
		for _, sample := range blocks(text, "toml") {
			n++
			whole := sample
			if !strings.Contains(whole, "exec = [\"/") {
				whole = base + whole
			}
			if !strings.Contains(whole, "[[listen]]") {
				whole += "\n[[listen]]\naddress = \"udp://0.0.0.0:5201\"\n"
			}
			if _, err := config.Parse("sample.toml", []byte(whole)); err != nil {
				t.Errorf("%s: a sample is refused: %v\n%s", path, err, sample)
			}
		}
	}
	if n == 0 {
		t.Error("the documents have no sample")
	}
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)`)

func TestLinksResolve(t *testing.T) {
	docs := documents(t)
	for path, text := range docs {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s: link to %s: %v", path, m[1], err)
				continue
			}
			if anchor != "" && !slices.Contains(anchors(docs[file]), anchor) {
				t.Errorf("%s: link to %s: no such heading, there are %q", path, m[1], anchors(docs[file]))
			}
		}
	}
}

// anchors are the names of a document's headings, as forges make them.
func anchors(text string) []string {
	var all []string
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(fence.ReplaceAllString(text, ""), -1) {
		name := strings.ToLower(regexp.MustCompile(`[^\w\s-]`).ReplaceAllString(m[1], ""))
		all = append(all, strings.ReplaceAll(strings.TrimSpace(name), " ", "-"))
	}
	return all
}

// Files of the repository are named by their path from its root.
func TestNamedFilesExist(t *testing.T) {
	top, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range documents(t) {
		for _, c := range code(text) {
			for word := range strings.FieldsSeq(c) {
				first, _, ok := strings.Cut(word, "/")
				isOurs := slices.ContainsFunc(top, func(e os.DirEntry) bool { return e.IsDir() && e.Name() == first && first != "bin" })
				if !ok || !isOurs || strings.ContainsAny(word, "*<>{}…$\"'():") {
					continue
				}
				if _, err := os.Stat(filepath.Join(root, word)); err != nil {
					t.Errorf("%s: %s: %v", path, word, err)
				}
			}
		}
	}
}

// A document that says what a test shows names a test that exists.
func TestNamedTestsExist(t *testing.T) {
	var have []byte
	sources(t, regexp.MustCompile(`_test\.go$`), func(_ string, text []byte) { have = append(have, text...) })
	name := regexp.MustCompile(`^(Test|Fuzz|Benchmark)[A-Z]\w*$`)
	for path, text := range documents(t) {
		for _, c := range code(text) {
			if name.MatchString(c) && !bytes.Contains(have, []byte("func "+c+"(")) {
				t.Errorf("%s: there is no test %s", path, c)
			}
		}
	}
}

// Each event that can be counted is explained to operators, and no other.
func TestEventsAreExplained(t *testing.T) {
	text := documents(t)["docs/operations.md"]
	table := text[strings.Index(text, "| event |"):]
	table, _, _ = strings.Cut(table, "\n\n")
	explained := map[string]bool{}
	for line := range strings.Lines(table) {
		first, _, _ := strings.Cut(strings.TrimPrefix(line, "|"), "|")
		for _, m := range span.FindAllStringSubmatch(first, -1) {
			explained[m[1]] = true
		}
	}
	for c := range len(bpfprog.Counters{}) {
		name := bpfprog.Counter(c).String()
		if !explained[name] {
			t.Errorf("docs/operations.md does not explain %s", name)
		}
		delete(explained, name)
	}
	for name := range explained {
		t.Errorf("docs/operations.md explains %s, which is not counted", name)
	}
}

// The capabilities that a start checks for are those that the document lists.
func TestCapabilitiesAreListed(t *testing.T) {
	text := documents(t)["docs/architecture.md"]
	for name := range activate.Capabilities {
		if !strings.Contains(text, name) {
			t.Errorf("docs/architecture.md does not say what %s is for", name)
		}
	}
	for _, name := range regexp.MustCompile(`CAP_[A-Z_]+`).FindAllString(text, -1) {
		if _, ok := activate.Capabilities[name]; !ok {
			t.Errorf("docs/architecture.md lists %s, which is not needed", name)
		}
	}
}

// helps builds the commands and asks each for its help; grm's also for each of
// its own commands, as "grm status".
func helps(t *testing.T) map[string]string {
	t.Helper()
	dir := t.TempDir()
	all := map[string]string{}
	for _, c := range commands {
		build := exec.Command(goCommand(), "build", "-o", dir+"/", "./cmd/"+c)
		build.Dir = root
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", c, err, out)
		}
		all[c] = help(t, filepath.Join(dir, c), "--help")
	}
	for _, m := range regexp.MustCompile(`(?m)^  ([a-z]+) `).FindAllStringSubmatch(section(all["grm"], "Commands:"), -1) {
		all["grm "+m[1]] = help(t, filepath.Join(dir, "grm"), m[1], "--help")
	}
	return all
}

// section is a help text's part from a heading to the next empty line.
func section(text, heading string) string {
	_, rest, _ := strings.Cut(text, heading)
	part, _, _ := strings.Cut(rest, "\n\n")
	return part
}

func help(t *testing.T, path string, args ...string) string {
	t.Helper()
	out, err := exec.Command(path, args...).Output()
	if err != nil {
		t.Fatalf("%s %q: %v", path, args, err)
	}
	return string(out)
}

// flag finds flags, but not what only looks like one in a word.
var flag = regexp.MustCompile(`(?:^|[\s\[|=("'` + "`" + `,/])(--?[a-z0-9][a-z0-9-]*)`)

func flags(text string) []string {
	var all []string
	for _, m := range flag.FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// listed are the flags that a help text lists: a line each, before what is said of them.
func listed(help string) []string {
	var all []string
	for line := range strings.Lines(help) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "-") {
			line, _, _ = strings.Cut(line, "  ")
			all = append(all, flags(line)...)
		}
	}
	return all
}

func has(help, f string) bool {
	return slices.Contains(flags(help), f) || f == "--help" || f == "-h"
}

// A command line in a document has only flags that the command has.
func TestFlagsInDocumentsExist(t *testing.T) {
	helps := helps(t)
	call := regexp.MustCompile(`(?m)(?:^|[\s/=+])(grm-activate|grm-decoy|grm-unitgen|grm)((?: +[^\n|&;#]*)?)$`)
	for path, text := range documents(t) {
		for _, c := range code(text) {
			c = strings.ReplaceAll(c, "\\\n", " ")
			for _, m := range call.FindAllStringSubmatch(c, -1) {
				command, args := m[1], strings.Fields(m[2])
				if command == "grm" && len(args) > 0 {
					command += " " + args[0]
					if _, ok := helps[command]; !ok {
						if !strings.HasPrefix(args[0], "-") {
							t.Errorf("%s: grm has no command %s", path, args[0])
						}
						command = "grm"
					}
				}
				for _, a := range args {
					if a == "--" {
						break
					}
					f, _, _ := strings.Cut(a, "=")
					if len(f) > 1 && f[0] == '-' && !has(helps[command], f) {
						t.Errorf("%s: %s has no flag %s", path, command, f)
					}
				}
			}
		}
	}
}

// A manual page has the sections that one looks for, and lists exactly the
// flags that its command's help lists.
func TestManualPages(t *testing.T) {
	helps := helps(t)
	for _, c := range commands {
		text, err := os.ReadFile(filepath.Join(root, "docs/man", c+".8"))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, section := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "EXAMPLES", "SEE ALSO"} {
			if !regexp.MustCompile(`(?m)^\.SH "?` + section + `"?$`).Match(text) {
				t.Errorf("%s.8 has no section %s", c, section)
			}
		}
		plain := strings.ReplaceAll(regexp.MustCompile(`\\f[BIRP]`).ReplaceAllString(string(text), ""), `\-`, "-")
		documented := map[string]bool{}
		for _, m := range regexp.MustCompile(`(?m)^\.(?:B|BR|BI|RB|IB) (.*)$`).FindAllStringSubmatch(plain, -1) {
			for _, f := range flags(m[1]) {
				documented[f] = true
			}
		}
		offered, all := map[string]bool{}, ""
		for name, h := range helps {
			if name == c || (c == "grm" && strings.HasPrefix(name, "grm ")) {
				all += h
				for _, f := range listed(h) {
					offered[f] = true
				}
			}
		}
		for _, ignore := range []string{"--help", "-h", "--"} {
			delete(documented, ignore)
			delete(offered, ignore)
		}
		for f := range documented {
			if !has(all, f) {
				t.Errorf("%s.8 has the flag %s, which the help has not", c, f)
			}
		}
		for _, f := range slices.Sorted(maps.Keys(offered)) {
			if !documented[f] {
				t.Errorf("%s.8 lacks the flag %s", c, f)
			}
		}
	}
}
