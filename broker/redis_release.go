package broker

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// Release makes the deliveries as old as abandoned ones, and takes this delivery from their counts.
func (s *RedisSubscription) Release(ctx context.Context, deliveries []Delivery) error {
	if len(deliveries) == 0 {
		return nil
	}
	tags := map[int64][]string{} // by count
	for _, d := range deliveries {
		tags[d.Deliveries] = append(tags[d.Deliveries], d.Tag)
	}
	_, err := s.redis.Pipelined(ctx, func(p redis.Pipeliner) error {
		for count, tags := range tags {
			p.Do(ctx, s.claim(tags, s.abandonedAfter, max(count-1, 0))...)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("release %d deliveries: %w", len(deliveries), err)
	}
	s.takeOverFrom, s.takenOver = "", time.Time{} // there is something to take over now
	return nil
}

// Forgive sets the deliveries' counts to one.
func (s *RedisSubscription) Forgive(ctx context.Context, tags []string) error {
	if err := s.redis.Do(ctx, s.claim(tags, 0, 1)...).Err(); err != nil {
		return fmt.Errorf("forgive %d deliveries: %w", len(tags), err)
	}
	return nil
}

// claim returns a command that sets for how long deliveries were left alone, and how often they were made.
func (s *RedisSubscription) claim(tags []string, idle time.Duration, count int64) []any {
	args := []any{"XCLAIM", Stream, s.group, s.name, 0}
	for _, tag := range tags {
		args = append(args, tag)
	}
	return append(args, "IDLE", idle.Milliseconds(), "RETRYCOUNT", count, "JUSTID")
}
