package worker

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/google/uuid"

	"idempotent-orders/gen/db"
	"idempotent-orders/internal/fault"
)

// enter takes the tasks into the inbox and returns the events that are this consumer's to send, and those that were finished
// before. The others are held by another consumer. It waits for a PostgreSQL that is away.
func (c *Consumer) enter(ctx context.Context, tasks []*task) (mine, finished []uuid.UUID, err error) {
	ids := idsOf(tasks)
	forced, oldest := forcedOf(tasks)
	// In one order: two consumers that were delivered the same events must not wait for each other in a circle.
	slices.SortFunc(ids, func(a, b uuid.UUID) int { return bytes.Compare(a[:], b[:]) })
	q := db.New(fault.SQL(c.pool))
	err = c.persist(ctx, "Entering the inbox", func(ctx context.Context) (err error) {
		if err := force(ctx, q, forced, oldest); err != nil {
			return err
		}
		mine, err = q.EnterInbox(ctx, db.EnterInboxParams{
			Consumer: EmailConsumer, EventIds: ids, Holder: c.holder, AbandonedAfter: c.abandonedAfter,
		})
		if err != nil || len(mine) == len(ids) {
			return err
		}
		finished, err = q.FindFinished(ctx, db.FindFinishedParams{Consumer: EmailConsumer, EventIds: ids})
		return err
	})
	return mine, finished, err
}

// mark marks the events sent, or dead if they have a reason, and returns those that this consumer still held. It waits for a
// PostgreSQL that is away.
func (c *Consumer) mark(ctx context.Context, tasks []*task) (marked []uuid.UUID, err error) {
	sent, dead := db.MarkSentParams{Consumer: EmailConsumer, Holder: c.holder}, db.MarkDeadParams{Consumer: EmailConsumer, Holder: c.holder}
	for _, t := range tasks {
		if t.reason == "" {
			sent.EventIds = append(sent.EventIds, t.mail.EventID)
			continue
		}
		dead.EventIds, dead.Reasons = append(dead.EventIds, t.mail.EventID), append(dead.Reasons, t.reason)
	}
	q := db.New(c.pool)
	if len(sent.EventIds) > 0 {
		err = c.persist(ctx, "Marking mails sent", func(ctx context.Context) (err error) {
			marked, err = q.MarkSent(ctx, sent)
			return err
		})
		fault.EmailMarked.Reached()
	}
	if err != nil || len(dead.EventIds) == 0 {
		return marked, err
	}
	var buried []uuid.UUID
	err = c.persist(ctx, "Marking events dead", func(ctx context.Context) (err error) {
		buried, err = q.MarkDead(ctx, dead)
		return err
	})
	return append(marked, buried...), err
}

// acknowledge tells the broker that deliveries need nothing more. It waits for a broker that is away.
func (c *Consumer) acknowledge(ctx context.Context, tags []string) error {
	if len(tags) == 0 {
		return nil
	}
	err := c.persist(ctx, "Acknowledging events", func(ctx context.Context) error { return c.subscription.Ack(ctx, tags) })
	fault.EmailAcknowledged.Reached()
	return err
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

func idsOf(tasks []*task) []uuid.UUID {
	ids := make([]uuid.UUID, len(tasks))
	for i, t := range tasks {
		ids[i] = t.mail.EventID
	}
	return ids
}

// reasonLength is how many bytes of an error are kept.
const reasonLength = 500

// reasonOf returns an error as PostgreSQL can keep it, whatever bytes a mail server has answered.
func reasonOf(err error) string {
	text := err.Error()
	text = strings.ReplaceAll(text[:min(len(text), reasonLength)], "\x00", "")
	return cmp.Or(strings.ToValidUTF8(text, "\uFFFD"), ErrRefused.Error())
}
