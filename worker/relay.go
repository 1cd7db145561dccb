package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/fault"
)

const (
	// relayBatch is the most events a relay claims at once.
	relayBatch = 1000
	// turnLock is the advisory lock that a relay holds while it publishes: one at a time, so the order is kept.
	turnLock = 0x6f7574626f78 // "outbox"
	// publishTimeout bounds the one slow thing that happens inside a transaction.
	publishTimeout = 3 * time.Second
	// stallTimeout is when PostgreSQL ends the transaction of a relay that does nothing. It is longer than publishing may
	// take.
	stallTimeout = 5 * time.Second
	// relayTimeout bounds a whole round: a PostgreSQL that is silent shall be noticed, and said.
	relayTimeout = 15 * time.Second
	// An idle relay looks at the outbox again after idleLeast, then less and less often.
	idleLeast, idleMost = 5 * time.Millisecond, 250 * time.Millisecond
	// A relay that failed tries again after failedLeast, then less and less often.
	failedLeast, failedMost = 50 * time.Millisecond, 2 * time.Second
	// checkEvery is how often a relay that has the turn makes sure that the broker has not forgotten, and looks after events
	// that are held back. An idle one does the latter with each poll.
	checkEvery = time.Second
	// surveyEvery is how often a relay asks who writes to the outbox, so that the floor may rise.
	surveyEvery = 20 * time.Millisecond
	// lookEvery is how often a relay looks for events below the floor, and lookTimeout how long that may take.
	lookEvery, lookTimeout = time.Minute, 30 * time.Second
)

// Relay moves outbox events to a broker. Any number may run, in any number of processes: they alternate turns.
type Relay struct {
	pool         *pgxpool.Pool
	publisher    broker.Publisher
	log          *slog.Logger
	nudged       chan struct{}
	stallTimeout time.Duration
	timeout      time.Duration
	checkEvery   time.Duration
	surveyEvery  time.Duration
	floor        floor
	batch        int32     // the most events that the next round claims
	epoch        string    // the broker's, as this relay knows it
	surveyed     time.Time // when the writers were last asked for, in a turn that committed
	checked      time.Time // when the epoch was, likewise
}

// NewRelay returns a relay from the outbox of a migrated database to publisher.
func NewRelay(pool *pgxpool.Pool, publisher broker.Publisher, log *slog.Logger) *Relay {
	return &Relay{pool: pool, publisher: publisher, log: log, nudged: make(chan struct{}, 1), stallTimeout: stallTimeout, timeout: relayTimeout, checkEvery: checkEvery, surveyEvery: surveyEvery, floor: floor{patience: patience}, batch: relayBatch}
}

// Nudge tells the relay that there may be something in the outbox. It never blocks. A relay that is not nudged polls.
func (r *Relay) Nudge() {
	select {
	case r.nudged <- struct{}{}:
	default:
	}
}

// Run publishes until ctx is done; then it finishes the batch it holds.
func (r *Relay) Run(ctx context.Context) {
	idle, failed := backoff{least: idleLeast, most: idleMost}, backoff{least: failedLeast, most: failedMost}
	publishing := trouble{log: r.log, doing: "Publishing outbox events"}
	ctx, stop := context.WithCancel(ctx)
	var looking sync.WaitGroup
	defer looking.Wait()
	defer stop() // a panic would wait for ever, and with it the relay
	looking.Go(func() { r.keepLooking(ctx) })
	for ctx.Err() == nil {
		done, err := r.take(ctx)
		publishing.note(ctx, err)
		switch {
		case err != nil:
			failed.wait(ctx, nil)
		case !done.busy():
			failed.reset()
			idle.wait(ctx, r.nudged)
		default:
			fault.RelayCommitted.Reached()
			failed.reset()
			idle.reset()
		}
	}
}

// Drain publishes until the outbox is empty, or another relay has the turn.
func (r *Relay) Drain(ctx context.Context) error {
	for {
		if done, err := r.take(ctx); !done.busy() || err != nil {
			return err
		}
	}
}

// runOnce takes a turn and returns how many events were published.
func (r *Relay) runOnce(ctx context.Context) (int, error) {
	done, err := r.take(ctx)
	return done.published, err
}

// take takes the turn, claims a batch, publishes it and commits; it does nothing when another relay has the turn. After an error
// nothing happened, but events may have been published that will be again.
func (r *Relay) take(ctx context.Context) (round, error) {
	ctx, cancel := finishing(ctx, r.timeout)
	defer cancel()
	done := round{batch: r.batch, surveys: time.Since(r.surveyed) >= r.surveyEvery}
	err := pgx.BeginTxFunc(ctx, r.pool, connect.Tx(r.stallTimeout, 0), func(tx pgx.Tx) error {
		return r.round(ctx, db.New(fault.SQL(tx)), &done)
	})
	if errors.Is(err, errLeft) {
		return round{claimed: true}, nil // the next one claims from where the floor is now
	}
	if err != nil {
		r.checked = time.Time{}        // the broker may be in another epoch
		r.batch = max(1, done.batch/2) // a smaller one may be done in time
		return round{}, err
	}
	r.batch = relayBatch
	done.settle(r)
	return done, nil
}

// round is what was done in a turn, to be believed when the transaction has committed.
type round struct {
	batch     int32 // the most events to claim
	surveys   bool  // asks who writes
	turn      db.TakeTurnRow
	claimed   bool  // events were claimed, or there are more to publish again
	upTo      int64 // above the floor, nothing is left that is not above this id
	published int
	gated     bool // nothing could be claimed, because events are published again
	checked   bool
	notes     []func() // what to put into the log
}

// busy tells that there may be more to do.
func (done round) busy() bool { return done.claimed || done.published > 0 }

// round does what there is to do in one transaction: first it makes sure that the broker still is what it was; then it
// publishes what is new, or, when there is nothing new, what has to be published again.
func (r *Relay) round(ctx context.Context, q *db.Queries, done *round) (err error) {
	if done.turn, err = q.TakeTurn(ctx, db.TakeTurnParams{Turn: turnLock, Writers: done.surveys}); err != nil {
		return fmt.Errorf("take the turn: %w", err)
	}
	if !done.turn.Taken {
		return nil
	}
	fault.RelayTurn.Reached()
	if time.Since(r.checked) >= r.checkEvery {
		done.checked = true
		if err := r.checkEpoch(ctx, q, done); err != nil {
			return err
		}
	}
	rows, err := q.ClaimOutboxBatch(ctx, db.ClaimOutboxBatchParams{Floor: r.floor.get(), Epoch: r.epoch, BatchSize: done.batch})
	if err != nil {
		return fmt.Errorf("claim a batch: %w", err)
	}
	if err := r.checkPassed(ctx, q); err != nil {
		return err
	}
	done.claimed, done.upTo = len(rows) > 0, math.MaxInt64
	if len(rows) >= int(done.batch) {
		done.upTo = rows[len(rows)-1].ID
	}
	batch := make([]claimed, len(rows))
	for i, row := range rows {
		fault.RelayClaimed.Reached()
		batch[i] = claimed{row.ID, row.PublishedAt, row.Behind,
			broker.EventOf(row.EventID, row.Source, row.EventType, row.AggregateID, row.CreatedAt, row.Payload, row.Traceparent)}
	}
	if err := r.publishOrHold(ctx, q, batch, done); err != nil {
		return err
	}
	if done.checked || !done.claimed {
		return r.publishAgain(ctx, q, done)
	}
	return nil
}

// errLeft: somebody has ended whom the floor had passed, and what it left may be missing from a claim.
var errLeft = errors.New("a transaction that wrote to the outbox for long has ended")

// checkPassed makes sure, after a claim, that whom the floor has passed had left nothing yet. Else an event could overtake an earlier
// one of its order, whose transaction ended just before the claim.
func (r *Relay) checkPassed(ctx context.Context, q *db.Queries) error {
	if !r.floor.hasPassed() {
		return nil
	}
	writers, err := q.FindWriters(ctx)
	if err != nil {
		return fmt.Errorf("ask who writes to the outbox: %w", err)
	}
	if !r.floor.holds(writers) {
		return errLeft
	}
	return nil
}

// settle notes a committed round.
func (done round) settle(r *Relay) {
	if done.checked {
		r.checked = time.Now()
	}
	if done.surveys && done.turn.Taken && !done.gated {
		r.floor.raise(done.turn, done.upTo)
		r.surveyed = time.Now()
	}
	for _, note := range done.notes {
		note()
	}
}

// keepLooking looks below the floor from time to time, until ctx is done.
func (r *Relay) keepLooking(ctx context.Context) {
	for ticker := time.NewTicker(lookEvery); ; {
		select {
		case <-ctx.Done():
			ticker.Stop()
			return
		case <-ticker.C:
			r.look(ctx) // whatever keeps it from looking keeps the relay from publishing, which says so
		}
	}
}

// look searches for events at or below the floor, and lowers the floor below the first it finds. It does not take the turn,
// and may walk over everything that was ever published: others go on meanwhile.
func (r *Relay) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	found, err := db.New(r.pool).FindLowestOutboxID(ctx, r.floor.get())
	if err != nil || found == 0 {
		return
	}
	r.log.WarnContext(ctx, "An event was left behind, and is published now", "id", found)
	r.floor.lower(found)
	r.Nudge()
}

// claimed is an event that stands in the archive, and is to be published.
type claimed struct {
	id          int64
	publishedAt time.Time
	behind      bool // others of its order are held back
	event       broker.Event
}

// publishOrHold publishes events that stand in the archive, and takes those out of it, to be held back, that are refused or that
// have to wait for another of their order.
func (r *Relay) publishOrHold(ctx context.Context, q *db.Queries, batch []claimed, done *round) error {
	held := db.HoldEventsParams{}
	hold := func(c claimed, reason string) {
		held.Ids = append(held.Ids, c.id)
		held.PublishedAt = append(held.PublishedAt, c.publishedAt)
		held.Errors = append(held.Errors, reason)
		held.Delays = append(held.Delays, retryDelay(1))
	}
	events, places := make([]broker.Event, 0, len(batch)), make([]int, 0, len(batch))
	for i, c := range batch {
		if c.behind {
			hold(c, "")
			continue
		}
		events, places = append(events, c.event), append(places, i)
	}
	outcomes, err := r.publish(ctx, events)
	if err != nil {
		return err
	}
	for i, outcome := range outcomes {
		switch c := batch[places[i]]; {
		case outcome == nil:
			done.published++
		case errors.Is(outcome, errBehind):
			hold(c, "")
		default:
			hold(c, outcome.Error())
			done.note(r, slog.LevelWarn, "The broker refused an event, which will be tried again", "event", c.event.ID, "order", c.event.Subject, "error", outcome)
		}
	}
	if len(held.Ids) == 0 {
		return nil
	}
	if err := q.HoldEvents(ctx, held); err != nil {
		return fmt.Errorf("hold events back: %w", err)
	}
	fault.RelayHeld.Reached()
	return nil
}

// errBehind: an event before it, of the same order, was refused.
var errBehind = errors.New("an event before it was refused")

// publish publishes events and returns what became of each: nil, errBehind, or why the broker refused it. An error means that
// none may be believed published. Events of one order go one after the other, so that none overtakes one that is refused.
func (r *Relay) publish(ctx context.Context, events []broker.Event) ([]error, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout, errors.New("the broker did not answer in time"))
	defer cancel()
	outcomes := make([]error, len(events))
	refused := map[string]bool{}
	for _, wave := range waves(events) {
		batch, places := make([]broker.Event, 0, len(wave)), make([]int, 0, len(wave))
		for _, i := range wave {
			if refused[events[i].Subject] {
				outcomes[i] = errBehind
				continue
			}
			batch, places = append(batch, events[i]), append(places, i)
		}
		err := r.publisher.Publish(ctx, r.epoch, batch)
		fault.RelayPublished.Reached()
		var refusal *broker.RefusedError
		if err != nil && !errors.As(err, &refusal) {
			return nil, err
		}
		if refusal == nil {
			continue
		}
		for n, reason := range refusal.Events {
			outcomes[places[n]] = reason
			refused[batch[n].Subject] = true
		}
	}
	return outcomes, nil
}

// waves puts the indexes of events into groups, in order, such that no order has two events in one.
func waves(events []broker.Event) [][]int {
	var groups [][]int
	seen := make(map[string]int, len(events)) // how many events of an order there were
	for i, e := range events {
		n := seen[e.Subject]
		seen[e.Subject]++
		if n == len(groups) {
			groups = append(groups, make([]int, 0, len(events)-i))
		}
		groups[n] = append(groups[n], i)
	}
	return groups
}

func (done *round) note(r *Relay, level slog.Level, message string, args ...any) {
	done.notes = append(done.notes, func() { r.log.Log(context.Background(), level, message, args...) })
}
