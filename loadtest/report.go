package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// result is what an attack measured.
type result struct {
	attack
	*tally
	interrupted bool
	sendRate    float64 // sends per second, answered or not yet
	verdict     error   // nil when all is well
}

// took is the time from the first send to the last answer.
func (r *result) took() time.Duration { return r.metrics.End.Sub(r.metrics.Earliest) }

// String returns the result as it is shown.
func (r *result) String() string {
	s := r.summary
	s.took = r.took()
	text := new(strings.Builder)
	fmt.Fprint(text, s)
	if r.duplicates > 0 {
		fmt.Fprintf(text, "Replayed: %d\n", r.replayed)
	}
	fmt.Fprintf(text, "Sent: %.2f orders/sec, of %d asked for\n", r.sendRate, r.rate)
	for _, what := range byCount(r.failures) {
		fmt.Fprintf(text, "Failed with %s: %d\n", what, r.failures[what])
	}
	if r.total() > 0 {
		fmt.Fprint(text, "\n--- Latency ---\n")
		for _, l := range r.latencies() {
			fmt.Fprintf(text, "%s: %s\n", l.name, shown(l.time))
		}
		fmt.Fprint(text, r.histogram())
	}
	return text.String()
}

// byCount returns the names, those that happened most first.
func byCount(counts map[string]int) []string {
	return slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(counts[b]-counts[a], strings.Compare(a, b))
	})
}

// latency is a figure of the latencies.
type latency struct {
	name string
	time time.Duration
}

// latencies returns the figures in the order they are shown. There has to be an answer.
func (r *result) latencies() []latency {
	m := r.metrics.Latencies
	return []latency{
		{"min", m.Min}, {"mean", m.Mean}, {"p50", m.P50}, {"p90", m.P90}, {"p95", m.P95}, {"p99", m.P99},
		{"p99.9", m.Quantile(0.999)}, {"max", m.Max},
	}
}

// shown returns a duration with about three digits.
func shown(d time.Duration) string {
	unit := time.Nanosecond
	for d >= 1000*unit {
		unit *= 10
	}
	return d.Round(unit).String()
}

// bucket is a bucket of the histogram: latencies of at least from and less than to.
type bucket struct {
	from, to time.Duration // to is 0 in the last one, which is open
	count    uint64
}

// filled returns the buckets from the first to the last that has something in it.
func (r *result) filled() []bucket {
	var all []bucket
	for i, count := range r.metrics.Histogram.Counts {
		b := bucket{from: buckets[i], count: count}
		if i+1 < len(buckets) {
			b.to = buckets[i+1]
		}
		all = append(all, b)
	}
	first := slices.IndexFunc(all, func(b bucket) bool { return b.count > 0 })
	if first < 0 {
		return nil
	}
	for all[len(all)-1].count == 0 {
		all = all[:len(all)-1]
	}
	return all[first:]
}

// histogram returns the latencies as bars; the longest has the width of 50 signs.
func (r *result) histogram() string {
	filled := r.filled()
	most := slices.MaxFunc(filled, func(a, b bucket) int { return cmp.Compare(a.count, b.count) }).count
	text := new(strings.Builder)
	for _, b := range filled {
		to := "more"
		if b.to > 0 {
			to = b.to.String()
		}
		bar := strings.Repeat("#", int((50*b.count+most-1)/most)) // rounded up: what is there is seen
		line := fmt.Sprintf("%5s - %-5s %9d %6.2f%%  %s", b.from, to, b.count, 100*float64(b.count)/float64(r.total()), bar)
		fmt.Fprintln(text, strings.TrimRight(line, " "))
	}
	return text.String()
}

// report is the result as JSON. Times are in milliseconds but where the name says seconds; rates are per second.
type report struct {
	URL         string             `json:"url"`
	AskedRate   int                `json:"asked_rate"`
	AskedTime   float64            `json:"asked_duration_seconds"`
	Connections int                `json:"connections"`
	Duplicates  float64            `json:"duplicates"`
	Total       int                `json:"total"`
	Success     int                `json:"success"`
	Failed      int                `json:"failed"`
	Replayed    int                `json:"replayed"`
	Unanswered  int                `json:"unanswered"`
	Doubled     int                `json:"second_orders_for_a_key"`
	Duration    float64            `json:"duration_seconds"`
	Rate        float64            `json:"rate"`
	SendRate    float64            `json:"send_rate"`
	StatusCodes map[string]int     `json:"status_codes"`
	Failures    map[string]int     `json:"failures"`
	Latency     map[string]float64 `json:"latency_ms"`
	Histogram   []reportBucket     `json:"histogram"`
	Interrupted bool               `json:"interrupted"`
	Error       string             `json:"error"`
}

type reportBucket struct {
	From  float64  `json:"from_ms"`
	To    *float64 `json:"to_ms"` // null in the last one, which is open
	Count uint64   `json:"count"`
}

// report returns the result as it is written. "error" is what the program fails with, empty when all is well; the status code
// of a send without an answer is 0.
func (r *result) report() report {
	took := r.took().Seconds()
	j := report{
		URL: r.url, AskedRate: r.rate, AskedTime: r.duration.Seconds(), Connections: r.connections, Duplicates: float64(r.duplicates),
		Total: r.total(), Success: r.succeeded, Failed: r.failed, Replayed: r.replayed, Unanswered: r.unanswered, Doubled: r.doubled,
		Duration: took, SendRate: r.sendRate, StatusCodes: r.metrics.StatusCodes, Failures: r.failures,
		Latency: map[string]float64{}, Histogram: []reportBucket{}, Interrupted: r.interrupted,
	}
	if took > 0 {
		j.Rate = float64(r.succeeded) / took
	}
	if r.verdict != nil {
		j.Error = r.verdict.Error()
	}
	if r.total() > 0 {
		for _, l := range r.latencies() {
			j.Latency[l.name] = milliseconds(l.time)
		}
	}
	for _, b := range r.filled() {
		written := reportBucket{From: milliseconds(b.from), Count: b.count}
		if b.to > 0 {
			written.To = new(milliseconds(b.to))
		}
		j.Histogram = append(j.Histogram, written)
	}
	return j
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (r *result) writeJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(r.report())
}

func (r *result) writeHTML(w io.Writer) error {
	r.plot.Close()
	_, err := r.plot.WriteTo(w)
	return err
}

// checkFiles makes sure, before the attack begins, that the files can be written. It leaves everything as it is.
func (a attack) checkFiles() error {
	for option, path := range map[string]string{"--html": a.html, "--json": a.json} {
		if path == "" || path == "-" {
			continue
		}
		info, missing := os.Stat(path)
		if missing == nil && !info.Mode().IsRegular() {
			return fmt.Errorf("%s is %s, which is not a file; name one", option, path)
		}
		file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600) // #nosec G304 -- its user names it; it is gone when it was not there
		if err != nil {
			return fmt.Errorf("%s cannot be written; name another file: %w", option, err)
		}
		_ = file.Close()
		if missing != nil {
			_ = os.Remove(path)
		}
	}
	return nil
}

// writeFiles writes what was asked for, besides what is shown.
func (r *result) writeFiles(stdout io.Writer) error {
	write := func(option, path string, to func(io.Writer) error) error {
		var text bytes.Buffer
		if path == "" {
			return nil
		}
		err := to(&text)
		switch {
		case err != nil:
		case path == "-":
			_, err = text.WriteTo(stdout)
		default:
			err = os.WriteFile(path, text.Bytes(), 0o644) // #nosec G306 -- for everybody to read
		}
		if err != nil {
			return fmt.Errorf("write %s: %w", option, err)
		}
		return nil
	}
	return errors.Join(write("--json", r.json, r.writeJSON), write("--html", r.html, r.writeHTML))
}
