package order

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/db"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/gather"
)

const (
	// waitTimeout bounds how long a send waits for its batch to begin, and timeout what PostgreSQL is given for the batch.
	// Together they are shorter than a reservation lasts.
	waitTimeout = 2 * time.Second
	timeout     = 5 * time.Second
	// lockWait is how long a batch waits for a key that another transaction is writing, and aloneLockWait how long a send
	// does that is placed alone, with its neighbours waiting behind it.
	lockWait      = time.Second
	aloneLockWait = 100 * time.Millisecond
	// stallTimeout is when PostgreSQL ends a transaction that nobody goes on with.
	stallTimeout = 5 * time.Second
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

// findAll finds what is committed under the keys of a batch of sends.
func (s *Store) findAll(sends []Send) []Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	held, err := find(ctx, db.New(s.pool), keysOf(sends))
	absent := idempotency.ErrNotCommitted
	if err != nil {
		absent = fmt.Errorf("find idempotency keys: %w: %w", ErrUnavailable, err)
	}
	s.memory.learn(sends, held)
	return judgeAll(sends, make([]uuid.UUID, len(sends)), held, absent)
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
// the sake of one row, each send is placed alone, so that nobody pays for a neighbour.
func (s *Store) placeAll(sends []Send) []Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	results, refused := s.insist(ctx, sends, lockWait)
	if refused == nil || passing(refused) || len(sends) == 1 {
		return results
	}
	for i := range sends {
		if ctx.Err() != nil {
			results[i] = Result{Err: fmt.Errorf("place orders one by one: %w: %w", ErrUnavailable, ctx.Err())}
			continue
		}
		alone, _ := s.insist(ctx, sends[i:i+1], aloneLockWait)
		results[i] = alone[0]
	}
	return results
}

// insist places a batch, and again when others stood in its way by a deadlock or a serialization failure.
func (s *Store) insist(ctx context.Context, sends []Send, lockWait time.Duration) ([]Result, *pgconn.PgError) {
	const tries = 3
	for try := 1; ; try++ {
		results, refused := s.placeBatch(ctx, sends, lockWait)
		if refused == nil || !passing(refused) || try == tries {
			return results, refused
		}
	}
}

// passing tells whether PostgreSQL refused a transaction only for what others did at the same time.
func passing(refused *pgconn.PgError) bool {
	return refused.Code == "40001" || refused.Code == "40P01" // serialization_failure, deadlock_detected
}

// placeBatch places a batch of sends in one transaction and returns a result for each, in their order, and what
// PostgreSQL refused the batch for, if it did.
func (s *Store) placeBatch(ctx context.Context, sends []Send, lockWait time.Duration) ([]Result, *pgconn.PgError) {
	ids := newIDs(len(sends))
	var held map[idempotency.Key]holding
	committing := false
	err := pgx.BeginTxFunc(ctx, s.pool, connect.Tx(stallTimeout, lockWait), func(tx pgx.Tx) (err error) {
		held, err = s.placeTx(ctx, tx, sends, ids)
		committing = err == nil
		return err
	})
	if err != nil && !committing {
		refused, err := refusal(err)
		return judgeAll(sends, ids, nil, fmt.Errorf("place orders: %w", err)), refused
	}
	absent := ErrUnavailable // a key that was lost to another send, and gone when it was read
	if err != nil {
		var lookUpErr error
		held, lookUpErr = s.lookUp(ctx, keysOf(sends))
		absent = errors.Join(idempotency.ErrOutcomeUnknown, err, lookUpErr)
	}
	s.memory.learn(sends, held)
	results := judgeAll(sends, ids, held, absent)
	if slices.ContainsFunc(results, func(r Result) bool { return r.Err == nil && !r.Placement.Replayed }) {
		s.committed()
	}
	return results, nil
}

// refusal returns what PostgreSQL refused a batch for, if it answered: rows that are wrong (SQLSTATE classes 22 and 23),
// which sending them again would not change; what others did at the same time; or a row that another transaction holds
// (lock_not_available, or query_canceled by a statement_timeout). All but the first make it unavailable, as any other error.
func refusal(err error) (*pgconn.PgError, error) {
	var refused *pgconn.PgError
	if !errors.As(err, &refused) {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	switch {
	case strings.HasPrefix(refused.Code, "22"), strings.HasPrefix(refused.Code, "23"):
		return refused, err
	case passing(refused), refused.Code == "55P03", refused.Code == "57014":
		return refused, fmt.Errorf("%w: %w", ErrUnavailable, err)
	default:
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
}

// holding is a key and the order it holds.
type holding struct {
	fingerprint idempotency.Fingerprint
	orderID     uuid.UUID
	createdAt   time.Time
	expiresAt   time.Time
}

// placeTx writes the keys, orders and outbox events of a batch in the caller's transaction, and returns who holds each
// key. ids are the ids that the orders get if their sends win. Two sends of one key meet here: the first stands for both.
func (s *Store) placeTx(ctx context.Context, tx pgx.Tx, sends []Send, ids []uuid.UUID) (map[idempotency.Key]holding, error) {
	q := db.New(tx)
	firsts := firstOfEachKey(sends)
	held, err := s.takeKeys(ctx, q, sends, ids, firsts)
	if err != nil {
		return nil, err
	}
	winners, losers := firsts[:0:0], []idempotency.Key(nil)
	for _, i := range firsts {
		if _, won := held[sends[i].Key]; won {
			winners = append(winners, i)
		} else {
			losers = append(losers, sends[i].Key)
		}
	}
	if len(winners) > 0 {
		if err := insertOrders(ctx, q, sends, ids, winners, held); err != nil {
			return nil, err
		}
	}
	if len(losers) > 0 {
		lost, err := find(ctx, q, losers)
		if err != nil {
			return nil, fmt.Errorf("read keys that are held: %w", err)
		}
		for key, holder := range lost {
			held[key] = holder
		}
	}
	return held, nil
}

// firstOfEachKey returns the index of the first send of each key, in the order of keys: two batches that share keys then
// take them in the same order, and neither waits for the other in a circle.
func firstOfEachKey(sends []Send) []int {
	seen := make(map[idempotency.Key]bool, len(sends))
	firsts := make([]int, 0, len(sends))
	for i, send := range sends {
		if !seen[send.Key] {
			seen[send.Key] = true
			firsts = append(firsts, i)
		}
	}
	slices.SortFunc(firsts, func(a, b int) int {
		x, y := sends[a].Key, sends[b].Key
		return cmp.Or(cmp.Compare(x.Caller, y.Caller), cmp.Compare(x.Operation, y.Operation), cmp.Compare(x.Value, y.Value))
	})
	return firsts
}

// takeKeys inserts the keys of the sends at indexes, and returns those that were free.
func (s *Store) takeKeys(ctx context.Context, q *db.Queries, sends []Send, ids []uuid.UUID, indexes []int) (map[idempotency.Key]holding, error) {
	p := db.InsertIdempotencyKeysParams{Retention: s.retention}
	byID := make(map[uuid.UUID]int, len(indexes)) // where an order's key stands in p
	for n, i := range indexes {
		fingerprint := sends[i].Draft.Fingerprint()
		p.Callers = append(p.Callers, sends[i].Key.Caller)
		p.Operations = append(p.Operations, sends[i].Key.Operation)
		p.Keys = append(p.Keys, sends[i].Key.Value)
		p.Fingerprints = append(p.Fingerprints, fingerprint[:])
		p.OrderIds = append(p.OrderIds, ids[i])
		byID[ids[i]] = n
	}
	rows, err := q.InsertIdempotencyKeys(ctx, p)
	if err != nil {
		return nil, fmt.Errorf("insert idempotency keys: %w", err)
	}
	taken := make(map[idempotency.Key]holding, len(rows))
	for _, row := range rows {
		n := byID[row.OrderID]
		taken[sends[indexes[n]].Key] = holding{
			idempotency.Fingerprint(p.Fingerprints[n]), row.OrderID, row.CreatedAt.UTC(), row.ExpiresAt.UTC(),
		}
	}
	return taken, nil
}

// insertOrders inserts the orders of the sends at indexes, which hold their keys, and the events that announce them.
func insertOrders(ctx context.Context, q *db.Queries, sends []Send, ids []uuid.UUID, indexes []int, held map[idempotency.Key]holding) error {
	var orders db.InsertOrdersParams
	var events db.InsertOutboxEventsParams
	eventIDs := newIDs(len(indexes))
	for n, i := range indexes {
		send := sends[i]
		event := CreatedEvent(eventIDs[n], Order{
			ID: ids[i], UserID: send.Draft.UserID, Amount: send.Draft.Amount, CreatedAt: held[send.Key].createdAt,
		}, send.Traceparent)
		data, err := payload(event)
		if err != nil {
			return err
		}

		orders.Ids = append(orders.Ids, ids[i])
		orders.Callers = append(orders.Callers, send.Key.Caller)
		orders.UserIds = append(orders.UserIds, send.Draft.UserID)
		orders.Amounts = append(orders.Amounts, send.Draft.Amount)

		events.EventIds = append(events.EventIds, event.Id)
		events.AggregateIds = append(events.AggregateIds, event.Subject)
		events.EventTypes = append(events.EventTypes, string(event.Type))
		events.Sources = append(events.Sources, string(event.Source))
		events.Payloads = append(events.Payloads, data)
		events.Traceparents = append(events.Traceparents, send.Traceparent)
	}
	if err := q.InsertOrders(ctx, orders); err != nil {
		return fmt.Errorf("insert orders: %w", err)
	}
	if err := q.InsertOutboxEvents(ctx, events); err != nil {
		return fmt.Errorf("insert outbox events: %w", err)
	}
	return nil
}

// find returns who holds each of the keys; keys that nobody holds are left out.
func find(ctx context.Context, q *db.Queries, keys []idempotency.Key) (map[idempotency.Key]holding, error) {
	var p db.FindIdempotencyKeysParams
	for _, key := range keys {
		p.Callers = append(p.Callers, key.Caller)
		p.Operations = append(p.Operations, key.Operation)
		p.Keys = append(p.Keys, key.Value)
	}
	rows, err := q.FindIdempotencyKeys(ctx, p)
	if err != nil {
		return nil, err
	}
	held := make(map[idempotency.Key]holding, len(rows))
	for _, row := range rows {
		key := idempotency.Key{Caller: row.Caller, Operation: row.Operation, Value: row.Key}
		held[key] = holding{idempotency.Fingerprint(row.Fingerprint), row.OrderID, row.CreatedAt.UTC(), row.ExpiresAt.UTC()}
	}
	return held, nil
}

// lookUp asks who holds the keys after a COMMIT that returned an error, which is an unknown, not a failure. It asks over
// a connection of its own: those of the pool may be as broken as the one that failed.
func (s *Store) lookUp(ctx context.Context, keys []idempotency.Key) (map[idempotency.Key]holding, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookUpTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, s.pool.Config().ConnConfig)
	if err != nil {
		return nil, fmt.Errorf("connect to look up a commit: %w", err)
	}
	defer conn.Close(ctx)
	return find(ctx, db.New(conn), keys)
}

// judgeAll gives each send its result.
func judgeAll(sends []Send, ids []uuid.UUID, held map[idempotency.Key]holding, absent error) []Result {
	results := make([]Result, len(sends))
	for i, send := range sends {
		results[i] = judge(send, ids[i], held, absent)
	}
	return results
}

// judge gives a send its result: the order under its key, a mismatch, or the error absent when nobody holds the key.
func judge(send Send, id uuid.UUID, held map[idempotency.Key]holding, absent error) Result {
	holder, ok := held[send.Key]
	if !ok {
		return Result{Err: absent}
	}
	return holder.judge(send, id)
}

// judge gives a send of a key that is held its result. The send placed the order itself if the order has the id it would
// have got.
func (holder holding) judge(send Send, id uuid.UUID) Result {
	switch {
	case holder.fingerprint != send.Draft.Fingerprint():
		return Result{Err: idempotency.ErrMismatch}
	default:
		return Result{Placement: Placement{holder.orderID, holder.expiresAt, holder.orderID != id}}
	}
}

func keysOf(sends []Send) []idempotency.Key {
	keys := make([]idempotency.Key, len(sends))
	for i, send := range sends {
		keys[i] = send.Key
	}
	return keys
}

// newIDs returns n UUIDv7s: unique, and near each other in an index when made at about the same time.
func newIDs(n int) []uuid.UUID {
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = uuid.Must(uuid.NewV7())
	}
	return ids
}
