package order

import (
	"errors"
	"testing"
	"time"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
)

func TestWhatIsCommittedIsRememberedAndNothingElse(t *testing.T) {
	t.Parallel()
	pool := testenv.Database(t)
	store := NewStore(pool, time.Hour, nil)
	if _, err := store.Recall(send("k", 1)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("before: %v", err)
	}
	if _, err := store.Place(send("k", 0)); err == nil {
		t.Fatal("the database took an amount of 0")
	}
	if _, err := store.Recall(send("k", 0)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("what was refused is remembered: %v", err)
	}
	placed, err := store.Place(send("k", 1))
	if err != nil {
		t.Fatal(err)
	}
	want := placed
	want.Replayed = true
	if got, err := store.Recall(send("k", 1)); err != nil || got != want {
		t.Errorf("recalled %+v, %v; want %+v", got, err, want)
	}
	if _, err := store.Recall(send("k", 2)); !errors.Is(err, idempotency.ErrMismatch) {
		t.Errorf("another amount: %v", err)
	}
	foreign := send("k", 1)
	foreign.Key.Caller = "another"
	if _, err := store.Recall(foreign); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("another caller: %v", err)
	}

	other := NewStore(pool, time.Hour, nil) // learns by looking, or by losing
	if _, err := other.Find(send("k", 1)); err != nil {
		t.Fatal(err)
	}
	if got, err := other.Recall(send("k", 1)); err != nil || got != want {
		t.Errorf("the other recalled %+v, %v; want %+v", got, err, want)
	}
}

func TestANoteStandsWithItsAnswerAlone(t *testing.T) {
	t.Parallel()
	store := NewStore(testenv.Database(t), time.Hour, nil)
	key := send("k", 1).Key
	store.Note(key, Placement{}, "of a key that is not remembered")
	placed, err := store.Place(send("k", 1))
	if err != nil {
		t.Fatal(err)
	}
	if got := store.Noted(key); got != nil {
		t.Errorf("before: %v", got)
	}
	store.Note(key, placed, "first")
	store.Note(key, placed, "second")
	another, later := placed, placed
	another.OrderID, later.ExpiresAt = newID(), placed.ExpiresAt.Add(time.Second)
	store.Note(key, another, "of another order")
	store.Note(key, later, "of another time")
	if got := store.Noted(key); got != "second" {
		t.Errorf("noted is %v", got)
	}
	foreign := key
	foreign.Caller = "another"
	if got := store.Noted(foreign); got != nil {
		t.Errorf("another caller is told %v", got)
	}
	known, _ := store.memory.get(key)
	known.expiresAt = time.Now().Add(remembersShort)
	if got := store.Noted(key); got != nil {
		t.Errorf("of a key that is about to expire: %v", got)
	}
}

func TestAKeyThatIsAboutToExpireIsNotRemembered(t *testing.T) {
	t.Parallel()
	store := NewStore(testenv.Database(t), remembersShort, nil)
	if _, err := store.Place(send("k", 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Recall(send("k", 1)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("it is remembered: %v", err)
	}
	// Nor when its time comes between the look and the entry.
	past := &remembered{holding: holding{fingerprint: send("k", 1).Draft.Fingerprint(), expiresAt: time.Now()}}
	store.memory.held.Set(send("k", 1).Key.Digest(), past)
	if _, err := store.Recall(send("k", 1)); !errors.Is(err, idempotency.ErrNotCommitted) {
		t.Errorf("it is remembered for ever: %v", err)
	}
	if entry, ok := store.memory.held.GetEntryQuietly(send("k", 1).Key.Digest()); ok && entry.ExpiresAfter() > time.Second {
		t.Errorf("it is kept for %s", entry.ExpiresAfter())
	}
}
