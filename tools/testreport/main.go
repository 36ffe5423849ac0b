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
	if err := report(os.Stdin, os.Stdout, os.Geteuid() == 0); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
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

// report copies the essence of in to out. The error says what has failed.
func report(in io.Reader, out io.Writer, strict bool) error {
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
			return err
		}
	}
	switch {
	case len(failed) > 0:
		slices.Sort(failed)
		return fmt.Errorf("failed: %s", strings.Join(slices.Compact(failed), ", "))
	case packages == 0:
		return fmt.Errorf("no package was tested")
	case strict && len(skipped) > 0:
		return fmt.Errorf("skipped, although run as root: %s", strings.Join(skipped, ", "))
	case len(skipped) > 0:
		fmt.Fprintf(out, "skipped, as they need root: %d\n", len(skipped))
	}
	return nil
}

// closing says whether line is what go test ends a package with.
func closing(line string) bool {
	return strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "FAIL\t") || strings.HasPrefix(line, "?   \t")
}
