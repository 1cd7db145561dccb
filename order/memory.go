package order

import (
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/maypok86/otter/v2"

	"idempotent-orders/idempotency"
)

const (
	// remembers is how many keys a process remembers, at about 250 bytes each, without what is noted with them.
	remembers = 50_000
	// remembersFor is for how long at most. A committed answer does not change, but a database may be put back in time.
	remembersFor = 10 * time.Minute
	// remembersShort is how long before its end a key is forgotten here, because the end comes by PostgreSQL's clock.
	remembersShort = time.Minute
)

// memory is what this process knows to be committed, so that a storm of retries asks nobody. The caller is part of what is
// digested, so nobody gets another's answer.
type memory struct {
	held *otter.Cache[uuid.UUID, *remembered]
}

// remembered is a key that is held, and what was noted with it.
type remembered struct {
	holding
	note atomic.Value
}

func newMemory() memory {
	return memory{otter.Must(&otter.Options[uuid.UUID, *remembered]{
		MaximumSize: remembers,
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[uuid.UUID, *remembered]) time.Duration {
			return max(1, min(remembersFor, time.Until(e.Value.expiresAt)-remembersShort)) // 0 would be for ever
		}),
	})}
}

// learn remembers who holds what, by the digests of keys.
func (m memory) learn(holders map[uuid.UUID]holding) {
	for digest, holder := range holders {
		if time.Until(holder.expiresAt) > remembersShort {
			m.held.Set(digest, &remembered{holding: holder})
		}
	}
}

// recall returns the result of a send whose key is remembered, and idempotency.ErrNotCommitted for any other.
func (m memory) recall(send Send) Result {
	known, ok := m.get(send.Key)
	if !ok {
		return Result{Err: idempotency.ErrNotCommitted}
	}
	return known.judge(send.Draft.Fingerprint(), uuid.Nil)
}

func (m memory) get(key idempotency.Key) (*remembered, bool) {
	known, ok := m.held.GetIfPresent(key.Digest())
	return known, ok && time.Until(known.expiresAt) > remembersShort
}
