package worker

import (
	"slices"
	"sync"
	"time"

	"idempotent-orders/gen/db"
)

// patience is how long the floor waits for those who write, before it passes what they may still commit.
const patience = 10 * time.Second

// floor is an id at or below which the outbox has nothing left, so that a claim need not walk over what was claimed before:
// while a transaction elsewhere holds an old snapshot, no vacuum removes that.
//
// An id may commit late, after higher ones. So the floor passes an id only when all transactions have ended that could have
// been given it: first the last id that was given out is noted; then, later, who writes to the outbox; and when none of those
// does any more, a claim that began after that has seen what they left.
//
// Who writes for longer than the patience is passed all the same: else each claim would walk over everything that was claimed
// meanwhile. Then it has to be asked after each claim whether they still write (holds). If one does not, the claim may lack what it
// left, and is not to be used: the floor goes back to where it was before it passed them.
//
// What this cannot know (a row that somebody has locked and that a claim skipped, a database that was put back in time) is
// found by look, which searches below the floor.
type floor struct {
	patience time.Duration

	mu      sync.Mutex
	id      int64     // guarded by mu, as all below
	given   int64     // the last id that was given out before the last round
	next    int64     // what id becomes when the writers have ended; 0 for nothing
	since   time.Time // when that was set
	writers []string  // the transactions that may have been given ids up to next, but for those that were passed
	passed  []string  // the transactions that were passed
	back    int64     // the floor before it passed them
}

// get returns the floor.
func (f *floor) get() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// hasPassed tells whether the floor has passed somebody who may write still.
func (f *floor) hasPassed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.passed) > 0
}

// holds tells whether all who were passed are among those who write. If not, the floor goes back.
func (f *floor) holds(writers []string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.passed) == len(both(f.passed, writers)) {
		return true
	}
	f.id, f.next, f.given, f.passed = min(f.id, f.back), 0, 0, nil
	return false
}

// raise notes a committed round: its turn, and that its claim, above the floor, has left nothing at or below the id upTo.
func (f *floor) raise(turn db.TakeTurnRow, upTo int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.next == 0 && f.given > f.id {
		wasPassed := func(w string) bool { return slices.Contains(f.passed, w) }
		f.next, f.since, f.writers = f.given, time.Now(), slices.DeleteFunc(slices.Clone(turn.Writers), wasPassed)
	}
	f.given = turn.LastID
	still := both(f.writers, turn.Writers)
	if f.next == 0 || len(still) > 0 && time.Since(f.since) < f.patience {
		return
	}
	if len(f.passed) == 0 {
		f.back = f.id
	}
	f.passed = append(f.passed, still...)
	f.id, f.next = max(f.id, min(f.next, upTo)), 0
}

// lower puts the floor below an id.
func (f *floor) lower(id int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.id, f.next, f.given = min(f.id, id-1), 0, 0
}

// both returns the transactions that are in a and in b.
func both(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(one string) bool { return !slices.Contains(b, one) })
}
