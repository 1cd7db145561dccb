// Bench measures the service against what it could be measured against, on servers of its own, in one run in which the
// contenders take turns, and writes docs/figures.md. A contender's figure means nothing beside one of another run.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"idempotent-orders/internal/command"
)

const (
	defaultOut = "docs/figures.md"
	// maxSeconds bounds a measurement: in it, wrk's fresh keys are as good as endless.
	maxSeconds = 30
	// measurementLimit bounds one taking of a measurement, whatever hangs; those of --long fill tables for minutes.
	measurementLimit     = 4 * time.Minute
	measurementLimitLong = 20 * time.Minute
)

const usageText = `Measures the service against pgbench, a naive server and an empty handler, and shows the figures and how they stand to the
goals, in Markdown. Starts its own PostgreSQL and Redis, and removes them.

Usage:
  go run ./bench [--rounds N] [--seconds N] [--only GROUP,GROUP] [--long] [--out FILE]

  --rounds N      how many rounds, of which the median counts (default 3)
  --seconds N     how long each load lasts, 1 to %d (default 5)
  --only GROUPS   measure these only: %s
  --long          also drain 1,000,000 events, and place orders into 5,000,000, and beside a sweep
  --out FILE      where to write the figures (default %s; nowhere with --only); empty: nowhere
  --help          show this

It needs redis-server and pgbench; it uses wrk if that is installed. The exit code is 0 when everything was measured,
whatever the goals say, 1 when something could not be, 2 when the command line is wrong. Ctrl-C ends everything it started.
`

var tool = command.Program{Name: "bench", Help: help, Do: do, Patient: true}

func main() { tool.Main() }

func help() string {
	return fmt.Sprintf(usageText, maxSeconds, strings.Join(groups(), ", "), defaultOut)
}

// do does what the command line says: the figures go to stdout, progress to stderr.
func do(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if asked, err := hidden(ctx, args, stdout); asked {
		return err
	}
	o, err := parse(args)
	if err != nil {
		return err
	}
	return bench(ctx, o, stdout, stderr)
}

// options are what the command line asks for.
type options struct {
	rounds, seconds int
	only            []string // groups; empty: all
	long            bool
	out             string // empty: nowhere
}

// groups returns the names that --only takes.
func groups() (names []string) {
	for _, m := range (&lab{}).measurements() {
		if !slices.Contains(names, m.group) {
			names = append(names, m.group)
		}
	}
	return names
}

// parse reads the command line, as command.Parse does.
func parse(args []string) (o options, err error) {
	var only string
	flags := command.Flags()
	flags.IntVar(&o.rounds, "rounds", 3, "")
	flags.IntVar(&o.seconds, "seconds", 5, "")
	flags.StringVar(&only, "only", "", "")
	flags.BoolVar(&o.long, "long", false, "")
	flags.StringVar(&o.out, "out", defaultOut, "")
	err = command.Parse(flags, args, func() error {
		if only != "" {
			o.only = strings.Split(only, ",")
		}
		if only != "" && !slices.Contains(command.Given(flags), "out") {
			o.out = "" // a part must not replace the whole
		}
		return o.check()
	})
	return o, err
}

func (o options) check() error {
	unknown := slices.IndexFunc(o.only, func(name string) bool { return !slices.Contains(groups(), name) })
	switch {
	case o.rounds < 1:
		return fmt.Errorf("--rounds is %d; it must be at least 1", o.rounds)
	case o.seconds < 1 || o.seconds > maxSeconds:
		return fmt.Errorf("--seconds is %d; it must be from 1 to %d", o.seconds, maxSeconds)
	case unknown >= 0:
		return fmt.Errorf("--only names %q; it knows %s", o.only[unknown], strings.Join(groups(), ", "))
	case o.out != "" && !isFolder(filepath.Dir(o.out)):
		return fmt.Errorf("--out is %q, and there is no folder %s; run in the project's root, or name another file", o.out, filepath.Dir(o.out))
	}
	return nil
}

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// bench measures, shows the report and writes it.
func bench(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	fmt.Fprintln(stderr, "building the program, starting PostgreSQL and Redis")
	l, err := openLab(ctx, o.seconds)
	defer func() { err = errors.Join(err, l.close(ctx)) }()
	if err != nil {
		return interrupted(ctx, err)
	}
	r := &report{}
	if r.facts, err = l.describe(ctx); err != nil {
		return interrupted(ctx, err)
	}
	l.measure(ctx, o, r, stderr)
	text := r.markdown(o.rounds)
	fmt.Fprint(stdout, text)
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted; nothing was written")
	case o.out != "":
		if err := os.WriteFile(o.out, []byte(text), 0o644); err != nil { // #nosec G306 -- for everybody to read
			return fmt.Errorf("write the figures: %w; name another file with --out", err)
		}
	}
	if len(r.failures) > 0 {
		return fmt.Errorf("%d measurements failed; see above", len(r.failures))
	}
	return nil
}

// interrupted says so when that is why something failed.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return err
}

// measure takes every measurement that is asked for, once a round, into the report.
func (l *lab) measure(ctx context.Context, o options, r *report, stderr io.Writer) {
	for _, m := range l.measurements() {
		switch {
		case len(o.only) > 0 && !slices.Contains(o.only, m.group):
		case m.long && !o.long:
			r.left = "Not measured, because they take minutes: what `--long` adds."
		default:
			r.lines = append(r.lines, &line{measurement: m, samples: make([]*sample, o.rounds)})
		}
	}
	start := time.Now()
	for number := range o.rounds {
		for _, line := range r.lines {
			if ctx.Err() != nil {
				return
			}
			if line.once && number > 0 {
				continue
			}
			fmt.Fprintf(stderr, "%5.0f s  round %d of %d: %s", time.Since(start).Seconds(), number+1, o.rounds, line.name)
			s, err := line.within(ctx)
			if ctx.Err() != nil {
				fmt.Fprintln(stderr)
				return
			}
			if err != nil {
				fmt.Fprintf(stderr, ": failed: %v\n", err)
				r.failures = append(r.failures, fmt.Sprintf("%s (%s), round %d: %v", line.name, line.settings, number+1, err))
				continue
			}
			fmt.Fprintf(stderr, ": %s %s\n", pretty(s.rate), line.unit)
			line.samples[number] = &s
			l.taken[line.name] = append(l.taken[line.name], s)
		}
	}
}

// within takes a measurement, bounded in time.
func (m measurement) within(ctx context.Context) (sample, error) {
	limit := measurementLimit
	if m.long {
		limit = measurementLimitLong
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return m.take(ctx)
}
