package order

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/fault"
	"idempotent-orders/internal/gather"
)

const (
	// waitTimeout bounds how long a send waits for its batch to begin, and timeout what PostgreSQL is given for the batch.
	// Together they are shorter than a reservation lasts.
	waitTimeout = 2 * time.Second
	timeout     = 5 * time.Second
	// lookUpTimeout bounds the look after a commit whose outcome is unknown.
	lookUpTimeout = 2 * time.Second
)

// How sends gather. One batch under way is 4 to 8 % faster than two on two cores, and four are 15 to 25 % slower; but with
// one, a key that another server is writing would hold everybody up.
var (
	placing = gather.Limits{Batch: 256, UnderWay: 2, Waiting: 4096, Wait: waitTimeout}
	finding = gather.Limits{Batch: 256, UnderWay: 2, Waiting: 4096, Wait: waitTimeout}
)

// Store places and finds orders in PostgreSQL, those of concurrent callers together. It is safe for concurrent use.
type Store struct {
	pool      *pgxpool.Pool
	retention time.Duration
	committed func()
	places    *gather.Gatherer[Send, Result]
	finds     *gather.Gatherer[Send, Result]
	memory    memory
}

// NewStore returns a store on a migrated database. An idempotency key answers for retention after its order was placed.
// committed, if not nil, is called after each commit that wrote events to the outbox; it must not block.
func NewStore(pool *pgxpool.Pool, retention time.Duration, committed func()) *Store {
	if committed == nil {
		committed = func() {}
	}
	s := &Store{pool: pool, retention: retention, committed: committed, memory: newMemory()}
	s.places = gather.New(placing, s.placeAll)
	s.finds = gather.New(finding, s.findAll)
	return s
}

// Place places an order, or returns the answer to the send that already did under the same key. It joins the batch that
// is gathering, and stays with it to the end: a caller that leaves does not leave an order half placed. Errors wrap
// idempotency.ErrMismatch, ErrUnavailable (nothing was committed) or idempotency.ErrOutcomeUnknown; any other says that
// PostgreSQL refused the order for what it is, and that nothing was committed.
func (s *Store) Place(send Send) (Placement, error) {
	result, err := s.places.Do(send)
	switch {
	case errors.Is(err, gather.ErrBusy):
		return Placement{}, fmt.Errorf("place an order: %w: %w", ErrUnavailable, err)
	case err != nil: // a panic, before or after the commit
		return Placement{}, fmt.Errorf("place an order: %w: %w", idempotency.ErrOutcomeUnknown, err)
	}
	return result.Placement, result.Err
}

// Find returns the answer to the send that was committed under the key of this one. Errors wrap
// idempotency.ErrNotCommitted, idempotency.ErrMismatch or ErrUnavailable.
func (s *Store) Find(send Send) (Placement, error) {
	result, err := s.finds.Do(send)
	if err != nil {
		return Placement{}, fmt.Errorf("find an idempotency key: %w: %w", ErrUnavailable, err)
	}
	return result.Placement, result.Err
}

// Recall returns the answer to the send that was committed under the key of this one, as Find does, if this process knows
// it: it asks nobody. ErrNotCommitted only tells that it does not.
func (s *Store) Recall(send Send) (Placement, error) {
	result := s.memory.recall(send)
	return result.Placement, result.Err
}

// Note keeps something of the caller's own with a key for as long as Recall knows the key, if answer is still what Recall returns.
// All notes have the same type.
func (s *Store) Note(key idempotency.Key, answer Placement, note any) {
	if known, ok := s.memory.get(key); ok && known.orderID == answer.OrderID && known.expiresAt.Equal(answer.ExpiresAt) {
		known.note.Store(note)
	}
}

// Noted returns what was noted last with a key that Recall knows, or nil.
func (s *Store) Noted(key idempotency.Key) any {
	known, ok := s.memory.get(key)
	if !ok {
		return nil
	}
	return known.note.Load()
}

// findAll finds what is committed under the keys of a batch of sends.
func (s *Store) findAll(sends []Send) []Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	digests, fingerprints := hashes(sends)
	holders, err := find(ctx, db.New(s.pool), digests)
	fault.PlaceFound.Reached()
	absent := idempotency.ErrNotCommitted
	if err != nil {
		absent = fmt.Errorf("find idempotency keys: %w: %w", ErrUnavailable, err)
	}
	s.memory.learn(holders)
	return judgeAll(digests, fingerprints, make([]uuid.UUID, len(sends)), holders, absent)
}

// Get returns the caller's order, or ErrNotFound, or an error that wraps ErrUnavailable.
func (s *Store) Get(ctx context.Context, caller string, id uuid.UUID) (Order, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	row, err := db.New(s.pool).GetOrder(ctx, db.GetOrderParams{ID: id, Caller: caller})
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return Order{}, ErrNotFound
	case err != nil:
		return Order{}, fmt.Errorf("get an order: %w: %w", ErrUnavailable, err)
	}
	o := Order(row)
	o.CreatedAt = o.CreatedAt.UTC()
	return o, nil
}

// placeAll places a batch of sends and returns a result for each, in their order. When PostgreSQL refuses the batch for
// what may be one row's sake, each send is placed alone, so that nobody pays for a neighbour.
func (s *Store) placeAll(sends []Send) []Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	results, refused := s.insist(ctx, sends)
	if refused == nil || !wrong(refused) && !held(refused) || len(sends) == 1 {
		return results
	}
	for i := range sends {
		if ctx.Err() != nil {
			results[i] = Result{Err: fmt.Errorf("place orders one by one: %w: %w", ErrUnavailable, ctx.Err())}
			continue
		}
		alone, _ := s.insist(ctx, sends[i:i+1])
		results[i] = alone[0]
	}
	return results
}

// insist places a batch, and again when others stood in its way by a deadlock or a serialization failure.
func (s *Store) insist(ctx context.Context, sends []Send) ([]Result, *pgconn.PgError) {
	const tries = 3
	for try := 1; ; try++ {
		results, refused := s.placeBatch(ctx, sends)
		if refused == nil || !passing(refused) || try == tries {
			return results, refused
		}
	}
}

// refusal returns what PostgreSQL refused a statement for, if it did: then nothing was committed. Any other error leaves the
// outcome unknown. (A session that is ended while its commit waits for a standby is closed without an error.)
func refusal(err error) *pgconn.PgError {
	var refused *pgconn.PgError
	errors.As(err, &refused)
	return refused
}

// wrong tells whether a batch was refused for what is in it (SQLSTATE classes 22 and 23): sent again it will be again.
func wrong(refused *pgconn.PgError) bool {
	return strings.HasPrefix(refused.Code, "22") || strings.HasPrefix(refused.Code, "23")
}

// held tells whether a batch was refused because it waited too long for a row that another transaction holds:
// lock_not_available, or query_canceled by a statement_timeout.
func held(refused *pgconn.PgError) bool { return refused.Code == "55P03" || refused.Code == "57014" }

// passing tells whether a batch was refused for what others did at the same time: serialization_failure, deadlock_detected.
func passing(refused *pgconn.PgError) bool { return refused.Code == "40001" || refused.Code == "40P01" }

// placeBatch places a batch of sends in one transaction and returns a result for each, in their order, and what
// PostgreSQL refused the batch for, if it did.
func (s *Store) placeBatch(ctx context.Context, sends []Send) ([]Result, *pgconn.PgError) {
	ids := newIDs(len(sends))
	digests, fingerprints := hashes(sends)
	firsts := firstOfEach(digests)
	var holders map[uuid.UUID]holding
	asked := false
	err := s.pool.AcquireFunc(ctx, func(conn *pgxpool.Conn) (err error) {
		asked = true
		fault.PlaceBegun.Reached()
		holders, err = s.write(ctx, db.New(fault.SQL(conn)), sends, digests, fingerprints, ids, firsts)
		return err
	})
	refused := refusal(err)
	switch {
	case err == nil:
	case asked && refused != nil && wrong(refused):
		return judgeAll(digests, fingerprints, ids, nil, fmt.Errorf("place orders: %w", err)), refused
	case !asked, refused != nil, pgconn.SafeToRetry(err), fault.CommitLookUp.Removed():
		return judgeAll(digests, fingerprints, ids, nil, fmt.Errorf("place orders: %w: %w", ErrUnavailable, err)), refused
	}
	var absent error
	if err == nil {
		fault.PlaceCommitted.Reached()
		absent = s.findLosers(ctx, digests, firsts, holders)
	} else {
		var lookUpErr error
		fault.PlaceUnknown.Reached()
		holders, lookUpErr = s.lookUp(ctx, digests)
		absent = errors.Join(idempotency.ErrOutcomeUnknown, err, lookUpErr)
	}
	s.memory.learn(holders)
	results := judgeAll(digests, fingerprints, ids, holders, absent)
	if slices.ContainsFunc(results, func(r Result) bool { return r.Err == nil && !r.Placement.Replayed }) {
		s.committed()
	}
	return results, nil
}

// holding is a key and the order it holds.
type holding struct {
	fingerprint idempotency.Fingerprint
	orderID     uuid.UUID
	expiresAt   time.Time
}

// firstOfEach returns the index of the first send of each key, in the order of digests: two batches that share keys then
// take them in the same order, and neither waits for the other in a circle.
func firstOfEach(digests []uuid.UUID) []int {
	seen := make(map[uuid.UUID]bool, len(digests))
	firsts := make([]int, 0, len(digests))
	for i, digest := range digests {
		if !seen[digest] {
			seen[digest] = true
			firsts = append(firsts, i)
		}
	}
	slices.SortFunc(firsts, func(a, b int) int { return bytes.Compare(digests[a][:], digests[b][:]) })
	return firsts
}

// write writes the keys, orders and outbox events of the sends at firsts in one statement, which is a transaction of its
// own, and returns the keys that were free. ids are the ids that the orders get.
func (s *Store) write(ctx context.Context, q *db.Queries, sends []Send, digests []uuid.UUID,
	fingerprints []idempotency.Fingerprint, ids []uuid.UUID, firsts []int) (map[uuid.UUID]holding, error) {
	now := time.Now().UTC().Truncate(time.Microsecond) // what PostgreSQL keeps
	p := db.PlaceOrdersParams{
		EventType: string(api.OrderCreatedV1TypeOrderCreated), Source: string(api.OrderCreatedV1SourceOrders),
		CreatedAt: now, Retention: s.retention,
	}
	byID := make(map[uuid.UUID]int, len(firsts)) // where an order stands in p
	for n, i := range firsts {
		send := sends[i]
		event := CreatedEvent(newID(), Order{ID: ids[i], UserID: send.Draft.UserID, Amount: send.Draft.Amount, CreatedAt: now}, send.Traceparent)
		data, err := payload(event)
		if err != nil {
			return nil, err
		}
		p.Digests = append(p.Digests, digests[i])
		p.Callers = append(p.Callers, send.Key.Caller)
		p.Operations = append(p.Operations, send.Key.Operation)
		p.Keys = append(p.Keys, send.Key.Value)
		p.Fingerprints = append(p.Fingerprints, fingerprints[i][:])
		p.OrderIds = append(p.OrderIds, ids[i])
		p.UserIds = append(p.UserIds, send.Draft.UserID)
		p.Amounts = append(p.Amounts, send.Draft.Amount)
		p.EventIds = append(p.EventIds, event.Id)
		p.Payloads = append(p.Payloads, data)
		p.Traceparents = append(p.Traceparents, send.Traceparent)
		byID[ids[i]] = n
	}
	rows, err := q.PlaceOrders(ctx, p)
	if err != nil {
		return nil, err
	}
	taken := make(map[uuid.UUID]holding, len(sends))
	for _, row := range rows {
		n := byID[row.OrderID]
		taken[p.Digests[n]] = holding{idempotency.Fingerprint(p.Fingerprints[n]), row.OrderID, row.ExpiresAt.UTC()}
	}
	return taken, nil
}

// findLosers adds those keys of the sends at firsts that others hold. It returns the error for a send whose key it did not find.
func (s *Store) findLosers(ctx context.Context, digests []uuid.UUID, firsts []int, holders map[uuid.UUID]holding) error {
	var lost []uuid.UUID
	for _, i := range firsts {
		if _, won := holders[digests[i]]; !won {
			lost = append(lost, digests[i])
		}
	}
	if len(lost) == 0 {
		return nil
	}
	fault.PlaceLost.Reached()
	others, err := find(ctx, db.New(s.pool), lost)
	maps.Copy(holders, others)
	if err != nil {
		return fmt.Errorf("find keys that are held: %w: %w", ErrUnavailable, err)
	}
	return ErrUnavailable // lost to another send, and gone when it was read
}

// find returns who holds each of the keys; keys that nobody holds are left out.
func find(ctx context.Context, q *db.Queries, digests []uuid.UUID) (map[uuid.UUID]holding, error) {
	rows, err := q.FindIdempotencyKeys(ctx, digests)
	if err != nil {
		return nil, err
	}
	holders := make(map[uuid.UUID]holding, len(rows))
	for _, row := range rows {
		holders[row.Digest] = holding{idempotency.Fingerprint(row.Fingerprint), row.OrderID, row.ExpiresAt.UTC()}
	}
	return holders, nil
}

// lookUp asks who holds the keys after a statement, and with it the commit, returned an error that is no refusal: an
// unknown, not a failure. It asks over a connection of its own: those of the pool may be as broken as the one that failed.
func (s *Store) lookUp(ctx context.Context, digests []uuid.UUID) (map[uuid.UUID]holding, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookUpTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	if err != nil {
		return nil, fmt.Errorf("connect to look up a commit: %w", err)
	}
	defer conn.Close(ctx)
	return find(ctx, db.New(conn), digests)
}

// judgeAll gives each send its result: the order under its key, a mismatch, or the error absent when nobody holds the key.
func judgeAll(digests []uuid.UUID, fingerprints []idempotency.Fingerprint, ids []uuid.UUID, holders map[uuid.UUID]holding, absent error) []Result {
	results := make([]Result, len(digests))
	for i, digest := range digests {
		if holder, ok := holders[digest]; ok {
			results[i] = holder.judge(fingerprints[i], ids[i])
		} else {
			results[i] = Result{Err: absent}
		}
	}
	return results
}

// judge gives a send with this fingerprint, of a key that is held, its result. The send placed the order itself if the order
// has the id it would have got.
func (holder holding) judge(fingerprint idempotency.Fingerprint, id uuid.UUID) Result {
	switch {
	case holder.fingerprint != fingerprint && !fault.Fingerprint.Removed():
		return Result{Err: idempotency.ErrMismatch}
	default:
		return Result{Placement: Placement{holder.orderID, holder.expiresAt, holder.orderID != id}}
	}
}

// hashes returns the digest of each send's key, and the fingerprint of its draft.
func hashes(sends []Send) ([]uuid.UUID, []idempotency.Fingerprint) {
	digests, fingerprints := make([]uuid.UUID, len(sends)), make([]idempotency.Fingerprint, len(sends))
	for i, send := range sends {
		digests[i], fingerprints[i] = send.Key.Digest(), send.Draft.Fingerprint()
	}
	return digests, fingerprints
}

// newIDs returns n UUIDv7s: unique, and near each other in an index when made at about the same time.
func newIDs(n int) []uuid.UUID {
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = newID()
	}
	return ids
}

func newID() uuid.UUID { return uuid.Must(uuid.NewV7()) }
