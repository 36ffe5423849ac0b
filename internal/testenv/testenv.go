// Package testenv is what tests ask about the machine that they run on.
package testenv

import (
	"os"
	"strconv"
)

// ScaleVariable is the environment variable that divides the counts of tests
// on a slow machine: test/vm sets it where every instruction is emulated.
const ScaleVariable = "GRM_SCALE"

// Scale is n divided by $GRM_SCALE, but at least 1. Tests ask it for how many
// packets, flows or rounds to make, so that the same test runs in seconds on a
// CPU and on an emulated one. It is n where the variable is unset or no number.
func Scale(n int) int {
	by, err := strconv.Atoi(os.Getenv(ScaleVariable))
	if err != nil || by < 1 {
		return n
	}
	return max(n/by, 1)
}
