package decoy

import (
	"testing"
	"time"
)

func TestTimeLeft(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second:                           "0s",
		2600 * time.Millisecond:                "3s",
		9 * time.Second:                        "9s",
		14 * time.Second:                       "10s",
		3*time.Minute + 38*time.Second:         "3m40s",
		59*time.Minute + 58*time.Second:        "1h0m0s",
		30*24*time.Hour - 200*time.Millisecond: "720h0m0s",
	} {
		if got := left10(d).String(); got != want {
			t.Errorf("%v is told as %s, want %s", d, got, want)
		}
	}
}
