// Loadtest puts the service under load, in one of three ways: it places many orders at once through the generated client and
// shows each answer; with --rate it attacks at a steady rate, with vegeta as a library, and measures; as `loadtest targets` it
// prints the orders for the vegeta tool. Every order has an Idempotency-Key of its own.
//
// In the plain run, when several orders are answered at the same moment, their lines may stand in any order.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"idempotent-orders/internal/command"
)

const defaultURL = "http://localhost:8080"

const usage = `Puts the service under load with orders, each with an Idempotency-Key of its own.

Usage:
  go run ./loadtest [--url URL] [--orders N]
  go run ./loadtest --rate N [--duration D] [--connections N] [--duplicates P] [--html FILE] [--json FILE] [--url URL]
  go run ./loadtest targets [--url URL] [--orders N] [--duplicates P]

Without --rate it places the orders at once, and shows each answer as it comes:
  --url URL        where the service is (default %[1]s)
  --orders N       how many orders to place, at most %[2]d at a time (default %[3]d)

With --rate it attacks: it sends at that rate whether or not the answers keep up, so that a slow service shows as latency.
Up to %[4]d sends may wait for an answer at once, %[5]s each; beyond that, the rate falls.
  --rate N         sends per second
  --duration D     for how long, like 30s or 5m (default %[6]s)
  --connections N  at most so many open connections; a send that finds none free waits, and its latency tells (default %[7]d)
  --duplicates P   this share of the sends, like 5%% or 0.05, repeats one of the last %[8]d orders, key and body (default 0%%).
                   A repeat may overtake the send it repeats, so with duplicates every send carries 'Prefer: %[9]s':
                   whichever comes second waits for the answer of the first, where it would get a 409. A key that is
                   answered with two orders is a failure.
  --html FILE      write a plot of the latencies, a page that loads nothing from elsewhere
  --json FILE      write the numbers as JSON; - is stdout, and then the summary goes to stderr
While it runs, stderr has a line with the time, the answers per second, their 99th percentile and the failures: rewritten every
second on a terminal, else a new line every %[10]s; rate and percentile are those since the last line.

With targets it prints orders in vegeta's JSON format, one per line; endless without --orders:
  go run ./loadtest targets |
    go tool -modfile=tools/go.mod vegeta attack -format=json -lazy -rate=500 -duration=5s |
    go tool -modfile=tools/go.mod vegeta report

  --help           show this

LOADTEST_API_KEY in the environment is the API key to send, where the service wants one: an option would show it in ps. It is part
of what targets prints.

A success is a 200 with an order id. The exit code is 0 when every order succeeded, 1 when one did not, 2 when the command
line is wrong. An attack also fails when less than %[11]d%% of --rate was sent. Ctrl-C stops, and shows the summary of what was
answered.
`

func help() string {
	return fmt.Sprintf(usage, defaultURL, maxInFlight, defaultOrders, maxWaiting, sendTimeout, defaultDuration, defaultConnections,
		recentOrders, preferWait, progressElsewhere, leastPercent)
}

var tool = command.Program{Name: "loadtest", Help: help, Do: func(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	return o.run(ctx, stdout, stderr)
}}

func main() { tool.Main() }

func (o options) run(ctx context.Context, stdout, stderr io.Writer) error {
	switch o.mode {
	case attacking:
		return newAttack(o).run(ctx, stdout, stderr)
	case targets:
		return writeTargets(ctx, o, stdout)
	default:
		return placeAtOnce(ctx, o, stdout)
	}
}

// mode is a way to put the service under load.
type mode int

const (
	plain mode = iota
	attacking
	targets
)

// optionsOf names the options of each mode.
var optionsOf = map[mode][]string{
	plain:     {"url", "orders"},
	attacking: {"url", "rate", "duration", "connections", "duplicates", "html", "json"},
	targets:   {"url", "orders", "duplicates"},
}

// options are what the command line asks for.
type options struct {
	mode        mode
	url         string
	orders      int // 0: no end
	rate        int // per second
	duration    time.Duration
	connections int
	duplicates  share
	html, json  string // files, or empty
	apiKey      string // empty: none is sent
}

// parse reads the command line, as command.Parse does.
func parse(args []string) (options, error) {
	o := options{apiKey: os.Getenv("LOADTEST_API_KEY")}
	if len(args) > 0 && args[0] == "targets" {
		o.mode, args = targets, args[1:]
	}
	flags := command.Flags()
	flags.StringVar(&o.url, "url", defaultURL, "")
	flags.IntVar(&o.orders, "orders", 0, "")
	flags.IntVar(&o.rate, "rate", 0, "")
	flags.DurationVar(&o.duration, "duration", defaultDuration, "")
	flags.IntVar(&o.connections, "connections", defaultConnections, "")
	flags.Var(&o.duplicates, "duplicates", "")
	flags.StringVar(&o.html, "html", "", "")
	flags.StringVar(&o.json, "json", "", "")
	err := command.Parse(flags, args, func() error { return o.check(command.Given(flags)) })
	return o, err
}

// check settles the mode, and says what is wrong with the options, which were given.
func (o *options) check(given []string) error {
	if o.mode == plain && slices.Contains(given, "rate") {
		o.mode = attacking
	}
	for _, name := range given {
		switch {
		case slices.Contains(optionsOf[o.mode], name):
		case o.mode == plain:
			return fmt.Errorf("--%s needs --rate", name)
		case o.mode == attacking:
			return fmt.Errorf("--%s does not go with --rate; say for how long with --duration", name)
		default:
			return fmt.Errorf("--%s is not an option of targets", name)
		}
	}
	u, urlErr := url.Parse(o.url)
	switch {
	case slices.Contains(given, "orders") && o.orders < 1:
		return fmt.Errorf("--orders is %d; it must be at least 1", o.orders)
	case urlErr != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("--url is %q; it must be like %s", o.url, defaultURL)
	case o.mode == attacking:
		return o.checkAttack()
	case o.mode == plain && o.orders == 0:
		o.orders = defaultOrders
	}
	return nil
}

func (o *options) checkAttack() error {
	switch {
	case o.rate < 1 || o.rate > maxRate:
		return fmt.Errorf("--rate is %d; it must be from 1 to %d per second", o.rate, maxRate)
	case o.duration <= 0:
		return fmt.Errorf("--duration is %s; it must be more than 0", o.duration)
	case float64(o.rate)*o.duration.Seconds() < 1:
		return fmt.Errorf("--rate %d is not one order in --duration %s", o.rate, o.duration)
	case o.connections < 1:
		return fmt.Errorf("--connections is %d; it must be at least 1", o.connections)
	case o.html == "-":
		return errors.New("--html is -; it must be a file")
	case o.html != "" && o.html == o.json:
		return fmt.Errorf("--html and --json are both %s; they must be two files", o.html)
	}
	return nil
}

// share is a part of a whole, from 0 to 1, written like 5% or 0.05.
type share float64

func (s *share) String() string { return strconv.FormatFloat(float64(*s), 'f', -1, 64) }

// Set reads a share.
func (s *share) Set(text string) error {
	number, percent := strings.CutSuffix(text, "%")
	value, err := strconv.ParseFloat(number, 64)
	if percent {
		value /= 100
	}
	if err != nil || !(value >= 0 && value <= 1) { // a NaN is neither
		return errors.New("it must be from 0% to 100%, like 5% or 0.05")
	}
	*s = share(value)
	return nil
}
