// Package reconcile proves that nothing is missing: it compares orders, their idempotency keys, their events and the inbox of
// a consumer, as exact sets.
//
// An event is in one place at any time: pending in outbox, held back in outbox_held, published in outbox_published, or dead in
// outbox_dead. It moves in one transaction, and an order, its key and its event are written in one. So in one snapshot the sets
// agree, however busy the program is, and whatever differs is a fault, or not finished yet.
//
// PostgreSQL does the comparing, a statement for each difference, and returns counts and a few ids: this process holds no rows.
// The snapshot is held as long as that takes, and the sweep of old partitions waits for it; nothing else does.
package reconcile

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/api"
	"idempotent-orders/order"
)

const (
	// firstIDs is how many ids of a difference are shown.
	firstIDs = 10
	// onItsWay is how long a published event may take to the inbox before it counts as not delivered.
	onItsWay = time.Minute
	// clocksDiffer bounds how far the clocks of the servers and of PostgreSQL are believed to be apart. An order that is so
	// close to the end of its key's life is not asked for the key.
	clocksDiffer = 5 * time.Second
)

// Options say what is compared.
type Options struct {
	From, To     time.Time     // orders placed from From until before To; zero is open
	Consumer     string        // whose inbox
	KeyRetention time.Duration // how long a key answers after its order was placed
}

// Kind says what a difference means.
type Kind string

// What a difference may mean.
const (
	Missing    Kind = "missing"    // the sets disagree, and nothing is under way that will make them agree
	Unfinished Kind = "unfinished" // the program is still at it
	Dead       Kind = "dead"       // given up, with a reason: an operator decides
)

// Difference is a set that is empty when all is done and well.
type Difference struct {
	Name    string      `json:"name"`
	Kind    Kind        `json:"kind"`
	Meaning string      `json:"meaning"`
	Count   int64       `json:"count"`
	First   []uuid.UUID `json:"first"` // the lowest ids, which are the oldest
}

// Report is what one snapshot of the database shows.
type Report struct {
	At          time.Time    `json:"at"` // by PostgreSQL's clock
	From        time.Time    `json:"from,omitzero"`
	To          time.Time    `json:"to,omitzero"`
	Orders      int64        `json:"orders"`
	Sent        int64        `json:"sent"`               // of them, how many are finished well by the consumer, as the archive knows them
	KeptFrom    time.Time    `json:"kept_from,omitzero"` // the archive has every event published since; zero: every event ever
	Older       int64        `json:"older"`              // orders placed before KeptFrom, which may have no event left
	Missing     int64        `json:"missing"`            // the counts of all differences of the kind together
	Unfinished  int64        `json:"unfinished"`
	Dead        int64        `json:"dead"`
	Differences []Difference `json:"differences"` // all, also the empty ones, always in the same order
}

// settings make one transaction fit for reading whole tables; the pool's own suit single rows. Joins of whole tables are hashed or
// merged: a nested loop, planned while a table was small, would not end. Locks are waited for longer, as nobody waits for ours.
const settings = `
SET LOCAL enable_seqscan = on;
SET LOCAL enable_bitmapscan = on;
SET LOCAL enable_nestloop = off;
SET LOCAL plan_cache_mode = auto;
SET LOCAL jit = off;
SET LOCAL work_mem = '64MB';
SET LOCAL lock_timeout = '10s'`

// lock keeps the partitions that are there. It stands before the snapshot, so that both know the same ones.
const lock = `LOCK TABLE outbox_published IN ACCESS SHARE MODE`

// Run compares everything in one snapshot. It only reads, so it runs on a standby as well.
func Run(ctx context.Context, pool *pgxpool.Pool, o Options) (Report, error) {
	r := Report{From: o.From, To: o.To}
	err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, settings); err != nil {
			return fmt.Errorf("prepare the transaction: %w", err)
		}
		if _, err := tx.Exec(ctx, lock); err != nil {
			return fmt.Errorf("keep the archive's partitions: %w", err)
		}
		return r.read(ctx, tx, o)
	})
	if err != nil {
		return Report{}, fmt.Errorf("compare: %w", err)
	}
	return r, nil
}

func (r *Report) read(ctx context.Context, tx pgx.Tx, o Options) error {
	if err := tx.QueryRow(ctx, horizon).Scan(&r.At, &r.KeptFrom); err != nil {
		return fmt.Errorf("find where the archive begins: %w", err)
	}
	r.At = r.At.UTC()
	if r.KeptFrom = r.KeptFrom.UTC(); r.KeptFrom.Unix() <= 0 {
		r.KeptFrom = time.Time{}
	}
	args := o.args(r.At, r.KeptFrom)
	if err := tx.QueryRow(ctx, totals, args).Scan(&r.Orders, &r.Older, &r.Sent); err != nil {
		return fmt.Errorf("count orders: %w", err)
	}
	for _, c := range checks {
		d := Difference{Name: c.name, Kind: c.kind, Meaning: c.meaning, First: []uuid.UUID{}}
		if err := tx.QueryRow(ctx, fmt.Sprintf(counted, c.query), args).Scan(&d.Count, &d.First); err != nil {
			return fmt.Errorf("find %s: %w", c.meaning, err)
		}
		r.add(d)
	}
	return nil
}

func (r *Report) add(d Difference) {
	r.Differences = append(r.Differences, d)
	switch d.Kind {
	case Missing:
		r.Missing += d.Count
	case Unfinished:
		r.Unfinished += d.Count
	case Dead:
		r.Dead += d.Count
	}
}

// args are what the queries ask for by name.
func (o Options) args(at, keptFrom time.Time) pgx.NamedArgs {
	since := o.From
	if keptFrom.After(since) {
		since = keptFrom
	}
	return pgx.NamedArgs{
		"from":        orElse(o.From, pgtype.NegativeInfinity),
		"to":          orElse(o.To, pgtype.Infinity),
		"kept_from":   orElse(keptFrom, pgtype.NegativeInfinity),
		"since_id":    lowestID(since, uuid.Nil),
		"to_id":       lowestID(o.To, uuid.Max),
		"settled":     at.Add(-onItsWay),
		"keyed_since": at.Add(clocksDiffer - o.KeyRetention),
		"type":        string(api.OrderCreatedV1TypeOrderCreated),
		"consumer":    o.Consumer,
		"operation":   order.Operation,
		"limit":       firstIDs,
	}
}

func orElse(t time.Time, open pgtype.InfinityModifier) pgtype.Timestamptz {
	if t.IsZero() {
		return pgtype.Timestamptz{InfinityModifier: open, Valid: true}
	}
	return pgtype.Timestamptz{Time: t, Valid: true}
}

// lowestID returns an id that no UUIDv7 of t or later is below: they begin with the milliseconds since 1970.
func lowestID(t time.Time, open uuid.UUID) uuid.UUID {
	if t.IsZero() {
		return open
	}
	var id uuid.UUID
	ms := max(t.UnixMilli(), 0)
	for i := range 6 {
		id[i] = byte(ms >> (8 * (5 - i)) & 0xff)
	}
	return id
}
