package testenv

import "testing"

func TestScale(t *testing.T) {
	for _, c := range []struct {
		variable string
		n, want  int
	}{
		{"", 1000, 1000},
		{"1", 1000, 1000},
		{"100", 1000, 10},
		{"100", 7, 1},
		{"0", 1000, 1000},
		{"-3", 1000, 1000},
		{"many", 1000, 1000},
	} {
		t.Setenv(ScaleVariable, c.variable)
		if got := Scale(c.n); got != c.want {
			t.Errorf("%s=%q: Scale(%d) = %d, want %d", ScaleVariable, c.variable, c.n, got, c.want)
		}
	}
}
