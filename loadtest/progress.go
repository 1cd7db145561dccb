package main

import (
	"fmt"
	"io"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"

	"idempotent-orders/internal/command"
)

const (
	progressOnTerminal = time.Second
	progressElsewhere  = 5 * time.Second
)

// progress shows how an attack goes, in a line that is rewritten on a terminal, and in a new one each time elsewhere.
type progress struct {
	w        io.Writer
	terminal bool
	every    time.Duration
	total    time.Duration
	start    time.Time

	since     time.Time             // the last line
	latencies vegeta.LatencyMetrics // of the answers since
	answers   int                   // since
}

func newProgress(w io.Writer, total time.Duration) *progress {
	now := time.Now()
	p := &progress{w: w, every: progressElsewhere, total: total, start: now, since: now}
	if command.IsTerminal(w) {
		p.terminal, p.every = true, progressOnTerminal
	}
	return p
}

func (p *progress) add(r *vegeta.Result) {
	p.answers++
	p.latencies.Add(r.Latency)
}

// show writes the line; failed is how many sends failed so far.
func (p *progress) show(failed int) {
	now := time.Now()
	rate := float64(p.answers) / now.Sub(p.since).Seconds()
	p99 := "-"
	if p.answers > 0 {
		p99 = shown(p.latencies.Quantile(0.99))
	}
	before, after := "", "\n"
	if p.terminal {
		before, after = "\r", "\x1b[K" // the rest of the line is erased
	}
	fmt.Fprintf(p.w, "%s%s/%s  %.0f answers/sec  p99 %s  %d failed%s",
		before, now.Sub(p.start).Round(time.Second), p.total, rate, p99, failed, after)
	p.since, p.answers, p.latencies = now, 0, vegeta.LatencyMetrics{}
}

// clear removes the line from a terminal.
func (p *progress) clear() {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
