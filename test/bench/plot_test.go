package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

func TestPlot(t *testing.T) {
	p := plot{title: "a < b", x: "x", y: "ns", series: []series{
		{"one", []point{{1, 0}, {10, 50}, {100, 123}}},
		{"two & more", []point{{1, 3}}},
	}}
	var first, second strings.Builder
	if err := errors.Join(p.write(&first), p.write(&second)); err != nil {
		t.Fatal(err)
	}
	if first.String() != second.String() {
		t.Error("equal plots are not rendered to equal bytes")
	}
	circles := 0
	for decoder := xml.NewDecoder(strings.NewReader(first.String())); ; {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, first.String())
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "circle" {
			circles++
		}
	}
	if circles != 4 {
		t.Errorf("%d points are drawn, want 4", circles)
	}
}

func TestNiceStep(t *testing.T) {
	for y := 1.0; y < 1e7; y *= 1.07 {
		if steps := y / niceStep(y); steps < 3.9 || steps > 10.1 {
			t.Errorf("axis to %g has %g steps", y, steps)
		}
	}
}

func TestMedian(t *testing.T) {
	for want, values := range map[float64][]float64{2: {3, 1, 2}, 2.5: {4, 1, 3, 2}, 7: {7}} {
		if got := median(values); got != want {
			t.Errorf("median of %v is %g", values, got)
		}
	}
}
