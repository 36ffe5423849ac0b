package main

import (
	"fmt"
	"html"
	"io"
	"math"
	"strings"
)

// plot is a chart with a logarithmic x axis.
type plot struct {
	title, x, y string
	series      []series
}

type series struct {
	name   string
	points []point
}

type point struct{ x, y float64 }

// Colours that differ in lightness too, for whoever prints it or sees no red.
var colours = []string{"#1b6ca8", "#d1495b", "#66a182", "#8d5a97", "#2e4057", "#edae49"}

const (
	width, height           = 720, 448
	left, right, top, below = 64, 24, 92, 56
)

// write renders the plot as SVG. Equal plots are rendered to equal bytes.
func (p plot) write(out io.Writer) error {
	minX, maxX, maxY := math.Inf(1), 0.0, 1.0
	for _, s := range p.series {
		for _, at := range s.points {
			minX, maxX, maxY = min(minX, at.x), max(maxX, at.x), max(maxY, at.y)
		}
	}
	step := niceStep(maxY)
	maxY = math.Ceil(maxY/step) * step
	place := func(at point) (float64, float64) {
		scale := 0.5
		if maxX > minX {
			scale = math.Log(at.x/minX) / math.Log(maxX/minX)
		}
		return left + scale*(width-left-right), height - below - at.y/maxY*(height-top-below)
	}
	var b strings.Builder
	text := func(x, y float64, anchor, s string) {
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor, html.EscapeString(s))
	}
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n", width, height)
	fmt.Fprintf(&b, "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n", width, height)
	text(left, 22, "start", p.title)
	text(left, 40, "start", p.y)
	text(width/2, height-12, "middle", p.x)
	for y := 0.0; y <= maxY+step/2; y += step {
		_, at := place(point{minX, y})
		fmt.Fprintf(&b, "<path d=\"M%d %.1fH%d\" stroke=\"#ddd\"/>\n", left, at, width-right)
		text(left-8, at+4, "end", fmt.Sprintf("%g", y))
	}
	ticks := map[float64]bool{}
	for _, s := range p.series {
		for _, at := range s.points {
			if x, _ := place(point{at.x, 0}); !ticks[at.x] {
				ticks[at.x] = true
				text(x, height-below+18, "middle", compact(at.x))
			}
		}
	}
	for i, s := range p.series {
		colour := colours[i%len(colours)]
		var path strings.Builder
		for j, at := range s.points {
			x, y := place(at)
			fmt.Fprintf(&path, "%s%.1f %.1f", map[bool]string{true: "M", false: "L"}[j == 0], x, y)
			fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n", x, y, colour)
		}
		fmt.Fprintf(&b, "<path d=\"%s\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"/>\n", path.String(), colour)
		// The legend: three names a row.
		x, y := float64(left+i%3*(width-left-right)/3), float64(58+i/3*18)
		fmt.Fprintf(&b, "<path d=\"M%.1f %.1fh18\" stroke=\"%s\" stroke-width=\"2\"/>\n", x, y-4, colour)
		text(x+23, y, "start", s.name)
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(out, b.String())
	return err
}

// niceStep divides an axis that reaches to y into four to ten steps.
func niceStep(y float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(y)))
	switch {
	case y/step < 2:
		return step / 5
	case y/step < 4:
		return step / 2
	}
	return step
}

func compact(x float64) string {
	switch {
	case x >= 1e6:
		return fmt.Sprintf("%.3gM", x/1e6)
	case x >= 1e3:
		return fmt.Sprintf("%.3gk", x/1e3)
	}
	return fmt.Sprintf("%g", x)
}
