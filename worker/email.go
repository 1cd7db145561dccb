package worker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"

	"idempotent-orders/broker"
	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
)

// EmailConsumer is the name of the e-mail consumer: its group at the broker, and its rows in the inbox.
const EmailConsumer = "email"

const (
	// AbandonedAfter is how long an event may stay with a consumer before another takes it over.
	AbandonedAfter = 30 * time.Second
	// consumerBatch is the most events a consumer receives at once. Larger ones are hardly faster, hold up more when a mail is
	// slow, and at 400 to 500 (replies of about 200 KB) a read over loopback stalled for the 40 ms of a delayed ACK.
	consumerBatch = 200
	// receiveWait is how long a consumer waits for events before it looks whether it should stop.
	receiveWait = time.Second
	// concurrentSends bounds how many mails of a batch are sent at once.
	concurrentSends = 16
	// stepTimeout bounds one try at the inbox or the broker.
	stepTimeout = 5 * time.Second
	// batchTimeout bounds how long a consumer holds on to a batch while a store is away.
	batchTimeout = time.Hour
	// sendTimeout bounds one mail.
	sendTimeout = 10 * time.Second
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
	// Send returns nil when the mail is accepted.
	Send(ctx context.Context, mail Email) error
}

// Consumer confirms orders by e-mail: it takes each order.created.v1 event into the inbox, sends the mail, marks the
// event sent, and acknowledges it.
type Consumer struct {
	pool           *pgxpool.Pool
	subscription   broker.Subscription
	sender         Sender
	log            *slog.Logger
	holder         uuid.UUID // what this consumer received carries this token
	abandonedAfter time.Duration
}

// NewConsumer returns a consumer with its inbox in a migrated database. abandonedAfter is after what time the
// subscription delivers an event again that was not acknowledged.
func NewConsumer(pool *pgxpool.Pool, subscription broker.Subscription, sender Sender, abandonedAfter time.Duration, log *slog.Logger) *Consumer {
	return &Consumer{
		pool: pool, subscription: subscription, sender: sender, log: log, holder: uuid.New(),
		// In the inbox an event is free again a little earlier than with the broker: its next receiver shall get it.
		abandonedAfter: abandonedAfter * 3 / 4,
	}
}

// Run consumes until ctx is done; then it finishes the batch it holds.
func (c *Consumer) Run(ctx context.Context) {
	failed := backoff{least: failedLeast, most: failedMost}
	receiving := trouble{log: c.log, doing: "Receiving events"}
	for ctx.Err() == nil {
		_, err := c.runOnce(ctx, receiveWait)
		receiving.note(ctx, err)
		if err != nil {
			failed.wait(ctx, nil)
		} else {
			failed.reset()
		}
	}
}

// Drain consumes until there is nothing more to receive.
func (c *Consumer) Drain(ctx context.Context) error {
	for {
		if received, err := c.runOnce(ctx, 0); received == 0 || err != nil {
			return err
		}
	}
}

// runOnce receives a batch and finishes what it can of it, and returns how many deliveries it received. What it cannot
// finish stays with the broker, and is delivered again.
func (c *Consumer) runOnce(ctx context.Context, wait time.Duration) (int, error) {
	deliveries, err := c.subscription.Receive(ctx, consumerBatch, wait)
	if err != nil || len(deliveries) == 0 {
		return 0, err
	}
	ctx, cancel := finishing(ctx, batchTimeout)
	defer cancel()
	defer c.keep(ctx, deliveries)()
	batch := c.read(ctx, deliveries)
	if err := c.finish(ctx, &batch); err != nil {
		return 0, err
	}
	return len(deliveries), nil
}

// keep holds the deliveries for this consumer, however long it takes, until the returned function is called.
func (c *Consumer) keep(ctx context.Context, deliveries []broker.Delivery) (stop func()) {
	tags := make([]string, len(deliveries))
	for i, d := range deliveries {
		tags[i] = d.Tag
	}
	ctx, cancel := context.WithCancel(ctx)
	var keeping sync.WaitGroup
	keeping.Go(func() {
		for ticker := time.NewTicker(c.abandonedAfter / 4); ; {
			select {
			case <-ctx.Done():
				ticker.Stop()
				return
			case <-ticker.C:
				_ = c.subscription.Keep(ctx, tags) // who cannot reach the broker cannot acknowledge either
			}
		}
	})
	return func() { cancel(); keeping.Wait() }
}

// batch is what a consumer received at once.
type batch struct {
	mails map[uuid.UUID]Email    // by event
	tags  map[uuid.UUID][]string // the deliveries of an event, of which there may be several
	done  []string               // deliveries that need nothing more
}

// read sorts deliveries into mails to send, and others. Events of other types are not this consumer's business. What is
// not an event can never be, so it is put into the log, and stays in the stream.
func (c *Consumer) read(ctx context.Context, deliveries []broker.Delivery) batch {
	b := batch{mails: map[uuid.UUID]Email{}, tags: map[uuid.UUID][]string{}}
	for _, d := range deliveries {
		if d.Err == nil && d.Event.Type != string(api.OrderCreatedV1TypeOrderCreated) {
			b.done = append(b.done, d.Tag)
			continue
		}
		mail, err := confirmation(d)
		if err != nil {
			c.log.ErrorContext(ctx, "An entry is not an event that can be confirmed, and is left in the stream", "entry", d.Tag, "error", err)
			b.done = append(b.done, d.Tag)
			continue
		}
		b.mails[mail.EventID] = mail
		b.tags[mail.EventID] = append(b.tags[mail.EventID], d.Tag)
	}
	return b
}

// confirmation returns the mail that an order.created.v1 event asks for.
func confirmation(d broker.Delivery) (Email, error) {
	if d.Err != nil {
		return Email{}, d.Err
	}
	var data api.OrderCreatedV1Data
	if err := json.Unmarshal(d.Event.Data, &data); err != nil {
		return Email{}, fmt.Errorf("read the data of event %s: %w", d.Event.ID, err)
	}
	if data.OrderId == uuid.Nil || data.UserId == "" {
		return Email{}, fmt.Errorf("the data of event %s names no order or no user", d.Event.ID)
	}
	return Email{EventID: d.Event.ID, OrderID: data.OrderId, UserID: data.UserId, Amount: data.Amount}, nil
}

// finish enters the batch into the inbox, sends what is this consumer's to send, marks it and acknowledges it. A store
// that is away is waited for: the batch is kept for this consumer meanwhile, and sent mails should be marked.
func (c *Consumer) finish(ctx context.Context, b *batch) error {
	var mine []uuid.UUID
	err := c.persist(ctx, "Entering the inbox", func(ctx context.Context) (err error) {
		mine, err = c.enter(ctx, b)
		return err
	})
	if err != nil {
		return err
	}
	sent := c.send(ctx, b, mine)
	err = c.persist(ctx, "Marking mails sent", func(ctx context.Context) error {
		if len(sent) == 0 {
			return nil
		}
		marked, err := db.New(c.pool).MarkSent(ctx, db.MarkSentParams{Consumer: EmailConsumer, EventIds: sent, Holder: c.holder})
		b.finished(marked)
		return err
	})
	if err != nil {
		return err
	}
	return c.persist(ctx, "Acknowledging events", func(ctx context.Context) error { return c.subscription.Ack(ctx, b.done) })
}

// finished notes that the events need nothing more.
func (b *batch) finished(events []uuid.UUID) {
	for _, id := range events {
		b.done = append(b.done, b.tags[id]...)
		delete(b.tags, id)
	}
}

// enter takes the batch into the inbox and returns the events that are this consumer's to send. Those that were finished
// before are noted; the others are held by another consumer.
func (c *Consumer) enter(ctx context.Context, b *batch) ([]uuid.UUID, error) {
	if len(b.mails) == 0 {
		return nil, nil
	}
	ids := make([]uuid.UUID, 0, len(b.mails))
	for id := range b.mails {
		ids = append(ids, id)
	}
	// In one order: two consumers that were delivered the same events must not wait for each other in a circle.
	slices.SortFunc(ids, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
	q := db.New(c.pool)
	mine, err := q.EnterInbox(ctx, db.EnterInboxParams{
		Consumer: EmailConsumer, EventIds: ids, Holder: c.holder, AbandonedAfter: c.abandonedAfter,
	})
	if err != nil || len(mine) == len(ids) {
		return mine, err
	}
	finished, err := q.FindFinished(ctx, db.FindFinishedParams{Consumer: EmailConsumer, EventIds: ids})
	if err != nil {
		return nil, err
	}
	b.finished(finished)
	return mine, nil
}

// send sends the mails of the events, several at once, and returns those that were sent. A mail that fails is left to be
// delivered again, and holds nobody up.
func (c *Consumer) send(ctx context.Context, b *batch, events []uuid.UUID) []uuid.UUID {
	accepted := make([]bool, len(events))
	var sends errgroup.Group
	sends.SetLimit(concurrentSends)
	for i, id := range events {
		sends.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, sendTimeout)
			defer cancel()
			if err := c.sender.Send(ctx, b.mails[id]); err != nil {
				c.log.ErrorContext(ctx, "A mail was not sent, and will be tried again", "event", id, "order", b.mails[id].OrderID, "error", err)
				return nil
			}
			accepted[i] = true
			return nil
		})
	}
	_ = sends.Wait()
	var sent []uuid.UUID
	for i, id := range events {
		if accepted[i] {
			sent = append(sent, id)
		}
	}
	return sent
}

// persist does a step until it succeeds or ctx is done.
func (c *Consumer) persist(ctx context.Context, doing string, step func(context.Context) error) error {
	attempt := func() error {
		ctx, cancel := context.WithTimeout(ctx, stepTimeout)
		defer cancel()
		return step(ctx)
	}
	failed := backoff{least: failedLeast, most: failedMost}
	failing := trouble{log: c.log, doing: doing}
	for {
		err := attempt()
		failing.note(ctx, err)
		if err == nil {
			return nil
		}
		if !failed.wait(ctx, nil) {
			return err
		}
	}
}
