package worker

import (
	"slices"
	"sync"

	"idempotent-orders/gen/db"
)

// floor is an id at or below which the outbox has nothing left, so that a claim need not walk over what was claimed before:
// while a transaction elsewhere holds an old snapshot, no vacuum removes that.
//
// An id may commit late, after higher ones. So the floor passes an id only when all transactions have ended that could have
// been given it: first the last id that was given out is noted; then, later, who writes to the outbox; and when none of those
// does any more, a claim that began after that has seen what they left.
//
// What this cannot know (a row that somebody has locked and that a claim skipped, a database that was put back in time) is
// found by look, which searches below the floor.
type floor struct {
	mu      sync.Mutex
	id      int64    // guarded by mu, as all
	given   int64    // the last id that was given out before the last round
	next    int64    // what id becomes when the writers have ended; 0 for nothing
	writers []string // the transactions that may have been given ids up to next
}

// get returns the floor.
func (f *floor) get() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// raise notes a committed round: its turn, and that its claim, above the floor, has left nothing at or below the id upTo.
func (f *floor) raise(turn db.TakeTurnRow, upTo int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.next == 0 && f.given > f.id {
		f.next, f.writers = f.given, turn.Writers
	}
	if f.next > 0 && !slices.ContainsFunc(f.writers, func(w string) bool { return slices.Contains(turn.Writers, w) }) {
		f.id, f.next = max(f.id, min(f.next, upTo)), 0
	}
	f.given = turn.LastID
}

// lower puts the floor below an id.
func (f *floor) lower(id int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.id, f.next, f.given = min(f.id, id-1), 0, 0
}
