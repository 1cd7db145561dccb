package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"
	vegeta "github.com/tsenart/vegeta/v12/lib"
	"github.com/tsenart/vegeta/v12/lib/plot"

	"idempotent-orders/gen/api"
)

// buckets are the lower ends of the histogram's buckets.
var buckets = vegeta.Buckets{
	0, time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
}

// plotted is how many points of each kind the plot shows at most; the shape stays.
const plotted = 4000

// tally counts and measures the answers. Its memory does not grow with them, but for some bytes each in the plot, if there is one.
type tally struct {
	summary
	metrics    vegeta.Metrics
	plot       *plot.Plot // or nil
	first      firstOrders
	replayed   int
	unanswered int            // sends that were cut off; they count nowhere else
	failures   map[string]int // by what happened
	doubled    int            // answers that name another order than an answer before of the same key
	double     string         // one of them, in words
}

func newTally(plots bool) *tally {
	t := &tally{
		metrics:  vegeta.Metrics{Histogram: &vegeta.Histogram{Buckets: buckets, Counts: make([]uint64, len(buckets))}},
		first:    firstOrders{young: map[string]uuid.UUID{}},
		failures: map[string]int{},
	}
	if plots {
		t.plot = plot.New(plot.Title("Latency of orders"), plot.Downsample(plotted), plot.Label(label))
	}
	return t
}

// add adds the answer to a send. When it is not a success, its error becomes what happened instead.
func (t *tally) add(r *vegeta.Result) error {
	r.Error = t.judge(r)
	switch {
	case r.Error == errInterrupted.Error():
		t.unanswered++
		return t.draw(r) // all the same: the plot shows nothing that comes after a gap
	case r.Error != "":
		t.failed++
		t.failures[r.Error]++
	default:
		t.succeeded++
		if replayed(r) {
			t.replayed++
		}
	}
	t.metrics.Add(r)
	return t.draw(r)
}

func (t *tally) draw(r *vegeta.Result) error {
	if t.plot == nil {
		return nil
	}
	return t.plot.Add(r)
}

// judge returns why a send failed, or nothing when it succeeded.
func (t *tally) judge(r *vegeta.Result) string {
	switch r.Code {
	case 0:
		return strings.TrimPrefix(r.Error, fmt.Sprintf("Post %q: ", r.URL))
	case http.StatusOK:
		return t.judgeOrder(r)
	default:
		return strings.TrimSpace(fmt.Sprintf("%d %s", r.Code, http.StatusText(int(r.Code))))
	}
}

// judgeOrder is judge for a 200. Every answer of a key has to name the same order.
func (t *tally) judgeOrder(r *vegeta.Result) string {
	var placed api.OrderPlaced
	if json.Unmarshal(r.Body, &placed) != nil || placed.OrderId == uuid.Nil {
		return "200 without an order id"
	}
	key := r.Headers.Get(keyHeader)
	first := t.first.of(key, placed.OrderId)
	if first == placed.OrderId {
		return ""
	}
	t.doubled++
	t.double = fmt.Sprintf("%s was answered with %s and with %s", key, first, placed.OrderId)
	return "200 with a second order for its key"
}

func replayed(r *vegeta.Result) bool { return r.Headers.Get("Idempotency-Replayed") == "true" }

// label names the line of the plot that an answer belongs to.
func label(r *vegeta.Result) string {
	switch {
	case r.Error == errInterrupted.Error():
		return "not answered"
	case r.Error != "":
		return "ERROR" // so that vegeta paints it red
	case replayed(r):
		return "replayed"
	default:
		return "placed"
	}
}

// rememberedKeys is how many keys at least are remembered with their order, in some 20 MB. An answer may come as late as sendTimeout, and
// a repeat recentOrders later: up to some 4000 orders per second not one is missed, and beyond only where answers are that late.
const rememberedKeys = 1 << 16

// firstOrders remembers for the last keys which order their first answer named: the younger half, and an older one.
type firstOrders struct{ young, old map[string]uuid.UUID }

// of returns the order that the first answer of the key named, which is this one if none came before.
func (f *firstOrders) of(key string, order uuid.UUID) uuid.UUID {
	if first, ok := f.young[key]; ok {
		return first
	}
	if first, ok := f.old[key]; ok {
		return first
	}
	if len(f.young) == rememberedKeys {
		f.young, f.old = map[string]uuid.UUID{}, f.young
	}
	f.young[key] = order
	return order
}
