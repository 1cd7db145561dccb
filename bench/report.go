package main

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

// line is a measurement with what was found, a sample for each round; nil where it failed or was not taken.
type line struct {
	measurement
	samples []*sample
}

// report is everything that one run has found.
type report struct {
	lines    []*line
	failures []string
	facts    []string // of machine, versions and settings
	left     string   // what was not measured, and why
}

// median returns the middle of the values, or 0 when there are none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// values returns one figure of every sample that was taken.
func (l *line) values(figure func(sample) float64) (values []float64) {
	for _, s := range l.samples {
		if s != nil {
			values = append(values, figure(*s))
		}
	}
	return values
}

func rateOf(s sample) float64   { return s.rate }
func failedOf(s sample) float64 { return float64(s.failed) }

func (r *report) find(name string) *line {
	i := slices.IndexFunc(r.lines, func(l *line) bool { return l.name == name })
	if i < 0 {
		return nil
	}
	return r.lines[i]
}

// best returns which of the names has the best median rate.
func (r *report) best(names ...string) string {
	rate := func(name string) float64 {
		if l := r.find(name); l != nil {
			return median(l.values(rateOf))
		}
		return 0
	}
	return slices.MaxFunc(names, func(a, b string) int { return cmp.Compare(rate(a), rate(b)) })
}

func (r *report) bestPgbench() string {
	return r.best(namePgbench("prepared", 16), namePgbench("prepared", 64), namePgbench("simple", 16), namePgbench("simple", 64))
}

func (r *report) bestOf(contender string) string {
	return r.best(nameOf(contender, 1), nameOf(contender, 16), nameOf(contender, clientsSome), nameOf(contender, clientsMany))
}

// round gives a goal's figure what one round has found, and notes what is not there.
type round struct {
	*report
	number  int
	missing bool
	failed  bool // requests to the project failed in what was asked for
}

func (r *round) sample(name string) sample {
	l := r.find(name)
	if l == nil || r.number >= len(l.samples) || l.samples[r.number] == nil {
		r.missing = true
		return sample{}
	}
	s := *l.samples[r.number]
	r.failed = r.failed || l.ours && s.failed > 0
	return s
}

func (r *round) rate(name string) float64 { return r.sample(name).rate }

// partsTake returns how long the parts of an order would take one after the other, in seconds, with a handler that places nothing.
func (r *round) partsTake(handler string) float64 {
	many := r.best(namePgbenchMany(1), namePgbenchMany(2), namePgbenchMany(4))
	return 1/r.rate(handler) + 1/r.rate(many) + 2/r.rate(nameRedis)
}

// goal is a figure that the project wants to reach in each run, or one that tells what bounds another.
type goal struct {
	name   string
	target float64 // 0: none, it stands beside the goal above
	atMost bool    // else at least
	figure func(r *round) float64
}

var goals = []goal{
	{"intake ÷ pgbench, one transaction an order", 4, false, func(r *round) float64 {
		return r.rate(r.bestOf(server)) / r.rate(r.bestPgbench())
	}},
	{"intake ÷ naive server", 5, false, func(r *round) float64 {
		return r.rate(r.bestOf(server)) / r.rate(r.bestOf(naiveServer))
	}},
	{"intake ÷ 1/(1/empty handler + 1/pgbench-128 + 2/Redis pipelined)", 0.85, false, func(r *round) float64 {
		return r.rate(r.bestOf(server)) * r.partsTake(r.bestOf(emptyServer))
	}},
	{"the same with a handler that reads and waits twice for the empty one", 0, false, func(r *round) float64 {
		return r.rate(r.bestOf(server)) * r.partsTake(nameOf(waitingServer, clientsMany))
	}},
	{"replay of one key ÷ empty handler, 64 connections each", 0.8, false, func(r *round) float64 {
		return r.rate(nameReplay) / r.rate(nameOf(emptyServer, clientsSome))
	}},
	{"replay of one key ÷ handler that reads, 64 connections each", 0, false, func(r *round) float64 {
		return r.rate(nameReplay) / r.rate(nameOf(readingServer, clientsSome))
	}},
	{"one client: median latency ÷ naive server's", 1, true, func(r *round) float64 {
		return r.sample(nameOf(server, 1)).p50 / r.sample(nameOf(naiveServer, 1)).p50
	}},
	{"p99 at half of our peak, open loop ÷ naive server's at that rate, or at its own peak if that is lower", 0.5, true,
		func(r *round) float64 { return r.sample(nameOpen).p99 / r.sample(nameOpenNaive).p99 }},
	{"end to end ÷ pgbench, one transaction an order", 2, false, func(r *round) float64 {
		return r.rate(nameEndToEnd) / r.rate(r.bestPgbench())
	}},
	{"relay drain, events/s", 70_000, false, func(r *round) float64 { return r.rate(nameDrain(drained, false)) }},
	{"drain of 1,000,000 under a held snapshot ÷ without", 0.95, false, func(r *round) float64 {
		return r.rate(nameDrain(drainedLong, true)) / r.rate(nameDrain(drainedLong, false))
	}},
	{"intake into 5,000,000 orders ÷ into none, 256 connections each", 0.9, false, func(r *round) float64 {
		return r.rate(nameFull) / r.rate(nameOf(server, clientsMany))
	}},
	{"p99 of the intake beside a sweep ÷ without", 1.1, true, func(r *round) float64 {
		return r.sample(nameSweep).p99 / r.sample(nameNoSweep).p99
	}},
	{"from commit to stream at 1,000/s, p50 ms", 5, true, func(r *round) float64 { return r.sample(nameDelay(deliveryRate)).p50 / 1000 }},
	{"from commit to stream at 1,000/s, p99 ms", 30, true, func(r *round) float64 { return r.sample(nameDelay(deliveryRate)).p99 / 1000 }},
	{"mailed after Redis forgot 100,000 events, s", 30, true, func(r *round) float64 { return r.rate(nameRedrive) }},
	{"orders/s while 4,000 connections send again at once ÷ intake", 0.9, false, func(r *round) float64 {
		return r.rate(nameOverload) / r.rate(r.bestOf(server))
	}},
	{"orders/s at 10 times the peak, open loop ÷ at the peak with the same generator", 0.9, false, func(r *round) float64 {
		return r.rate(nameOverloadOpen) / r.rate(nameAtPeak)
	}},
	{"p99 of one caller beside another that may send 250/s, and floods ÷ alone", 1.1, true, func(r *round) float64 {
		return r.sample(nameFlooded(callerRate)).p99 / r.sample(nameAlone).p99
	}},
	{"p99 of one caller beside another that may send 1,000/s, and floods ÷ alone", 1.1, true, func(r *round) float64 {
		return r.sample(nameFlooded(callerRateMost)).p99 / r.sample(nameAlone).p99
	}},
	{"memory of the program at its peak, in any line below but overload and idle connections, MB", 150, true, func(r *round) float64 {
		peak := int64(0)
		for _, l := range r.lines {
			if l.ours && l.samples[r.number] != nil {
				peak = max(peak, l.samples[r.number].used.peak)
			}
		}
		r.missing = r.missing || peak == 0
		return float64(peak) / 1e6
	}},
	{"the idle program, % of a core", 1, true, func(r *round) float64 { return r.rate(nameIdle) }},
}

// judge returns the median of a goal's figure over the rounds, the least and the most, and what that says of the goal.
func (g goal) judge(r *report, rounds int) (middle, least, most float64, verdict string) {
	var values []float64
	failed := false
	for number := range rounds {
		one := &round{report: r, number: number}
		if v := g.figure(one); !one.missing && !math.IsNaN(v) && !math.IsInf(v, 0) {
			values = append(values, v)
			failed = failed || one.failed
		}
	}
	if len(values) == 0 {
		return 0, 0, 0, "not measured"
	}
	middle, least, most = median(values), slices.Min(values), slices.Max(values)
	switch {
	case failed:
		verdict = "**not reached**: requests failed"
	case g.target == 0:
		verdict = "no goal"
	case g.atMost && middle <= g.target, !g.atMost && middle >= g.target:
		verdict = "reached"
	default:
		verdict = "**not reached**"
	}
	return middle, least, most, verdict
}

// markdown writes the report.
func (r *report) markdown(rounds int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Figures\n\nWritten by `go run ./bench`. Each figure is the median of %s, in which the contenders took turns on one machine,\n"+
		"load generator included; a ratio is the median of the rounds' ratios. Compare figures within a run only.\n\n", plural(rounds, "round"))
	for _, fact := range r.facts {
		fmt.Fprintf(&b, "- %s\n", fact)
	}
	var elsewhere []float64
	for _, l := range r.lines {
		elsewhere = append(elsewhere, l.values(others)...)
	}
	fmt.Fprintf(&b, "- Others, the kernel and whatever else ran on the machine, used %s cores (median of all measurements); the less, the better the figures\n",
		cores(median(elsewhere)))
	b.WriteString("\n## Goals\n\n| | figure | least – most | goal | |\n|---|---:|---:|---:|---|\n")
	for _, g := range goals {
		middle, least, most, verdict := g.judge(r, rounds)
		sign := map[bool]string{true: "≤", false: "≥"}[g.atMost]
		target := sign + " " + pretty(g.target)
		if g.target == 0 {
			target = "–"
		}
		if verdict == "not measured" {
			fmt.Fprintf(&b, "| %s | | | %s | %s |\n", g.name, target, verdict)
			continue
		}
		fmt.Fprintf(&b, "| %s | %s | %s – %s | %s | %s |\n", g.name, pretty(middle), pretty(least), pretty(most), target, verdict)
	}
	b.WriteString("\n\"intake\", \"naive server\", \"empty handler\" and \"pgbench\" stand for the best of their lines below.\n")
	b.WriteString("\n## Measurements\n\n| | figure | least – most | ÷ pgbench | p50 ms | p99 ms | cores: itself, PostgreSQL, Redis, load, others | memory MB | settings |\n" +
		"|---|---:|---:|---:|---:|---:|---:|---:|---|\n")
	for _, l := range r.lines {
		if len(l.values(rateOf)) > 0 {
			r.row(&b, l)
		}
	}
	if r.left != "" {
		fmt.Fprintf(&b, "\n%s\n", r.left)
	}
	b.WriteString("\n## What failed\n\n")
	if len(r.failures) == 0 {
		b.WriteString("Nothing.\n")
	}
	for _, failure := range r.failures {
		fmt.Fprintf(&b, "- %s\n", failure)
	}
	return b.String()
}

func (r *report) row(b *strings.Builder, l *line) {
	rates := l.values(rateOf)
	middle := func(figure func(sample) float64) float64 { return median(l.values(figure)) }
	ratio := ""
	if pgbench := r.find(r.bestPgbench()); l.unit == unitOrders && pgbench != nil && len(pgbench.values(rateOf)) > 0 {
		ratio = fmt.Sprintf("%.2f", median(rates)/median(pgbench.values(rateOf)))
	}
	remarks := l.settings
	if failed := slices.Max(l.values(failedOf)); failed > 0 {
		remarks += fmt.Sprintf("; **%.0f requests failed in a round**", failed)
	}
	for _, s := range l.samples {
		if s != nil && s.note != "" {
			remarks += "; " + s.note
			break
		}
	}
	fmt.Fprintf(b, "| %s | %s %s | %s – %s | %s | %s | %s | %s, %s, %s, %s, %s | %s | %s |\n", l.name,
		pretty(median(rates)), l.unit, pretty(slices.Min(rates)), pretty(slices.Max(rates)), ratio,
		milliseconds(middle(func(s sample) float64 { return s.p50 })), milliseconds(middle(func(s sample) float64 { return s.p99 })),
		cores(middle(func(s sample) float64 { return s.used.contender })), cores(middle(func(s sample) float64 { return s.used.postgres })),
		cores(middle(func(s sample) float64 { return s.used.redis })), cores(middle(func(s sample) float64 { return s.load })),
		cores(middle(others)),
		known(middle(func(s sample) float64 { return float64(s.used.peak) / 1e6 }), "%.0f"), remarks)
}

// others returns the cores that neither the measured processes nor the generator used: the kernel, and whoever else is here.
func others(s sample) float64 {
	if s.used.busy < 0 {
		return -1
	}
	rest := s.used.busy - s.used.postgres - s.used.redis - s.load
	if !math.IsNaN(s.used.contender) {
		rest -= s.used.contender
	}
	return max(rest, 0)
}

// pretty writes large figures whole, with commas, and small ones to two places.
func pretty(v float64) string {
	if v < 1000 {
		return strings.TrimSuffix(fmt.Sprintf("%.2f", v), ".00")
	}
	digits := fmt.Sprintf("%.0f", v)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

func milliseconds(us float64) string { return known(us/1000, "%.2f") }

func cores(v float64) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case v < 0:
		return "n/a"
	}
	return fmt.Sprintf("%.2f", v)
}

// known leaves out what was not measured.
func known(v float64, format string) string {
	if v <= 0 {
		return ""
	}
	return fmt.Sprintf(format, v)
}

// describe returns the facts that the figures depend on: machine, versions, and the servers' settings as they show them.
func (l *lab) describe(ctx context.Context) ([]string, error) {
	var version string
	if err := l.pool.QueryRow(ctx, "SHOW server_version").Scan(&version); err != nil {
		return nil, err
	}
	var shown string
	err := l.pool.QueryRow(ctx, `SELECT string_agg(name || ' ' || current_setting(name), ', ' ORDER BY n) FROM unnest($1::text[]) WITH ORDINALITY AS t (name, n)`,
		[]string{"fsync", "synchronous_commit", "full_page_writes", "wal_level", "data_checksums", "shared_buffers", "max_wal_size", "max_connections", "autovacuum"}).Scan(&shown)
	if err != nil {
		return nil, err
	}
	info := l.rdb.InfoMap(ctx, "server").Item("Server", "redis_version")
	redisShown, err := l.rdb.ConfigGet(ctx, "appendonly").Result()
	if err != nil {
		return nil, err
	}
	saved, err := l.rdb.ConfigGet(ctx, "save").Result()
	if err != nil {
		return nil, err
	}
	generator := "no wrk is installed, so the closed loops come from vegeta, too, which costs more processor than wrk"
	if l.wrk != "" {
		text, _ := exec.CommandContext(ctx, l.wrk, "-v").CombinedOutput() // it exits 1
		generator = strings.Join(strings.Fields(string(text))[:2], " ") + " with one thread: where its load nears one core, it was wrk that was measured"
	}
	bench, err := exec.CommandContext(ctx, l.pgbench, "--version").Output()
	if err != nil {
		return nil, err
	}
	return []string{
		time.Now().UTC().Format(time.DateOnly) + ", " + machine(l.dir),
		fmt.Sprintf("%s; PostgreSQL %s; Redis %s; %s; %s; vegeta for the open loops", runtime.Version(), version, info,
			strings.TrimSpace(string(bench)), generator),
		"PostgreSQL, its defaults but for max_connections, reached over TCP: " + shown,
		fmt.Sprintf("Redis: appendonly %s, save %q", redisShown["appendonly"], saved["save"]),
		"pgbench: BEGIN, the three inserts of an order into the same tables (same columns and sizes, random UUIDs), COMMIT; five round trips",
		"The naive server (bench/naive): a lock in Redis and a transaction in PostgreSQL for each request, prepared statements, 16 connections",
		"Go runs with GOGC 400 in every contender, as the program sets for itself. Before each measurement the tables and Redis are " +
			"emptied and PostgreSQL does a checkpoint. Each HTTP contender is a fresh process, and but for end to end warmed up for a second",
	}, nil
}
