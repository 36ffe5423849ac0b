package main

import (
	"fmt"
	"slices"
)

// probe is one thing to measure: what to do, and whose programs run meanwhile.
type probe struct {
	name   string
	rx, tx []object
	run    func() error
}

// sample is what a round of a probe cost: ns per run of the steering program
// and of the sendmsg hook; 0 where there is none or it did not run.
type sample struct{ rx, tx float64 }

// measure runs the probes in turn, round after round, so that whatever else
// the machine does meets all of them alike. It returns the samples per probe.
func measure(rounds int, probes []probe) ([][]sample, error) {
	samples := make([][]sample, len(probes))
	for round := range rounds + 1 {
		for i, p := range probes {
			s, err := p.once()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			if round > 0 { // the first one warms up
				samples[i] = append(samples[i], s)
			}
		}
	}
	return samples, nil
}

func (p probe) once() (s sample, err error) {
	rx, err := totalRuns(p.rx)
	if err != nil {
		return s, err
	}
	tx, err := totalRuns(p.tx)
	if err != nil {
		return s, err
	}
	if err := p.run(); err != nil {
		return s, err
	}
	if s.rx, err = since(p.rx, rx); err != nil {
		return s, err
	}
	s.tx, err = since(p.tx, tx)
	return s, err
}

func since(programs []object, before runs) (float64, error) {
	after, err := totalRuns(programs)
	if err != nil || after.count == before.count {
		return 0, err
	}
	return float64(after.ns-before.ns) / float64(after.count-before.count), nil
}

// typical is which of the sorted rounds counts: the lower quartile, since all
// that disturbs a round makes it longer.
const typical = 0.25

// net is what the probe typically cost beyond base; 0 for a program that it
// does not have.
func net(probe, base []sample) (n sample) {
	of := func(samples []sample, field func(sample) float64) float64 {
		values := make([]float64, len(samples))
		for i, s := range samples {
			values[i] = field(s)
		}
		return quantile(values, typical)
	}
	if rx := of(probe, steering); rx != 0 {
		n.rx = rx - of(base, steering)
	}
	if tx := of(probe, hook); tx != 0 {
		n.tx = tx - of(base, hook)
	}
	return n
}

func gross(probe []sample) sample { return net(probe, make([]sample, len(probe))) }

func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile is the least value for 0, the largest for 1; between two values it
// interpolates.
func quantile(values []float64, q float64) float64 {
	v := slices.Sorted(slices.Values(values))
	at := q * float64(len(v)-1)
	below := int(at)
	if below == len(v)-1 {
		return v[below]
	}
	return v[below] + (at-float64(below))*(v[below+1]-v[below])
}
