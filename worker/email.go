package worker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/broker"
	"idempotent-orders/gen/api"
	"idempotent-orders/internal/fault"
)

// EmailConsumer is the name of the e-mail consumer: its group at the broker, and its rows in the inbox.
const EmailConsumer = "email"

const (
	// AbandonedAfter is how long an event may stay with a consumer that gives no sign of life before another takes it over.
	AbandonedAfter = 30 * time.Second
	// consumerBatch is the most events a consumer receives at once. Larger ones are hardly faster, hold up more when a mail is
	// slow, and at 400 to 500 (replies of about 200 KB) a read over loopback stalled for the 40 ms of a delayed ACK.
	consumerBatch = 200
	// receiveWait is how long a consumer waits for events before it looks whether it should stop.
	receiveWait = time.Second
	// mostInHand is with how many events in hand a consumer receives no more: while mails fail, the rest waits in the stream.
	mostInHand = 1000
	// concurrentSends bounds how many mails are sent at once.
	concurrentSends = 16
	// sendTimeout bounds one mail; sendGrace what is left of it when the consumer is told to stop.
	sendTimeout, sendGrace = 10 * time.Second, 1500 * time.Millisecond
	// Mails that were sent are marked when nothing is being sent, or when they are markBatch, or after markWithin.
	markBatch, markWithin = 100, 20 * time.Millisecond
	// stepTimeout bounds one try at the inbox or the broker.
	stepTimeout = 5 * time.Second
	// A mail that failed n times is sent again after about mailLeast times 2 to the n-1, at most mailMost. So long does the
	// consumer pause, too, when nothing but failures come back.
	mailLeast, mailMost = time.Second, time.Minute
	// After suspectDeliveries an event is handled alone, so that nothing else is blamed for what it does. One that was
	// delivered more often than maxDeliveries is dead.
	suspectDeliveries, maxDeliveries = 3, 5
)

// Email is a confirmation to send.
type Email struct {
	EventID uuid.UUID // the same whenever the mail is sent again
	OrderID uuid.UUID
	UserID  string
	Amount  int64 // integer minor units
}

// Sender sends e-mail. It is called concurrently.
type Sender interface {
	// Send returns nil when the mail is accepted. An error that wraps ErrRefused means never: the event is dead, with the
	// error as its reason. Any other error means not now: the mail is sent again later, however often it takes.
	Send(ctx context.Context, mail Email) error
}

// Consumer confirms orders by e-mail: it takes each order.created.v1 event into the inbox, sends the mail, marks the
// event sent, and acknowledges it. A mail that fails is sent again by the same consumer, and holds nobody up. Events of other
// types ask for no mail and are finished at once, in the inbox too: what is not finished there is kept, and published again.
type Consumer struct {
	pool           *pgxpool.Pool
	subscription   broker.Subscription
	sender         Sender
	log            *slog.Logger
	holder         uuid.UUID     // what this consumer received carries this token
	abandonedAfter time.Duration // after what time others may have an event from the inbox
	least, most    time.Duration // mailLeast and mailMost
	inHand         int           // mostInHand
}

// NewConsumer returns a consumer with its inbox in a migrated database. abandonedAfter is after what time the
// subscription delivers an event again that was not acknowledged.
func NewConsumer(pool *pgxpool.Pool, subscription broker.Subscription, sender Sender, abandonedAfter time.Duration, log *slog.Logger) *Consumer {
	return &Consumer{
		pool: pool, subscription: subscription, sender: sender, log: log, holder: uuid.New(),
		// In the inbox an event is free again a little earlier than with the broker: its next receiver shall get it.
		abandonedAfter: abandonedAfter * 3 / 4,
		least:          mailLeast, most: mailMost, inHand: mostInHand,
	}
}

// Run consumes until ctx is done. Then it begins no mail, lets those that are under way end, marks what was sent, and gives the
// rest back.
func (c *Consumer) Run(ctx context.Context) { _ = c.consume(ctx, false) }

// Drain consumes until there is nothing more to receive. What cannot be sent now is given back.
func (c *Consumer) Drain(ctx context.Context) error { return c.consume(ctx, true) }

func (c *Consumer) consume(ctx context.Context, drain bool) error {
	longer, cancel := finishing(ctx, math.MaxInt64)
	defer cancel()
	sends, cancelSends := context.WithCancel(longer)
	defer cancelSends()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(sendGrace, cancelSends) })()
	s := newShift(c, ctx, longer, sends, drain)
	s.work()
	s.release()
	if drain && s.err == nil {
		return ctx.Err() // not everything was received
	}
	return s.err
}

// task is an event in hand.
type task struct {
	mail       Email
	tags       []string  // its deliveries, of which there may be several
	deliveries int64     // how often it was delivered
	entered    time.Time // when it was last entered into the inbox
	tries      int       // how often its mail failed
	left       int       // how often it was left to another consumer
	due        time.Time // when it is entered again
	reason     string    // why it is dead, if it is
	noMail     bool      // it is of a type that asks for none
	forced     time.Time // as forcedAt
	born       time.Time // the event's time
}

// read sorts deliveries into events to handle, and those that need nothing more. What is not an event can never be, so it is put
// into the log, and stays in the stream.
func (c *Consumer) read(ctx context.Context, deliveries []broker.Delivery) (tasks []*task, done []string) {
	tasks = make([]*task, 0, len(deliveries))
	for _, d := range deliveries {
		fault.EmailReceived.Reached()
		if d.Err != nil {
			c.log.ErrorContext(ctx, "An entry is not an event, and is left in the stream", "entry", d.Tag, "error", d.Err)
			done = append(done, d.Tag)
			continue
		}
		tasks = append(tasks, taskOf(d))
	}
	return tasks, done
}

// taskOf returns what is to be done for an event. One that cannot be read is dead from the beginning, in the inbox: what is not
// finished there is kept, and published again.
func taskOf(d broker.Delivery) *task {
	t := &task{mail: Email{EventID: d.Event.ID}, tags: []string{d.Tag}, deliveries: d.Deliveries, forced: forcedAt(d.Event), born: d.Event.Time}
	if t.noMail = d.Event.Type != string(api.OrderCreatedV1TypeOrderCreated); !t.noMail {
		var err error
		if t.mail, err = confirmation(d.Event); err != nil {
			t.reason = reasonOf(err)
		}
	}
	if d.Deliveries > maxDeliveries {
		t.reason = fmt.Sprintf("delivered %d times, and none of its receivers lived to finish it", d.Deliveries)
	}
	return t
}

// confirmation returns the mail that an order.created.v1 event asks for. Of one that cannot be read it returns what names it.
func confirmation(e broker.Event) (Email, error) {
	order, _ := uuid.Parse(e.Subject)
	unread := Email{EventID: e.ID, OrderID: order}
	var data api.OrderCreatedV1Data
	if err := json.Unmarshal(e.Data, &data); err != nil {
		return unread, fmt.Errorf("its data cannot be read: %w", err)
	}
	if data.OrderId == uuid.Nil || data.UserId == "" {
		return unread, errors.New("its data names no order or no user")
	}
	return Email{EventID: e.ID, OrderID: data.OrderId, UserID: data.UserId, Amount: data.Amount}, nil
}
