package order

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/api"
	"idempotent-orders/gen/db"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func send(key string, amount int64) Send {
	return Send{
		Key:   idempotency.Key{Caller: "anonymous", Operation: Operation, Value: key},
		Draft: Draft{UserID: "user-456", Amount: amount},
	}
}

// write places a send in a transaction of the test's.
func write(t *testing.T, s *Store, tx pgx.Tx, send Send) error {
	t.Helper()
	digests, fingerprints := hashes([]Send{send})
	_, err := s.write(t.Context(), db.New(tx), []Send{send}, digests, fingerprints, newIDs(1), []int{0})
	return err
}

func TestEveryFieldOfADraftCountsInTheFingerprint(t *testing.T) {
	seen := map[idempotency.Fingerprint]Draft{}
	for _, d := range []Draft{
		{"user-456", 1000}, {"user-456", 1001}, {"user-457", 1000}, {"user-4561", 0}, {"user-45", 61000}, {"", 1000}, {"\x001000", 1},
		{"1000", 1}, {"user-456 ", 1000}, {"USER-456", 1000}, {"üser", 1}, {"u\u0308ser", 1},
	} {
		if other, ok := seen[d.Fingerprint()]; ok {
			t.Errorf("%v and %v have the same fingerprint", d, other)
		}
		seen[d.Fingerprint()] = d
	}
}

func TestKeyOrderAndEventAreWrittenTogether(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	commits := 0
	store := NewStore(pool, 24*time.Hour, func() { commits++ })
	s := send("k", 1234)
	s.Traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	placed, err := store.Place(s)
	if err != nil || placed.Replayed {
		t.Fatal(placed, err)
	}
	if commits != 1 {
		t.Errorf("the relay was told %d times; want once", commits)
	}

	o, err := store.Get(t.Context(), "anonymous", placed.OrderID)
	if err != nil || o.UserID != "user-456" || o.Amount != 1234 || o.Status != "created" {
		t.Errorf("the order is %+v, %v", o, err)
	}
	if _, err := store.Get(t.Context(), "another", placed.OrderID); !errors.Is(err, ErrNotFound) {
		t.Errorf("another caller gets %v; want ErrNotFound", err)
	}
	var digest bool
	row := pool.QueryRow(t.Context(), "SELECT digest = idempotency_digest(caller, operation, key) FROM idempotency_keys")
	if err := row.Scan(&digest); err != nil || !digest {
		t.Errorf("the digest is another in SQL, %v", err)
	}
	var exact bool
	row = pool.QueryRow(t.Context(), "SELECT expires_at = created_at + interval '24h' FROM idempotency_keys WHERE expires_at = $1", placed.ExpiresAt)
	if err := row.Scan(&exact); err != nil || !exact {
		t.Errorf("the key expires at %s, %v; want the retention after it was taken", placed.ExpiresAt, err)
	}

	var eventID, aggregate uuid.UUID
	var eventType, source, trace string
	var payload []byte
	var at time.Time
	row = pool.QueryRow(t.Context(), "SELECT event_id, aggregate_id, event_type, source, payload, traceparent, created_at FROM outbox")
	if err := row.Scan(&eventID, &aggregate, &eventType, &source, &payload, &trace, &at); err != nil {
		t.Fatal(err)
	}
	var data api.OrderCreatedV1Data
	if err := json.Unmarshal(payload, &data); err != nil {
		t.Fatal(err)
	}
	want := api.OrderCreatedV1Data{OrderId: placed.OrderID, UserId: "user-456", Amount: 1234, CreatedAt: o.CreatedAt}
	if data != want || eventID.Version() != 7 || aggregate != placed.OrderID || eventType != "order.created.v1" ||
		source != "/orders" || trace != s.Traceparent || !at.Equal(o.CreatedAt) {
		t.Errorf("the event is %s %s %s %s %s %s %s", eventID, aggregate, eventType, source, payload, trace, at)
	}
}

func TestALoserReplaysTheWinner(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	commits := 0
	store := NewStore(pool, time.Hour, func() { commits++ })
	first, err := store.Place(send("k", 1))
	if err != nil {
		t.Fatal(err)
	}
	again, err := store.Place(send("k", 1))
	if err != nil || again.OrderID != first.OrderID || again.ExpiresAt != first.ExpiresAt || !again.Replayed {
		t.Errorf("sent again, the key got %+v, %v; want a replay of %+v", again, err, first)
	}
	switch got, err := store.Place(send("k", 2)); {
	case errors.Is(err, idempotency.ErrMismatch):
	case err == nil && got.OrderID == first.OrderID:
		t.Error("another amount under the key got a replay of the first order; want ErrMismatch")
	default:
		t.Errorf("another amount under the key got %+v, %v; want ErrMismatch", got, err)
	}
	if commits != 1 {
		t.Errorf("the relay was told %d times; want once", commits)
	}
	count(t, pool, 1)

	found, err := store.Find(send("k", 1))
	if err != nil || found != again {
		t.Errorf("Find got %+v, %v; want %+v", found, err, again)
	}
	if got, err := store.Find(send("k", 2)); !errors.Is(err, idempotency.ErrMismatch) {
		t.Errorf("Find of another amount got %+v, %v; want ErrMismatch", got, err)
	}
	if got, err := store.Find(send("other", 1)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("Find of another key got %+v, %v; want ErrNotCommitted", got, err)
	}
}

func TestABatchIsJudgedSendBySend(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	old, err := store.Place(send("old", 7))
	if err != nil {
		t.Fatal(err)
	}
	foreign := send("new", 1)
	foreign.Key.Caller = "another"
	results, _ := store.placeBatch(t.Context(), []Send{
		send("new", 1), send("old", 7), send("old", 8), send("new", 1), send("new", 2), foreign, send("a", 3),
	})
	for i, want := range []struct {
		replayed bool
		err      error
	}{{}, {replayed: true}, {err: idempotency.ErrMismatch}, {replayed: true}, {err: idempotency.ErrMismatch}, {}, {}} {
		got := results[i]
		if got.Placement.Replayed != want.replayed || !errors.Is(got.Err, want.err) {
			t.Errorf("send %d got %+v; want %+v", i, got, want)
		}
	}
	if results[1].Placement.OrderID != old.OrderID || results[3].Placement.OrderID != results[0].Placement.OrderID {
		t.Errorf("replays have other orders: %+v", results)
	}
	if results[5].Placement.OrderID == results[0].Placement.OrderID {
		t.Error("two callers share an order")
	}
	count(t, pool, 4)
}

func TestAnExpiredKeyIsFreeAgain(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	first, err := store.Place(send("k", 1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pool.Exec(t.Context(), "UPDATE idempotency_keys SET expires_at = now()"); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Find(send("k", 1)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("Find got %v; want ErrNotCommitted", err)
	}
	second, err := store.Place(send("k", 2))
	if err != nil || second.Replayed || second.OrderID == first.OrderID {
		t.Errorf("a new order under the expired key got %+v, %v", second, err)
	}
	again, err := store.Place(send("k", 2))
	if err != nil || again.OrderID != second.OrderID || !again.Replayed {
		t.Errorf("its replay got %+v, %v", again, err)
	}
	var orders int
	if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&orders); err != nil || orders != 2 {
		t.Errorf("there are %d orders, %v; want 2", orders, err)
	}
}

func TestBatchesThatShareKeysInAnyOrderDoNotDeadlock(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	const keys, batches = 50, 16
	placed := atomic.Int64{}
	var group sync.WaitGroup
	for b := range batches {
		group.Go(func() {
			sends := make([]Send, keys)
			for i := range sends {
				sends[i] = send(fmt.Sprintf("k%d", (i*(b%7+1)+b)%keys), 1) // each batch in an order of its own
			}
			for _, r := range store.placeAll(sends) {
				if r.Err != nil {
					t.Error(r.Err)
				}
				if r.Err == nil && !r.Placement.Replayed {
					placed.Add(1)
				}
			}
		})
	}
	group.Wait()
	rows := 0
	if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&rows); err != nil || rows != int(placed.Load()) || rows > keys {
		t.Errorf("there are %d orders (%v), and %d sends say they placed one, of %d keys", rows, err, placed.Load(), keys)
	}
}

func TestConcurrentSendsShareTransactions(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	const sends = 500
	var group sync.WaitGroup
	for i := range sends {
		group.Go(func() {
			if placed, err := store.Place(send(fmt.Sprint(i), int64(i+1))); err != nil || placed.Replayed {
				t.Errorf("send %d got %+v, %v", i, placed, err)
			}
		})
	}
	group.Wait()
	count(t, pool, sends)
	var transactions int
	if err := pool.QueryRow(t.Context(), "SELECT count(DISTINCT xmin::text) FROM orders").Scan(&transactions); err != nil || transactions > sends/2 {
		t.Errorf("%d sends took %d transactions, %v", sends, transactions, err)
	}
}

func TestABatchThatOneRowSpoilsIsPlacedSendBySend(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	for i, result := range store.placeAll([]Send{send("a", 1), send("b", 0), send("c", 2), send("b", 0)}) {
		spoilt := i == 1 || i == 3
		if (result.Err != nil) != spoilt || errors.Is(result.Err, ErrUnavailable) {
			t.Errorf("send %d got %+v", i, result)
		}
	}
	count(t, pool, 2)
}

func TestAKeyThatIsHeldElsewhereDoesNotHoldItsNeighboursUp(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	elsewhere, err := pool.Begin(t.Context()) // a server that stopped in the middle
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Rollback(context.Background())
	if err := write(t, store, elsewhere, send("held", 1)); err != nil {
		t.Fatal(err)
	}
	results := store.placeAll([]Send{send("a", 1), send("held", 1), send("z", 1)})
	if results[0].Err != nil || results[2].Err != nil {
		t.Errorf("its neighbours got %v and %v", results[0].Err, results[2].Err)
	}
	if !errors.Is(results[1].Err, ErrUnavailable) {
		t.Errorf("the held one got %+v", results[1])
	}
	count(t, pool, 2)
}

func TestADeadlockIsTriedAgain(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	// Another transaction holds the orders and wants the keys that the batch has taken by then: a circle, of which
	// PostgreSQL ends the one that notices, which is the one that has waited for a second.
	other, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Rollback(context.Background())
	if _, err := other.Exec(t.Context(), "SET LOCAL deadlock_timeout = '1min'; SET LOCAL lock_timeout = 0; LOCK TABLE orders"); err != nil {
		t.Fatal(err)
	}
	placed := make(chan Result, 1)
	go func() { placed <- store.placeAll([]Send{send("k", 1)})[0] }()
	locked := make(chan error, 1)
	go func() {
		_, err := other.Exec(t.Context(), "LOCK TABLE idempotency_keys")
		locked <- errors.Join(err, other.Rollback(t.Context()))
	}()
	if err := <-locked; err != nil {
		t.Fatal(err)
	}
	if result := <-placed; result.Err != nil || result.Placement.Replayed {
		t.Errorf("the batch got %+v", result)
	}
	count(t, pool, 1)
}

func TestPlacingDoesNotDependOnTheDatabasesDefaults(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t)
	admin := testenv.Pool(t, address)
	for _, setting := range []string{
		"default_transaction_isolation = 'serializable'", "default_transaction_read_only = on", "timezone = 'America/Caracas'",
		"datestyle = 'SQL, DMY'", "intervalstyle = 'iso_8601'",
	} {
		if _, err := admin.Exec(t.Context(), "ALTER DATABASE "+admin.Config().ConnConfig.Database+" SET "+setting); err != nil {
			t.Fatal(err)
		}
	}
	pool := testenv.Pool(t, address)
	placed, err := NewStore(pool, time.Hour, nil).Place(send("k", 1))
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(placed.ExpiresAt); left > time.Hour || left < 59*time.Minute || placed.ExpiresAt.Location() != time.UTC {
		t.Errorf("the key expires at %s", placed.ExpiresAt)
	}
	count(t, pool, 1)
}

// A connection plans a statement once. For a small table, scanning it would be right.
func TestStatementsPlannedForSmallTablesUseTheIndexOfLargeOnes(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t)
	store := NewStore(testenv.Pool(t, address+"&pool_max_conns=1"), time.Hour, nil)
	use := func(key string) {
		t.Helper()
		placed, err := store.Place(send(key, 1))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := store.Find(send(key, 1)); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Get(t.Context(), "anonymous", placed.OrderID); err != nil {
			t.Fatal(err)
		}
	}
	use("first")
	admin := testenv.Pool(t, address)
	if _, err := admin.Exec(t.Context(), "VACUUM ANALYZE idempotency_keys, orders"); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		use(fmt.Sprint("early ", i))
	}
	const rows = 50_000
	for _, fill := range []string{
		"INSERT INTO idempotency_keys (digest, caller, operation, key, fingerprint, order_id, expires_at) SELECT gen_random_uuid(), 'anonymous', 'PlaceOrder', 'key ' || n, sha256(''), gen_random_uuid(), now() FROM generate_series(1, $1) n",
		"INSERT INTO orders (id, caller, user_id, amount) SELECT gen_random_uuid(), 'anonymous', 'u', 1 FROM generate_series(1, $1)",
	} {
		if _, err := admin.Exec(t.Context(), fill, rows); err != nil {
			t.Fatal(err)
		}
	}
	use("late")
	// What a session has done counts at once in its own transaction, that which was not reported yet included.
	var read int
	err := store.pool.QueryRow(t.Context(), `SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables
		WHERE relname IN ('idempotency_keys', 'orders')`).Scan(&read)
	if err != nil || read == 0 || read > 100 {
		t.Errorf("a few sends among %d keys read %d rows, %v", rows, read, err)
	}
}

func TestATransactionThatNobodyGoesOnWithIsEnded(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	left, err := pool.BeginTx(t.Context(), connect.Tx(100*time.Millisecond, 0)) // as when its server stops in the middle
	if err != nil {
		t.Fatal(err)
	}
	defer left.Rollback(context.Background())
	if err := write(t, NewStore(pool, time.Hour, nil), left, send("k", 1)); err != nil {
		t.Fatal(err)
	}
	if placed, err := NewStore(pool, time.Hour, nil).Place(send("k", 1)); err != nil || placed.Replayed {
		t.Errorf("the key is still held: %+v, %v", placed, err)
	}
	if err := left.Commit(t.Context()); err == nil {
		t.Error("the transaction that was left committed")
	}
	count(t, pool, 1)
}

func TestWhatPostgreSQLRefusesIsNotPlaced(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	_, err := NewStore(pool, time.Hour, nil).Place(send("k", 0))
	if err == nil || errors.Is(err, ErrUnavailable) || errors.Is(err, idempotency.ErrOutcomeUnknown) {
		t.Errorf("got %v; want an error that does not ask to send it again", err)
	}
	count(t, pool, 0)
}

// A statement that commits, and whose reply is lost, is an unknown: the proxy lets it through, or not, and cuts the line
// either way.
func TestALostCommitIsLookedUp(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name      string
		cut       testenv.Cut
		err       error
		committed int
	}{
		{"it arrived, so the order is there", testenv.AfterCommit, nil, 1},
		{"it did not arrive, so nobody knows", testenv.BeforeCommit, idempotency.ErrOutcomeUnknown, 0},
		{"it arrived, but nothing can be asked any more", testenv.AfterCommitForGood, idempotency.ErrOutcomeUnknown, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			address := testenv.DatabaseURL(t)
			direct := testenv.Pool(t, address)
			proxied := testenv.Pool(t, testenv.CutLine(t, address, test.cut))
			commits := 0
			store := NewStore(proxied, time.Hour, func() { commits++ })

			placed, err := store.Place(send("k", 1))
			count(t, direct, test.committed)
			switch {
			case test.err == nil && err != nil:
				t.Fatalf("the order was committed, and Place returned %v", err)
			case !errors.Is(err, test.err) || err == nil && placed.Replayed:
				t.Fatalf("got %+v, %v; want error %v", placed, err, test.err)
			}
			if err == nil && commits != 1 {
				t.Errorf("the relay was told %d times; want once", commits)
			}

			again, err := NewStore(direct, time.Hour, nil).Place(send("k", 1))
			if err != nil || again.Replayed != (test.committed == 1) {
				t.Errorf("sent again: %+v, %v", again, err)
			}
			count(t, direct, 1)
		})
	}
}

// count checks that there are n keys, n orders and n events.
func count(t *testing.T, pool *pgxpool.Pool, n int) {
	t.Helper()
	for _, table := range []string{"idempotency_keys", "orders", "outbox"} {
		var rows int
		if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM "+table).Scan(&rows); err != nil || rows != n {
			t.Errorf("%s has %d rows, %v; want %d", table, rows, err, n)
		}
	}
}
