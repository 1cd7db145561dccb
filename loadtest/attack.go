package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"
)

const (
	maxRate            = 1_000_000
	defaultDuration    = 10 * time.Second
	defaultConnections = 256
	// maxWaiting is how many sends may wait for an answer at once. Up to there the attack is open-loop: a send goes out when
	// it is due, whatever became of those before. It bounds memory, at some 20 KB each.
	maxWaiting = 20_000
	// sendTimeout is longer than a repeat may wait for another send of its key.
	sendTimeout = 15 * time.Second
	// leastPercent of the rate asked for has to be sent.
	leastPercent = 98
	// maxAnswer bounds what is read of an answer, in bytes. It is far more than the contract's largest.
	maxAnswer = 64 << 10
)

// attack sends orders at a steady rate, and measures.
type attack struct {
	options
	maxWaiting   int
	sendTimeout  time.Duration
	leastPercent float64
}

func newAttack(o options) attack {
	return attack{options: o, maxWaiting: maxWaiting, sendTimeout: sendTimeout, leastPercent: leastPercent}
}

// run attacks, and shows and writes what it measured. It fails unless every send succeeded, at the rate asked for.
func (a attack) run(ctx context.Context, stdout, stderr io.Writer) error {
	client, err := newClient(a.options, requestTimeout)
	if err != nil {
		return err
	}
	if err := reach(ctx, client, a.url); err != nil {
		return err
	}
	if err := a.checkFiles(); err != nil {
		return err
	}
	result, err := a.measure(ctx, newProgress(stderr, a.duration))
	if err != nil {
		return err
	}
	shown := stdout
	if a.json == "-" {
		shown = stderr
	}
	fmt.Fprint(shown, result)
	return errors.Join(result.verdict, result.writeFiles(stdout))
}

// measure attacks until the time is over or ctx ends, and returns what it measured.
func (a attack) measure(ctx context.Context, progress *progress) (*result, error) {
	orders, err := newSource(a.options)
	if err != nil {
		return nil, err
	}
	line := a.newLine(ctx)
	defer line.transport.CloseIdleConnections()
	attacker := vegeta.NewAttacker(
		vegeta.Client(&http.Client{Transport: line, CheckRedirect: doNotFollow}),
		vegeta.Workers(uint64(min(a.connections, a.maxWaiting))), // more are started as they are needed
		vegeta.MaxWorkers(uint64(a.maxWaiting)),
	)
	defer context.AfterFunc(ctx, func() { attacker.Stop() })()
	t := newTally(a.html != "")
	answers := attacker.Attack(orders.next, vegeta.Rate{Freq: a.rate, Per: time.Second}, a.duration, "orders")
	if err := t.addAll(answers, progress); err != nil {
		return nil, err
	}
	return a.conclude(t, ctx.Err() != nil, line.full.Load()), nil
}

func doNotFollow(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// line is the way to the service: an http.RoundTripper that ends with ctx, and puts on each answer the key it answers, because
// vegeta's results do not tell it.
type line struct {
	ctx       context.Context
	transport *http.Transport
	timeout   time.Duration
	most      int64
	waiting   atomic.Int64
	full      atomic.Bool // once the most that may were waiting
}

func (a attack) newLine(ctx context.Context) *line {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxConnsPerHost, transport.MaxIdleConnsPerHost, transport.MaxIdleConns = a.connections, a.connections, a.connections
	return &line{ctx: ctx, transport: transport, timeout: a.sendTimeout, most: int64(a.maxWaiting)}
}

// RoundTrip sends a request and returns its answer, which is read to its end.
func (l *line) RoundTrip(r *http.Request) (*http.Response, error) {
	if l.waiting.Add(1) >= l.most {
		l.full.Store(true)
	}
	defer l.waiting.Add(-1)
	ctx, cancel := context.WithTimeoutCause(l.ctx, l.timeout, fmt.Errorf("no answer within %s", l.timeout))
	defer cancel()
	response, err := l.transport.RoundTrip(r.WithContext(ctx))
	if err != nil {
		return nil, l.plainly(ctx, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return nil, l.plainly(ctx, err)
	}
	response.Body = io.NopCloser(bytes.NewReader(body))
	response.Header.Set(keyHeader, r.Header.Get(keyHeader))
	return response, nil
}

// errInterrupted is the error of a send that was cut off.
var errInterrupted = errors.New("interrupted")

// plainly returns the error of a send without the ports and the like that make each one different, so that they can be counted.
func (l *line) plainly(ctx context.Context, err error) error {
	switch {
	case l.ctx.Err() != nil:
		return errInterrupted
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return fmt.Errorf("%s: %w", op.Op, op.Err)
	}
	return err
}

// addAll adds the answers as they come, and shows how it goes.
func (t *tally) addAll(answers <-chan *vegeta.Result, progress *progress) error {
	tick := time.NewTicker(progress.every)
	defer tick.Stop()
	defer progress.clear()
	var broken error
	for {
		select {
		case r, ok := <-answers:
			if !ok {
				return broken
			}
			if err := t.add(r); broken == nil {
				broken = err // and go on: an attack whose answers are not taken does not end
			}
			progress.add(r)
		case <-tick.C:
			progress.show(t.failed)
		}
	}
}

// conclude returns the result of the attack, which was interrupted or not, with the verdict on it.
func (a attack) conclude(t *tally, interrupted, full bool) *result {
	t.metrics.Close()
	r := &result{attack: a, tally: t, interrupted: interrupted}
	sending := max(t.metrics.Latest.Sub(t.metrics.Earliest), time.Millisecond)
	if !interrupted {
		sending = max(sending, a.duration)
	}
	r.sendRate = float64(t.metrics.Requests) / sending.Seconds()
	r.verdict = r.wrong(full)
	return r
}

// wrong returns what is wrong with the result, the worst first, or nil.
func (r *result) wrong(full bool) error {
	var wrong []string
	if r.doubled > 0 {
		wrong = append(wrong, fmt.Sprintf("2 orders for 1 key, %d times: %s", r.doubled, r.double))
	}
	if r.interrupted {
		wrong = append(wrong, fmt.Sprintf("interrupted: %d sends were not answered", r.unanswered))
	}
	if r.failed > 0 {
		wrong = append(wrong, fmt.Sprintf("%d of %d orders failed", r.failed, r.total()))
	}
	if !r.interrupted && r.sendRate*100 < r.leastPercent*float64(r.rate) {
		wrong = append(wrong, fmt.Sprintf("sent %.2f orders/sec where --rate asks for %d: %s", r.sendRate, r.rate, r.whyLate(full)))
	}
	if len(wrong) == 0 {
		return nil
	}
	return errors.New(strings.Join(wrong, "; "))
}

// whyLate returns the likely reason why sends went out late: for want of answers if as many were waiting as may, else of time.
func (r *result) whyLate(full bool) string {
	if full {
		return fmt.Sprintf("%d sends were waiting at once, the most that may: the service or this machine is too slow, or "+
			"--connections %d too few", r.maxWaiting, r.connections)
	}
	return "this machine is too slow or too busy; run the service on another one, or lower --rate"
}
