// Storm lets faults rage over the whole program while clients send orders, records every call, and judges in the end whether
// what the program claims is true: at most one order for a key, every acknowledged order kept, every order announced, one mail
// for each, nobody sees another's data.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"idempotent-orders/internal/command"
)

const usageText = `Lets faults rage over two servers, two workers, two consumers, PostgreSQL, Redis and a mail server, all of this run's own,
while clients send orders; records every call, and judges in the end.

Usage:
  go run ./storm [--seed N] [--duration D] [--every D] [--clients N] [--rate N] [--report FILE] [--json FILE]
                 [--tags TAGS] [--env NAME=VALUE]... [--race] [--keep]
  go run ./storm --script [--seed N] [--duration D] [--every D]

  --seed N         the faults are drawn from it; the same seed, duration and interval give the same script (default: any)
  --duration D     how long clients send and faults strike, like 60s or 30m (default 1m)
  --every D        a fault strikes about this often (default 5s)
  --clients N      how many clients send, each one thing after the other (default 32)
  --rate N         how many calls all of them make in a second, at most (default 1000); more than the machine can deliver as
                   mails makes a backlog, and then the time to deliver is that of the backlog
  --report FILE    write the report as one page of HTML (default storm.html; empty: nowhere)
  --json FILE      write the faults and the verdict as JSON
  --script         only print the script of faults
  --tags TAGS      build the program with these build tags
  --env NAME=VALUE give this variable to the program's processes; may be repeated
  --race           build the program with the race detector
  --keep           keep the folder with what the processes said; with a violation it is kept anyhow
  --help           show this

The exit code is 0 when every claim held, 1 when one was broken or the storm could not be run, 2 when the command line is wrong.
Ctrl-C ends the faults and the clients; what was recorded is judged all the same. A second Ctrl-C ends everything at once.
It needs redis-server, and PostgreSQL or the internet to download it; it leaves nothing behind but the report.
`

func main() {
	if len(os.Args) == 3 && os.Args[1] == guardArg {
		standGuard(os.Args[2], os.Stdin)
		return
	}
	tool.Main() // ended at once by a second signal, it leaves it to the guard to clear up
}

var tool = command.Program{Name: "storm", Help: func() string { return usageText }, Do: do}

// do does what the command line says: the report goes to stdout, progress to stderr.
func do(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if o.scriptOnly {
		printScript(stdout, o.seed, draw(o.seed, o.duration, o.every))
		return nil
	}
	result, err := rage(ctx, o, stderr)
	if err != nil {
		return err
	}
	result.writeText(stdout)
	if err := result.writeFiles(o); err != nil {
		return err
	}
	if n := result.Verdict.total(); n > 0 {
		return fmt.Errorf("%d violations, of %s", n, strings.Join(result.Verdict.broken(), "; "))
	}
	return nil
}

// options are what the command line asks for.
type options struct {
	seed            uint64
	duration, every time.Duration
	clients, rate   int
	report, json    string // files; empty: nowhere
	scriptOnly      bool
	tags            string
	env             []string
	race, keep      bool
}

// parse reads the command line, as command.Parse does.
func parse(args []string) (o options, err error) {
	flags := command.Flags()
	flags.Uint64Var(&o.seed, "seed", rand.Uint64N(1_000_000), "")
	flags.DurationVar(&o.duration, "duration", time.Minute, "")
	flags.DurationVar(&o.every, "every", 5*time.Second, "")
	flags.IntVar(&o.clients, "clients", 32, "")
	flags.IntVar(&o.rate, "rate", 1000, "")
	flags.StringVar(&o.report, "report", "storm.html", "")
	flags.StringVar(&o.json, "json", "", "")
	flags.BoolVar(&o.scriptOnly, "script", false, "")
	flags.StringVar(&o.tags, "tags", "", "")
	flags.BoolVar(&o.race, "race", false, "")
	flags.BoolVar(&o.keep, "keep", false, "")
	flags.Func("env", "", func(text string) error {
		if name, _, ok := strings.Cut(text, "="); !ok || name == "" {
			return errors.New("it must be like NAME=value")
		}
		o.env = append(o.env, text)
		return nil
	})
	err = command.Parse(flags, args, func() error { return o.check() })
	return o, err
}

func (o options) check() error {
	switch {
	case o.duration < time.Second || o.duration > 24*time.Hour:
		return fmt.Errorf("--duration %s: it must be between 1s and 24h", o.duration)
	case o.every < 100*time.Millisecond || o.every > time.Hour:
		return fmt.Errorf("--every %s: it must be between 100ms and 1h", o.every)
	case o.clients < 1 || o.clients > 1000:
		return fmt.Errorf("--clients %d: it must be between 1 and 1000", o.clients)
	case o.rate < 1 || o.rate > 100_000:
		return fmt.Errorf("--rate %d: it must be between 1 and 100000", o.rate)
	}
	return nil
}

func (v *verdict) total() (n int) {
	for _, count := range v.Count {
		n += count
	}
	return n
}

// broken names the claims that did not hold.
func (v *verdict) broken() []string {
	return slices.DeleteFunc(slices.Clone(claims), func(claim string) bool { return v.Count[claim] == 0 })
}
