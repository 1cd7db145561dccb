// Package broker carries events from the relay to the consumers. Delivery is at least once: an event may arrive again,
// after a crash or when a reply was lost, and consumers dedupe by its id. It knows nothing of what the events mean.
package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/google/uuid"
)

// Event is a CloudEvents 1.0 event with JSON data.
type Event struct {
	ID          uuid.UUID // unique for ever
	Source      string
	Type        string
	Subject     string // events of one subject are delivered in the order they were published in
	Time        time.Time
	Traceparent string // W3C Trace Context, or empty
	Data        json.RawMessage
	Replay      string    // Replayed or Forced when an operator has it published again on purpose, else empty
	ReplayedAt  time.Time // by the database's clock, when Replay is not empty
}

const (
	Replayed = "replay" // consumers that have finished the event do nothing
	Forced   = "force"  // consumers that finished the event before ReplayedAt do everything again
)

// EventOf returns the event of an order as the outbox and its archive keep it.
func EventOf(id uuid.UUID, source, eventType string, order uuid.UUID, at time.Time, data []byte, traceparent *string) Event {
	e := Event{ID: id, Source: source, Type: eventType, Subject: order.String(), Time: at, Data: data}
	if traceparent != nil {
		e.Traceparent = *traceparent
	}
	return e
}

// Publisher hands events to the broker.
type Publisher interface {
	// Publish returns nil when the broker has accepted every event, in their order, and a *RefusedError when it has accepted all
	// but some that it refuses for what they are. It accepts nothing when it is in another epoch than this, however late the call
	// arrives; that, too, is an error. After any other any of the events may have been accepted.
	Publish(ctx context.Context, epoch string, events []Event) error
	// Epoch names one life of the broker's memory. Another one means that it may have forgotten what it accepted. When what it
	// publishes into is gone, it makes that anew.
	Epoch(ctx context.Context) (string, error)
}

// AnyEpoch is for what may be published whatever the broker forgot.
const AnyEpoch = ""

// RefusedError tells which events of a batch the broker refuses, and would refuse again. The others were accepted.
type RefusedError struct {
	Events map[int]error // by their place in the batch
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the broker refused %d events", len(e.Events))
}

// Delivery is an event as a subscription received it.
type Delivery struct {
	Tag   string // names the delivery to Ack
	Event Event
	Err   error // the delivery is not an event, and why; Event is then empty

	// Deliveries is how often the event was delivered, this one included: more than one means that receivers died with it, or
	// stood still. Zero: the broker does not count.
	Deliveries int64
}

// Subscription receives events for one consumer, of which several processes may be part: each event goes to one of them,
// and to another when it is not acknowledged.
type Subscription interface {
	// Receive waits for deliveries, not much longer than wait, and returns at most limit of them; none is no error.
	Receive(ctx context.Context, limit int, wait time.Duration) ([]Delivery, error)
	// Keep tells that the deliveries are still being worked on, so that they are not given to another. It may be called
	// while another method is.
	Keep(ctx context.Context, tags []string) error
	// Ack tells that the deliveries need nothing more. It may be called while another method is.
	Ack(ctx context.Context, tags []string) error
}

// Counting is a Subscription whose broker counts deliveries.
type Counting interface {
	Subscription
	// Release gives deliveries back as if they had not been made: another may receive them at once, and they do not count. It
	// may not be called while Receive is.
	Release(ctx context.Context, deliveries []Delivery) error
	// Recount has deliveries count as often as they say: those since then were no deaths. It may be called while another method is.
	Recount(ctx context.Context, deliveries []Delivery) error
}
