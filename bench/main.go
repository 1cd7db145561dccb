// Bench measures the service against what it could be measured against, on servers of its own, in one run in which the
// contenders take turns, and writes docs/figures.md. A contender's figure means nothing beside one of another run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
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

func main() {
	// A second signal does not end the program at once, because then its servers would stay; the end is bounded anyhow.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		os.Exit(1)
	}
}

// errUsage: the command line was wrong. As with every error of run, the user was told.
var errUsage = errors.New("wrong usage")

// run is the program: the figures go to stdout, progress and why it fails to stderr.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	asked, err := hidden(ctx, args, stdout)
	if !asked {
		var o options
		o, err = parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			fmt.Fprintf(stdout, usageText, maxSeconds, strings.Join(groups(), ", "), defaultOut)
			return nil
		case err == nil:
			err = bench(ctx, o, stdout, stderr)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
	}
	return err
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

// parse reads the command line. Its errors are errUsage, or flag.ErrHelp when help is asked for.
func parse(args []string) (options, error) {
	o := options{out: defaultOut}
	var only string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.IntVar(&o.rounds, "rounds", 3, "")
	flags.IntVar(&o.seconds, "seconds", 5, "")
	flags.StringVar(&only, "only", "", "")
	flags.BoolVar(&o.long, "long", false, "")
	flags.StringVar(&o.out, "out", defaultOut, "")
	err := flags.Parse(args)
	if only != "" {
		o.only = strings.Split(only, ",")
	}
	outSet := false
	flags.Visit(func(f *flag.Flag) { outSet = outSet || f.Name == "out" })
	if only != "" && !outSet {
		o.out = "" // a part must not replace the whole
	}
	unknown := slices.IndexFunc(o.only, func(name string) bool { return !slices.Contains(groups(), name) })
	switch {
	case errors.Is(err, flag.ErrHelp):
		return o, err
	case err != nil:
	case flags.NArg() > 0:
		err = fmt.Errorf("%q is not an option", flags.Arg(0))
	case o.rounds < 1:
		err = fmt.Errorf("--rounds is %d; it must be at least 1", o.rounds)
	case o.seconds < 1 || o.seconds > maxSeconds:
		err = fmt.Errorf("--seconds is %d; it must be from 1 to %d", o.seconds, maxSeconds)
	case unknown >= 0:
		err = fmt.Errorf("--only names %q; it knows %s", o.only[unknown], strings.Join(groups(), ", "))
	case o.out != "" && !isFolder(filepath.Dir(o.out)):
		err = fmt.Errorf("--out is %q, and there is no folder %s; run in the project's root, or name another file", o.out, filepath.Dir(o.out))
	}
	if err != nil {
		return o, fmt.Errorf("%w: %w; see --help", errUsage, err)
	}
	return o, nil
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
		if err := os.WriteFile(o.out, []byte(text), 0o644); err != nil {
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
