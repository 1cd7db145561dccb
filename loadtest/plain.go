package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"idempotent-orders/gen/api"
	"idempotent-orders/internal/command"
)

const (
	defaultOrders  = 100
	maxInFlight    = 100 // a connection each; more would measure the limits of this machine
	requestTimeout = 10 * time.Second
)

// placeAtOnce is the plain run: it places the orders, and shows the answers and the summary. It fails unless every order
// succeeded.
func placeAtOnce(ctx context.Context, o options, stdout io.Writer) error {
	client, err := newClient(o, requestTimeout)
	if err != nil {
		return err
	}
	if err := reach(ctx, client, o.url); err != nil {
		return err
	}
	var s summary
	start := time.Now()
	for a := range place(ctx, client, o.orders) {
		fmt.Fprintln(stdout, a)
		s.add(a)
	}
	s.took = time.Since(start)
	fmt.Fprint(stdout, s)
	switch missing := o.orders - s.total(); {
	case missing > 0:
		return fmt.Errorf("interrupted: of %d orders, %d were not sent or not answered", o.orders, missing)
	case s.failed > 0:
		return fmt.Errorf("%d of %d orders failed", s.failed, o.orders)
	}
	return nil
}

// newClient returns a generated client that keeps its connections, and gives up a request after the timeout.
func newClient(o options, timeout time.Duration) (*api.ClientWithResponses, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns, transport.MaxIdleConnsPerHost = maxInFlight, maxInFlight
	return api.NewClientWithResponses(o.url, api.WithHTTPClient(&http.Client{Transport: transport, Timeout: timeout}),
		api.WithRequestEditorFn(o.authorize))
}

// authorize puts the API key on a request, if there is one. It is an api.RequestEditorFn.
func (o options) authorize(_ context.Context, r *http.Request) error {
	if o.apiKey != "" {
		r.Header.Set("Authorization", "Bearer "+o.apiKey)
	}
	return nil
}

// reach fails when nothing answers at the URL. Any answer will do.
func reach(ctx context.Context, client *api.ClientWithResponses, url string) error {
	response, err := client.GetLiveness(ctx)
	if err == nil {
		return response.Body.Close()
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return fmt.Errorf("nothing answers at %s; start the service with `go run .`, or say where it is with --url: %w", url, err)
}

// answer is what became of an order.
type answer struct {
	number int // from 1
	status int
	body   []byte
	id     uuid.UUID // of the order; uuid.Nil when there is none
	err    error     // of the transport; then the rest does not count
}

func (a answer) succeeded() bool {
	return a.err == nil && a.status == http.StatusOK && a.id != uuid.Nil
}

// String returns the answer in one line.
func (a answer) String() string {
	if a.err != nil {
		return fmt.Sprintf("[%d] error: %s", a.number, command.OneLine(a.err.Error()))
	}
	return fmt.Sprintf("[%d] %d: %s", a.number, a.status, command.OneLine(string(a.body)))
}

// place places n orders, as many at once as may be in flight, and returns the answers as they come. When ctx ends, what was
// not answered yet has no answer.
func place(ctx context.Context, client *api.ClientWithResponses, n int) <-chan answer {
	answers := make(chan answer)
	go func() {
		defer close(answers)
		var senders errgroup.Group
		senders.SetLimit(maxInFlight)
		for number := 1; number <= n && ctx.Err() == nil; number++ {
			senders.Go(func() error {
				if a := placeOne(ctx, client, number); ctx.Err() == nil || a.err == nil {
					answers <- a
				}
				return nil
			})
		}
		_ = senders.Wait()
	}()
	return answers
}

// placeOne places an order with a key of its own. It reads the answer itself, because the generated reader returns an answer
// that breaks the contract as an error, without its status and its body.
func placeOne(ctx context.Context, client *api.ClientWithResponses, number int) answer {
	a := answer{number: number}
	response, err := client.PlaceOrder(ctx, &api.PlaceOrderParams{IdempotencyKey: uuid.NewString()}, api.OrderRequest{})
	if err != nil {
		a.err = err
		return a
	}
	defer response.Body.Close()
	a.status = response.StatusCode
	if a.body, a.err = io.ReadAll(response.Body); a.err != nil {
		return a
	}
	var placed api.OrderPlaced
	if json.Unmarshal(a.body, &placed) == nil {
		a.id = placed.OrderId
	}
	return a
}

// summary counts the answers.
type summary struct {
	succeeded, failed int
	took              time.Duration
}

func (s *summary) add(a answer) {
	if a.succeeded() {
		s.succeeded++
	} else {
		s.failed++
	}
}

func (s summary) total() int { return s.succeeded + s.failed }

// String returns the summary as it is shown. The rate is that of the duration as shown, so that the lines agree.
func (s summary) String() string {
	took := max(s.took.Round(time.Millisecond), time.Millisecond)
	return fmt.Sprintf("\n--- Summary ---\nTotal: %d orders\nSuccess: %d\nFailed: %d\nDuration: %s\nRate: %.2f orders/sec\n",
		s.total(), s.succeeded, s.failed, took, float64(s.succeeded)/took.Seconds())
}
