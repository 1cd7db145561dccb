package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/db"
	"idempotent-orders/internal/fault"
)

const (
	// sweepEvery is how often there is a round, and tellEvery how often the log says what the rounds have done.
	sweepEvery, tellEvery = 10 * time.Second, time.Minute
	// daysAhead is for how many days after today the archive has partitions.
	daysAhead = 7
	// sweepLock is the advisory lock of the process that sweeps.
	sweepLock = 0x7377656570 // "sweep"
	// stepTime bounds one statement of a round, and jobTime how long one job goes on in a round that others wait for.
	stepTime, jobTime = 15 * time.Second, 10 * time.Second
	// A step is followed by a rest restMost times as long: a sweep has a seventh of one connection's time, enough for 4,000 orders a
	// second or so. A round whose jobs were not done in time makes that one less for the next, until there is none: enough for 30,000.
	restMost, restLeast = 6, 0
	// sweepBatch is how many events a step looks at, and sweepPages how many pages of a table, which have a thousand rows at most: a
	// step takes one to three milliseconds.
	sweepBatch, sweepPages = 200, 8
	// restBatch is how many events a step takes out of the default partition. Each looks at all of it, so there are few.
	restBatch = 1000
	// expiredFor is how long events that left the archive are kept in the inbox at least. It is longer than anybody works on what
	// was received, or read from the archive, before.
	expiredFor = 24 * time.Hour
	// clocksApart is how far the clocks of Redis, PostgreSQL and the servers may be apart.
	clocksApart = time.Hour
	// keyPass is in how many rounds all keys are looked at, at the latest: an hour. A round looks at keyPages at least.
	keyPass, keyPages = 360, 2048
)

// Trimmer is a broker that keeps what it has delivered until it is told to trim.
type Trimmer interface {
	// Trim removes what every consumer has acknowledged, and returns how many events that were. Each of these must have come.
	Trim(ctx context.Context, consumers ...string) (int64, error)
	// Oldest returns since when the broker keeps events: what it accepted before it cannot deliver again. Zero: it keeps none.
	Oldest(ctx context.Context) (time.Time, error)
}

// Sweeper removes what is no longer needed, in small steps, and makes partitions ahead. Any number may run, in any number of
// processes: one at a time sweeps.
//
//   - The stream is trimmed below what every consumer group has acknowledged.
//   - A day of the archive leaves it when its end is older than the retention, the consumer has finished each of its events, and the
//     broker keeps nothing from that time: every consumer group has acknowledged it.
//   - A day later its events leave the inbox, once the broker keeps nothing from that time: an event is in the inbox for as long as
//     it could be delivered again, from the archive or from the stream. What is in the outbox, held back or dead stays in the inbox
//     too, because it is not in the archive.
//   - Idempotency keys that have expired are deleted.
type Sweeper struct {
	pool      *pgxpool.Pool
	trimmer   Trimmer
	retention time.Duration
	log       *slog.Logger

	grace       time.Duration // expiredFor
	jobTime     time.Duration
	rests       time.Duration // how many times as long as a step takes there is a rest after it
	keyPage     int64         // where the walk over the keys goes on
	day         time.Time     // the end of the day that is about to leave the archive
	dayPlace    place         // where the look at its events goes on
	expired     string        // the table that left the archive whose events are leaving the inbox
	expiredPage int64         // where the walk over that goes on
}

// NewSweeper returns a sweeper of a migrated database, and of a broker; nil for one that keeps nothing. Published events are kept
// for retention.
func NewSweeper(pool *pgxpool.Pool, trimmer Trimmer, retention time.Duration, log *slog.Logger) *Sweeper {
	return &Sweeper{pool: pool, trimmer: trimmer, retention: retention, log: log, grace: expiredFor, jobTime: jobTime, rests: restMost}
}

// swept is what rounds have removed.
type swept struct {
	trimmed, expired, forgotten, keys int64
	more                              bool // a job was not done when its time was up
}

func (s *swept) add(other swept) {
	s.trimmed += other.trimmed
	s.expired += other.expired
	s.forgotten += other.forgotten
	s.keys += other.keys
}

// Run sweeps until ctx is done.
func (s *Sweeper) Run(ctx context.Context) {
	sweeping := trouble{log: s.log, doing: "Sweeping"}
	failed := backoff{least: time.Second, most: time.Minute}
	var total swept
	for told := time.Now(); ctx.Err() == nil; {
		done, err := s.runOnce(ctx)
		total.add(done)
		if time.Since(told) >= tellEvery || ctx.Err() != nil {
			s.tell(total)
			told, total = time.Now(), swept{}
		}
		if ctx.Err() != nil {
			return
		}
		sweeping.note(ctx, err)
		if err != nil {
			failed.wait(ctx, nil)
			continue
		}
		failed.reset()
		if s.pace(done.more); done.more {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepEvery):
		}
	}
	s.tell(total)
}

// pace lets the next round rest less when this one was not done in time, and as much as may be when it was.
func (s *Sweeper) pace(behind bool) {
	if !behind {
		s.rests = restMost
		return
	}
	s.rests = max(s.rests-1, restLeast)
}

func (s *Sweeper) tell(total swept) {
	if total != (swept{}) {
		s.log.Info("Swept", "stream_entries", total.trimmed, "archive_rest", total.expired, "inbox", total.forgotten, "keys", total.keys)
	}
}

// runOnce does a round, if no other process is at it. The lock and the work go over one connection: who loses one has lost both.
func (s *Sweeper) runOnce(ctx context.Context) (done swept, err error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return done, fmt.Errorf("connect to sweep: %w", err)
	}
	defer conn.Release()
	q := db.New(conn)
	taken, err := q.TakeSweep(ctx, sweepLock)
	if err != nil || !taken {
		return done, err
	}
	fault.SweepBegun.Reached()
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		if q.EndSweep(ctx, sweepLock) != nil {
			_ = conn.Conn().Close(ctx) // ends the session, and with it the lock
		}
	}()
	for _, job := range []func(context.Context, *db.Queries, *swept) error{
		s.makePartitions, s.trim, s.advanceFinished, s.expireRest, s.expireDays, s.forgetExpired, s.deleteKeys,
	} {
		// What keeps one job from being done, such as a reader of the archive, need not keep the others.
		err = errors.Join(err, job(ctx, q, &done))
		if ctx.Err() != nil || conn.Conn().IsClosed() {
			break
		}
	}
	return done, err
}

// steps does step after step until one tells that it was the last, or has failed, or the job's time is up: then there is more. It
// rests in proportion to what each took: beside others who have much to do, a step takes longer, and so does the rest.
func (s *Sweeper) steps(ctx context.Context, done *swept, step func(context.Context) (last bool, err error)) error {
	for end := time.Now().Add(s.jobTime); ; {
		begun := time.Now()
		last, err := bounded(ctx, step)
		if err != nil || last {
			return err
		}
		if begun.After(end) {
			done.more = true
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(s.rests*time.Since(begun), s.jobTime)): // the turn is kept meanwhile
		}
	}
}

func bounded[T any](ctx context.Context, step func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	return step(ctx)
}

func (s *Sweeper) makePartitions(ctx context.Context, q *db.Queries, _ *swept) error {
	created, err := bounded(ctx, func(ctx context.Context) (int32, error) { return q.CreateOutboxPartitions(ctx, daysAhead) })
	if err != nil {
		return fmt.Errorf("create outbox partitions: %w", err)
	}
	if created > 0 {
		s.log.InfoContext(ctx, "Outbox partitions created", "days", created)
	}
	return nil
}

func createPartitions(ctx context.Context, pool *pgxpool.Pool) (int32, error) {
	return db.New(pool).CreateOutboxPartitions(ctx, daysAhead)
}

func (s *Sweeper) trim(ctx context.Context, _ *db.Queries, done *swept) error {
	if s.trimmer == nil {
		return nil
	}
	trimmed, err := bounded(ctx, func(ctx context.Context) (int64, error) { return s.trimmer.Trim(ctx, EmailConsumer) })
	done.trimmed += trimmed
	fault.SweepTrimmed.Reached()
	return err
}

// place is a place in the archive: after an event.
type place struct {
	at time.Time
	id int64
}

// advanceFinished moves the mark before which every published event is finished.
func (s *Sweeper) advanceFinished(ctx context.Context, q *db.Queries, done *swept) error {
	state, err := bounded(ctx, q.GetFinishedTo)
	if err != nil {
		return fmt.Errorf("read how far events are finished: %w", err)
	}
	at := place{at: state.FinishedTo}
	finished, err := s.lookAtFinished(ctx, q, &at, state.Settled, done)
	if finished {
		at.at = state.Settled
	}
	if at.at.After(state.FinishedTo) {
		err = errors.Join(err, q.MoveFinishedTo(ctx, db.MoveFinishedToParams{FinishedTo: at.at, Was: state.FinishedTo}))
	}
	if err != nil {
		return fmt.Errorf("note how far events are finished: %w", err)
	}
	fault.SweepMarked.Reached()
	return nil
}

// lookAtFinished walks over the events of the archive, on from a place to a time, and returns whether all of them are finished.
// It leaves the place where it stopped: every event that was published before then is finished.
func (s *Sweeper) lookAtFinished(ctx context.Context, q *db.Queries, at *place, before time.Time, done *swept) (finished bool, err error) {
	err = s.steps(ctx, done, func(ctx context.Context) (bool, error) {
		events, err := q.LookAtPublished(ctx, db.LookAtPublishedParams{
			Consumer: EmailConsumer, AfterAt: at.at, AfterID: at.id, Before: before, BatchSize: sweepBatch,
		})
		if err != nil {
			return false, err
		}
		for _, e := range events {
			if !e.Finished {
				*at = place{e.PublishedAt, e.ID - 1}
				return true, nil
			}
			*at = place{e.PublishedAt, e.ID}
		}
		finished = len(events) < sweepBatch
		return finished, nil
	})
	return finished, err
}

// expireRest takes what is old and finished out of the default partition.
func (s *Sweeper) expireRest(ctx context.Context, q *db.Queries, done *swept) error {
	retention := max(s.retention, 2*clocksApart) // else what comes now would always be from that time
	if kept, err := s.mayBeDelivered(ctx, time.Now().Add(-retention)); err != nil || kept {
		return err
	}
	err := s.steps(ctx, done, func(ctx context.Context) (bool, error) {
		n, err := q.ExpireRest(ctx, db.ExpireRestParams{Retention: retention, Consumer: EmailConsumer, BatchSize: restBatch})
		done.expired += int64(n)
		return n < restBatch, err
	})
	if err != nil {
		return fmt.Errorf("take events out of the default partition: %w", err)
	}
	return nil
}

// expireDays takes days out of the archive that are old and finished. The mark has said so; that is checked once more, event by
// event, because it was made at another time, and an operator may have made an event unfinished.
func (s *Sweeper) expireDays(ctx context.Context, q *db.Queries, done *swept) error {
	for {
		old, err := bounded(ctx, func(ctx context.Context) ([]time.Time, error) { return q.FindOldDay(ctx, s.retention) })
		if err != nil {
			return fmt.Errorf("find the oldest day of the archive: %w", err)
		}
		if len(old) == 0 {
			return nil
		}
		if !s.day.Equal(old[0]) {
			s.day, s.dayPlace = old[0], place{at: time.Unix(0, 0)}
		}
		finished, err := s.lookAtFinished(ctx, q, &s.dayPlace, old[0], done)
		if err != nil || !finished {
			return err
		}
		if kept, err := s.mayBeDelivered(ctx, old[0]); err != nil || kept {
			return err
		}
		name, err := bounded(ctx, func(ctx context.Context) (string, error) {
			return q.ExpireDay(ctx, db.ExpireDayParams{Ends: old[0], Turn: turnLock})
		})
		if err != nil {
			return fmt.Errorf("take a day out of the archive: %w", err)
		}
		fault.SweepExpired.Reached()
		s.log.InfoContext(ctx, "A day of published events has left the archive", "ends", old[0].UTC(), "table", name)
	}
}

// forgetExpired deletes from the inbox the events that left the archive long enough ago, and drops their table, when the broker
// keeps nothing any more from the time when they could still be published again.
func (s *Sweeper) forgetExpired(ctx context.Context, q *db.Queries, done *swept) error {
	found, err := bounded(ctx, func(ctx context.Context) ([]db.FindExpiredRow, error) { return q.FindExpired(ctx, s.grace) })
	if err != nil || len(found) == 0 {
		return err
	}
	expired := found[0]
	if kept, err := s.mayBeDelivered(ctx, expired.ExpiredAt); err != nil || kept {
		return err
	}
	if s.expired != expired.Name {
		s.expired, s.expiredPage = expired.Name, 0
	}
	err = s.walk(ctx, done, &s.expiredPage, expired.Pages, expired.Pages, func(ctx context.Context, page int64) error {
		n, err := q.ForgetExpired(ctx, db.ForgetExpiredParams{Name: expired.Name, Consumer: EmailConsumer, FirstPage: page, Pages: sweepPages})
		done.forgotten += int64(n)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete old events from the inbox: %w", err)
	}
	if s.expiredPage < expired.Pages {
		return nil
	}
	fault.SweepForgotten.Reached()
	if _, err := bounded(ctx, func(ctx context.Context) (any, error) { return nil, q.DropExpired(ctx, expired.Name) }); err != nil {
		return fmt.Errorf("drop table %s: %w", expired.Name, err)
	}
	s.expired = ""
	s.log.InfoContext(ctx, "Old published events are dropped", "table", expired.Name)
	return nil
}

// mayBeDelivered tells whether the broker keeps events from before a time.
func (s *Sweeper) mayBeDelivered(ctx context.Context, before time.Time) (bool, error) {
	if s.trimmer == nil {
		return false, nil
	}
	oldest, err := bounded(ctx, s.trimmer.Oldest)
	return !oldest.IsZero() && oldest.Before(before.Add(clocksApart)), err
}

// deleteKeys deletes keys that have expired. It walks over the whole table, a part in each round.
func (s *Sweeper) deleteKeys(ctx context.Context, q *db.Queries, done *swept) error {
	pages, err := bounded(ctx, q.CountKeyPages)
	if err != nil {
		return fmt.Errorf("ask how large the keys are: %w", err)
	}
	if s.keyPage >= pages {
		s.keyPage = 0
	}
	err = s.walk(ctx, done, &s.keyPage, pages, s.keyPage+max(pages/keyPass, keyPages), func(ctx context.Context, page int64) error {
		n, err := q.DeleteExpiredKeys(ctx, db.DeleteExpiredKeysParams{FirstPage: page, Pages: sweepPages})
		done.keys += int64(n)
		fault.SweepKeys.Reached()
		return err
	})
	if err != nil {
		return fmt.Errorf("delete expired keys: %w", err)
	}
	return nil
}

// walk does a step for the next pages of a table, and moves the page on, until the table's end or another.
func (s *Sweeper) walk(ctx context.Context, done *swept, page *int64, pages, until int64, step func(context.Context, int64) error) error {
	return s.steps(ctx, done, func(ctx context.Context) (bool, error) {
		if *page >= min(pages, until) {
			return true, nil
		}
		if err := step(ctx, *page); err != nil {
			return false, err
		}
		*page += sweepPages
		return *page >= min(pages, until), nil
	})
}
