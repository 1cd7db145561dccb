package broker

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"
)

// Release makes the deliveries as old as abandoned ones, and takes this delivery from their counts.
func (s *RedisSubscription) Release(ctx context.Context, deliveries []Delivery) error {
	if len(deliveries) == 0 {
		return nil
	}
	if err := s.claim(ctx, deliveries, s.abandonedAfter, 1); err != nil {
		return fmt.Errorf("release %d deliveries: %w", len(deliveries), err)
	}
	s.takeOverFrom, s.takenOver = "", time.Time{} // there is something to take over now
	return nil
}

// Recount sets the deliveries' counts.
func (s *RedisSubscription) Recount(ctx context.Context, deliveries []Delivery) error {
	if err := s.claim(ctx, deliveries, 0, 0); err != nil {
		return fmt.Errorf("recount %d deliveries: %w", len(deliveries), err)
	}
	return nil
}

// claim sets for how long deliveries were left alone, and how often they were made: so much less than they say.
func (s *RedisSubscription) claim(ctx context.Context, deliveries []Delivery, idle time.Duration, less int64) error {
	tags := map[int64][]any{} // by count
	for _, d := range deliveries {
		tags[d.Deliveries] = append(tags[d.Deliveries], d.Tag)
	}
	_, err := s.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for count, tags := range tags {
			args := slices.Concat([]any{"XCLAIM", Stream, s.group, s.name, 0}, tags,
				[]any{"IDLE", idle.Milliseconds(), "RETRYCOUNT", max(count-less, 0), "JUSTID"})
			p.Do(ctx, args...)
		}
		return nil
	})
	return err
}
