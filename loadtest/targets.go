package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/google/uuid"
	vegeta "github.com/tsenart/vegeta/v12/lib"

	"idempotent-orders/gen/api"
)

const (
	keyHeader = "Idempotency-Key"
	// recentOrders is how many of the last orders may be repeated: some are then still under way, some long answered.
	recentOrders = 1000
	// preferWait is the longest that the contract lets a send wait for another of its key.
	preferWait = "wait=10"
)

// send is what makes two sends the same: they place one order.
type send struct {
	key  string
	body []byte
}

// source makes the orders, and repeats some. It is safe for concurrent use.
type source struct {
	method, url string
	header      http.Header // of every send, but for the key
	duplicates  float64

	mu             sync.Mutex // guards what follows
	made, repeated int        // sends
	recent         []send     // the last orders made, a ring
}

// newSource returns a source of the orders that the options ask for. Method, address and headers are those of the generated client,
// so that they follow the contract.
func newSource(o options) (*source, error) {
	params := &api.PlaceOrderParams{}
	if o.duplicates > 0 {
		params.Prefer = new(preferWait)
	}
	r, err := api.NewPlaceOrderRequest(strings.TrimSuffix(o.url, "/")+"/", params, api.OrderRequest{})
	if err != nil {
		return nil, err
	}
	if err := o.authorize(context.Background(), r); err != nil {
		return nil, err
	}
	return &source{method: r.Method, url: r.URL.String(), header: r.Header, duplicates: float64(o.duplicates)}, nil
}

// next is a vegeta.Targeter: it makes the next send.
func (s *source) next(t *vegeta.Target) error {
	order, err := s.pick()
	if err != nil {
		return err
	}
	t.Method, t.URL, t.Body = s.method, s.url, order.body
	t.Header = maps.Clone(s.header)
	t.Header[keyHeader] = []string{order.key}
	return nil
}

// pick returns a new order, or a recent one when a repeat is due.
func (s *source) pick() (send, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	due := s.duplicates * float64(s.made+s.repeated+1)
	if due >= float64(s.repeated+1) && len(s.recent) > 0 {
		s.repeated++
		return s.recent[rand.IntN(len(s.recent))], nil
	}
	s.made++
	order, err := newOrder(s.made)
	if err != nil {
		return send{}, err
	}
	if len(s.recent) < recentOrders {
		s.recent = append(s.recent, order)
	} else {
		s.recent[(s.made-1)%recentOrders] = order // in place of the oldest
	}
	return order, nil
}

// newOrder returns the n-th order, from 1, with a key of its own. Users and amounts vary, within the contract.
func newOrder(n int) (send, error) {
	body, err := json.Marshal(api.OrderRequest{
		UserId: new(fmt.Sprintf("user-%d", n%1000)),
		Amount: new(int64(100 + n%10_000)),
	})
	return send{uuid.NewString(), body}, err
}

// writeTargets prints the orders as vegeta's targets, until there are enough, the reader goes, or ctx ends.
func writeTargets(ctx context.Context, o options, stdout io.Writer) error {
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGPIPE) // so that a reader that has gone is an error, not the end
	defer signal.Stop(caught)
	s, err := newSource(o)
	if err != nil {
		return err
	}
	buffered := bufio.NewWriterSize(stdout, 64<<10)
	written, err := s.writeTo(ctx, buffered, o.orders)
	if err == nil {
		err = buffered.Flush()
	}
	switch {
	case readerGone(err):
		return nil
	case err != nil:
		return fmt.Errorf("write the targets: %w", err)
	case written < o.orders:
		return fmt.Errorf("interrupted: %d of %d orders were printed", written, o.orders)
	}
	return nil
}

// writeTo writes n orders, or without end when n is 0, until ctx ends, and returns how many it wrote.
func (s *source) writeTo(ctx context.Context, w io.Writer, n int) (int, error) {
	encode := vegeta.NewJSONTargetEncoder(w)
	written := 0
	for ; (n == 0 || written < n) && ctx.Err() == nil; written++ {
		var t vegeta.Target
		if err := s.next(&t); err != nil {
			return written, err
		}
		if err := encode(&t); err != nil {
			return written, err
		}
	}
	return written, nil
}

// readerGone tells whether a write failed because nobody reads any more, as when vegeta has all it wants.
func readerGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.ErrClosedPipe)
}
