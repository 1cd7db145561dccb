package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/fault"
)

const (
	// maxAttempts is how often the broker may refuse an event before it is dead.
	maxAttempts = 8
	// An event that was refused n times is tried again after a random time up to retryLeast times 2 to the n, at most retryMost
	// (full jitter).
	retryLeast, retryMost = 250 * time.Millisecond, time.Minute
	// heldBatch is the most events that are held back of which one round tries some again.
	heldBatch = 100
	// redriveSlice is through how many published events a round goes that publishes again.
	redriveSlice = 2000
)

// checkEpoch compares the broker's life with the one that the relays know. When it is another, what was published and is not
// finished is published again, in this and the following rounds, before anything new is.
func (r *Relay) checkEpoch(ctx context.Context, q *db.Queries, done *round) error {
	state, err := q.GetRelayState(ctx)
	if err != nil {
		return fmt.Errorf("read the relay's state: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, publishTimeout, errors.New("the broker did not answer in time"))
	defer cancel()
	epoch, err := r.publisher.Epoch(ctx)
	if err != nil {
		return fmt.Errorf("ask the broker for its epoch: %w", err)
	}
	r.epoch = epoch
	if epoch == state.Epoch {
		return nil
	}
	if err := q.StartRedrive(ctx, epoch); err != nil {
		return fmt.Errorf("start publishing again: %w", err)
	}
	fault.RedriveNoted.Reached()
	if state.Epoch != "" {
		done.note(r, slog.LevelWarn, "The broker may have forgotten events: those that are not finished are published again")
	}
	return nil
}

// errOtherEpoch: another relay has found the broker in another epoch since this one asked. Whichever of the two servers they reach is
// right, what is published into the other would be lost, and nobody would look for it.
var errOtherEpoch = errors.New("another relay knows another epoch of the broker")

// publishAgain goes on with what has to be published again: after the broker forgot, everything that is not finished; else
// events that are held back and whose time has come.
func (r *Relay) publishAgain(ctx context.Context, q *db.Queries, done *round) error {
	state, err := q.GetRelayState(ctx)
	if err != nil {
		return fmt.Errorf("read the relay's state: %w", err)
	}
	if state.Epoch != r.epoch {
		return errOtherEpoch
	}
	if state.RedriveAt.Valid {
		done.gated = true
		return r.redrive(ctx, q, state.RedriveAt.Time, state.RedriveID, done)
	}
	return r.retry(ctx, q, done)
}

// redrive goes through the next slice of what was published before the broker forgot, oldest first, and publishes again what the
// consumer has not finished. What the broker did not forget is delivered twice; the inbox knows it.
func (r *Relay) redrive(ctx context.Context, q *db.Queries, at time.Time, id int64, done *round) error {
	end, err := q.FindEndOfSlice(ctx, db.FindEndOfSliceParams{AfterAt: at, AfterID: id, Events: redriveSlice - 1})
	last := errors.Is(err, pgx.ErrNoRows)
	if last {
		end, err = db.FindEndOfSliceRow{PublishedAt: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)}, nil
	}
	if err != nil {
		return fmt.Errorf("find a slice of the archive: %w", err)
	}
	rows, err := q.FindUnfinishedEvents(ctx, db.FindUnfinishedEventsParams{
		AfterAt: at, AfterID: id, ToAt: end.PublishedAt, ToID: end.ID, Consumer: EmailConsumer,
	})
	if err != nil {
		return fmt.Errorf("find events that are not finished: %w", err)
	}
	batch := make([]claimed, len(rows))
	for i, row := range rows {
		batch[i] = claimed{row.ID, row.PublishedAt, false,
			broker.EventOf(row.EventID, row.Source, row.EventType, row.AggregateID, row.CreatedAt, row.Payload, row.Traceparent)}
	}
	before := done.published
	if err := r.publishOrHold(ctx, q, batch, done); err != nil {
		return err
	}
	fault.RedrivePublished.Reached()
	done.claimed = true // there is more to do: another slice, or what is new
	more := int64(done.published - before)
	if !last {
		err = q.MoveRedrive(ctx, db.MoveRedriveParams{RedriveAt: end.PublishedAt, RedriveID: end.ID, More: more})
	} else {
		more, err = q.EndRedrive(ctx, more)
		done.note(r, slog.LevelInfo, "Everything that was not finished is published again", "events", more)
	}
	if err != nil {
		return fmt.Errorf("note how far events are published again: %w", err)
	}
	fault.RedriveMoved.Reached()
	return nil
}

// retry tries events again that are held back and whose time has come. One that the broker takes lets the next of its order
// follow, and so does one that is dead.
func (r *Relay) retry(ctx context.Context, q *db.Queries, done *round) error {
	rows, err := q.FindDueEvents(ctx, heldBatch)
	if err != nil {
		return fmt.Errorf("find events that are held back: %w", err)
	}
	if len(rows) == 0 {
		return nil
	}
	events := make([]broker.Event, len(rows))
	for i, row := range rows {
		events[i] = broker.EventOf(row.EventID, row.Source, row.EventType, row.AggregateID, row.CreatedAt, row.Payload, row.Traceparent)
	}
	outcomes, err := r.publish(ctx, events)
	if err != nil {
		return err
	}
	fault.RetryPublished.Reached()
	var published []int64
	var over []uuid.UUID // orders whose next event may follow
	for i, outcome := range outcomes {
		row := rows[i]
		switch {
		case outcome == nil:
			published, over = append(published, row.ID), append(over, row.AggregateID)
		case row.Attempts+1 < maxAttempts:
			err = errors.Join(err, q.RetryHeldEvent(ctx, db.RetryHeldEventParams{ID: row.ID, Delay: retryDelay(row.Attempts + 1), Error: outcome.Error()}))
		default:
			over = append(over, row.AggregateID)
			err = errors.Join(err, q.BuryHeldEvent(ctx, db.BuryHeldEventParams{ID: row.ID, Reason: outcome.Error()}))
			done.note(r, slog.LevelError, "The broker refused an event for good: it is dead", "event", row.EventID, "order", row.AggregateID, "attempts", row.Attempts+1, "error", outcome)
		}
	}
	done.published += len(published)
	err = errors.Join(err, q.ArchiveHeldEvents(ctx, published), q.ReleaseHeldEvents(ctx, over))
	if err != nil {
		return fmt.Errorf("note what became of events that were held back: %w", err)
	}
	fault.RetryArchived.Reached()
	return nil
}

// retryDelay returns how long an event waits that was refused so many times.
func retryDelay(attempts int32) time.Duration {
	return rand.N(min(retryLeast<<min(attempts, 20), retryMost)) + time.Millisecond // #nosec G404 -- jitter is no secret
}
