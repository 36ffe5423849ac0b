package main

import (
	"testing"

	"grm/bpfprog/cbpf"
)

// TestPrograms sees to it that what is measured is what is meant: the
// payload's cookie, after every instruction but the refusal.
func TestPrograms(t *testing.T) {
	payload := make([]byte, payloadSize)
	fill(payload)
	payload[0], payload[1] = 0x12, 0x34
	for _, c := range []struct {
		program cbpf.Program
		length  int
		steps   int
	}{{cookie2, 2, 2}, {cookie20, 20, 19}} {
		steps := 0
		result := c.program.Run(payload, 0x0800, func(int, uint32, uint32) { steps++ })
		if result != 0x1234 || len(c.program) != c.length || steps != c.steps {
			t.Errorf("%d instructions, %d steps, result %v; want %d, %d, 0x1234", len(c.program), steps, result, c.length, c.steps)
		}
	}
}
