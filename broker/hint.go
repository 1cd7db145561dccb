package broker

import (
	"context"

	"github.com/redis/go-redis/v9"
)

// hintChannel carries hints that the outbox has something to publish.
const hintChannel = "orders.outbox"

// Hint tells relays in other processes that the outbox has something for them. A hint may be lost: relays poll anyway.
type Hint struct {
	redis redis.UniversalClient
	want  chan struct{}
}

// NewHint returns a hint that goes through rdb. Run sends it.
func NewHint(rdb redis.UniversalClient) *Hint {
	return &Hint{redis: rdb, want: make(chan struct{}, 1)}
}

// Give asks for a hint to be sent. It never blocks; hints given while one is under way become one.
func (h *Hint) Give() {
	select {
	case h.want <- struct{}{}:
	default:
	}
}

// Run sends the hints that were given, until ctx is done.
func (h *Hint) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.want:
			_ = h.redis.Publish(ctx, hintChannel, "").Err()
		}
	}
}

// OnHint calls heard for each hint that others send, until ctx is done.
func OnHint(ctx context.Context, rdb redis.UniversalClient, heard func()) {
	sub := rdb.Subscribe(ctx, hintChannel)
	defer sub.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-sub.Channel():
			if !ok {
				return
			}
			heard()
		}
	}
}
