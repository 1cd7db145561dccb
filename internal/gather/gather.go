// Package gather makes batches of concurrent calls (group commit).
//
// There is no timer. A call that finds nothing under way is a batch of its own and starts at once; calls that arrive
// while batches are under way wait together and form the next. So an idle service answers without delay, and the busier it
// is, the more calls share the cost of a crossing: batches size themselves.
//
// Four numbers bound it: how many calls make a batch, how many batches are under way, how many calls wait, and for how long.
// When the waiting room is full a call is refused at once, since a longer queue would only make every answer later. A batch
// that panics answers its callers with an error, and does nothing to the others.
package gather

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// ErrBusy: too many calls are waiting, or this one has waited too long; it was not made.
var ErrBusy = errors.New("too many calls are waiting")

// Limits bound a Gatherer; each must be at least one.
type Limits struct {
	Batch    int           // calls in a batch
	UnderWay int           // batches under way
	Waiting  int           // calls that wait for the next batch
	Wait     time.Duration // how long a call may wait for its batch to begin
}

// Gatherer hands concurrent calls to one function, in batches. It is safe for concurrent use.
type Gatherer[In, Out any] struct {
	limits Limits
	do     func([]In) []Out

	mu       sync.Mutex
	waiting  []call[In, Out] // guarded by mu
	underWay int             // guarded by mu
}

type call[In, Out any] struct {
	in     In
	joined time.Time
	answer chan<- answer[Out] // of room for one; nil when nobody waits
}

type answer[Out any] struct {
	out Out
	err error
}

// New returns a gatherer of calls to do, which returns an output for each input, in their order. do is called by up to
// limits.UnderWay goroutines at a time and must bound its own time.
func New[In, Out any](limits Limits, do func([]In) []Out) *Gatherer[In, Out] {
	return &Gatherer[In, Out]{limits: limits, do: do}
}

// Do makes one call and waits for its output. The error is ErrBusy, and then the call was not made, or tells that its
// batch panicked.
func (g *Gatherer[In, Out]) Do(in In) (Out, error) {
	answered := make(chan answer[Out], 1)
	if !g.join(call[In, Out]{in, time.Now(), answered}) {
		return *new(Out), ErrBusy
	}
	a := <-answered
	return a.out, a.err
}

// Tell makes one call and does not wait for it; nobody learns what became of it.
func (g *Gatherer[In, Out]) Tell(in In) { g.join(call[In, Out]{in, time.Now(), nil}) }

// join puts a call into the waiting room, if there is room, and starts a batch, if one may start.
func (g *Gatherer[In, Out]) join(c call[In, Out]) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) >= g.limits.Waiting {
		return false
	}
	g.waiting = append(g.waiting, c)
	if g.underWay < g.limits.UnderWay {
		g.underWay++
		go g.run()
	}
	return true
}

// run makes one batch after another until nobody waits.
func (g *Gatherer[In, Out]) run() {
	for batch := g.next(); len(batch) > 0; batch = g.next() {
		g.answer(batch)
	}
}

// next takes the next batch out of the waiting room; none ends the run. Calls that have waited too long are refused: they
// stand in front.
func (g *Gatherer[In, Out]) next() []call[In, Out] {
	g.mu.Lock()
	defer g.mu.Unlock()
	for now := time.Now(); len(g.waiting) > 0 && now.Sub(g.waiting[0].joined) > g.limits.Wait; g.waiting = g.waiting[1:] {
		g.waiting[0].reply(answer[Out]{err: ErrBusy})
	}
	if len(g.waiting) == 0 {
		g.underWay--
		return nil
	}
	n := min(len(g.waiting), g.limits.Batch)
	batch := g.waiting[:n:n]
	g.waiting = g.waiting[n:]
	if len(g.waiting) == 0 { // let go of what the batches hold, with room for as many again
		g.waiting = make([]call[In, Out], 0, n)
	}
	return batch
}

// answer makes the calls of a batch and answers their callers.
func (g *Gatherer[In, Out]) answer(batch []call[In, Out]) {
	ins := make([]In, len(batch))
	for i, c := range batch {
		ins[i] = c.in
	}
	outs, err := g.try(ins)
	for i, c := range batch {
		if err != nil {
			c.reply(answer[Out]{err: err})
		} else {
			c.reply(answer[Out]{out: outs[i]})
		}
	}
}

func (c call[In, Out]) reply(a answer[Out]) {
	if c.answer != nil {
		c.answer <- a
	}
}

func (g *Gatherer[In, Out]) try(ins []In) (outs []Out, err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("a batch of %d calls panicked: %v\n%s", len(ins), cause, debug.Stack())
		}
	}()
	outs = g.do(ins)
	if len(outs) != len(ins) {
		return nil, fmt.Errorf("a batch of %d calls has %d outputs", len(ins), len(outs))
	}
	return outs, nil
}
