// Testreport reads what "go test -json" writes and tells it briefly: go test's
// own closing line of each package, the closing line of each test that took a
// while, and all that a failed test or build said. As root, where everything
// can run, a skipped test is a failure.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// slow is from how many seconds on a test is worth a line of its own.
const slow = 5

func main() {
	failed, err := report(os.Stdin, os.Stdout, os.Geteuid() == 0)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "testreport:", err)
	if tests := alone(failed); len(os.Args) > 1 && len(tests) > 0 {
		if err := os.WriteFile(os.Args[1], []byte(strings.Join(tests, "\n")+"\n"), 0o644); err != nil {
			fmt.Fprintln(os.Stderr, "testreport:", err)
		}
	}
	os.Exit(1)
}

// alone are those of what failed that are tests of their own, if they explain
// all of it: a package fails with its tests.
func alone(failed []string) []string {
	var tests []string
	for _, f := range failed {
		pkg, test, isTest := strings.Cut(f, " ")
		explained := slices.ContainsFunc(failed, func(other string) bool { return strings.HasPrefix(other, pkg+" Test") })
		switch {
		case !explained:
			return nil
		case isTest && !strings.Contains(test, "/"):
			tests = append(tests, f)
		}
	}
	return tests
}

// event is one line of go test -json (go doc test2json); what a build says
// comes with ImportPath in place of Package.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

// report copies the essence of in to out. It returns what has failed, and an
// error if anything has.
func report(in io.Reader, out io.Writer, strict bool) ([]string, error) {
	said := map[string][]string{} // by package and test, what it has said so far
	var failed, skipped []string
	packages := 0
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil { // go itself, before it knew any package
				_, _ = out.Write(line)
				continue
			}
			key := e.Package + e.ImportPath + " " + e.Test
			switch e.Action {
			case "output", "build-output":
				if e.Test == "" && closing(e.Output) {
					fmt.Fprint(out, e.Output)
				} else {
					said[key] = append(said[key], e.Output)
				}
			case "build-fail":
				fmt.Fprint(out, strings.Join(said[key], ""))
				failed = append(failed, e.ImportPath+" (does not build)")
			case "pass":
				if e.Test == "" {
					packages++
				} else if e.Elapsed >= slow && !strings.Contains(e.Test, "/") {
					fmt.Fprintf(out, "    --- PASS: %s (%.1fs)\n", e.Test, e.Elapsed)
				}
				delete(said, key)
			case "fail":
				if e.Test == "" {
					packages++
				}
				fmt.Fprint(out, strings.Join(said[key], ""))
				failed = append(failed, strings.TrimSpace(key))
				delete(said, key)
			case "skip":
				if e.Test == "" { // no test files
					packages++
					break
				}
				if strict {
					fmt.Fprint(out, strings.Join(said[key], ""))
				}
				skipped = append(skipped, key)
				delete(said, key)
			}
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	switch {
	case len(failed) > 0:
		slices.Sort(failed)
		failed = slices.Compact(failed)
		return failed, fmt.Errorf("failed: %s", strings.Join(failed, ", "))
	case packages == 0:
		return nil, fmt.Errorf("no package was tested")
	case strict && len(skipped) > 0:
		return nil, fmt.Errorf("skipped, although run as root: %s", strings.Join(skipped, ", "))
	case len(skipped) > 0:
		fmt.Fprintf(out, "skipped, as they need root: %d\n", len(skipped))
	}
	return nil, nil
}

// closing says whether line is what go test ends a package with.
func closing(line string) bool {
	return strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "FAIL\t") || strings.HasPrefix(line, "?   \t")
}
