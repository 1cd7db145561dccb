package broker

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// trimBatch is about how many entries one command removes: Redis does nothing else meanwhile.
const trimBatch = 10_000

// Trim removes from the stream what every consumer group has acknowledged, and returns how many entries that were. Each of the
// consumers must have its group already: one that has never come has everything before it. A group that comes later, or that an
// operator puts back, finds what is left.
func (b *RedisStreams) Trim(ctx context.Context, consumers ...string) (int64, error) {
	below, err := b.acknowledgedBelow(ctx, consumers)
	if err != nil {
		return 0, fmt.Errorf("ask what is acknowledged of stream %s: %w", Stream, err)
	}
	if below == "" {
		return 0, nil
	}
	var removed int64
	for {
		n, err := b.redis.XTrimMinIDApprox(ctx, Stream, below, trimBatch).Result() // whole nodes of the stream
		removed += n
		if err != nil {
			return removed, fmt.Errorf("trim stream %s: %w", Stream, err)
		}
		if n == 0 {
			break
		}
	}
	n, err := b.redis.XTrimMinID(ctx, Stream, below).Result() // the part of a node that is left
	if err != nil {
		return removed, fmt.Errorf("trim stream %s: %w", Stream, err)
	}
	return removed + n, nil
}

// acknowledgedBelow returns the id below which every group has acknowledged everything; empty when nothing can be said.
func (b *RedisStreams) acknowledgedBelow(ctx context.Context, consumers []string) (string, error) {
	groups, err := b.redis.XInfoGroups(ctx, Stream).Result()
	if redis.HasErrorPrefix(err, "no such key") {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	missing := make(map[string]bool, len(consumers))
	for _, name := range consumers {
		missing[name] = true
	}
	var lowest *entryID
	for _, group := range groups {
		if strings.HasPrefix(group.Name, epochMark) {
			continue
		}
		delete(missing, group.Name)
		id, err := b.groupAcknowledgedBelow(ctx, group)
		if err != nil {
			return "", err
		}
		if lowest == nil || id.less(*lowest) {
			lowest = &id
		}
	}
	if lowest == nil || len(missing) > 0 {
		return "", nil
	}
	return lowest.String(), nil
}

// groupAcknowledgedBelow asks what is pending after it was asked what was delivered: what is delivered in between is above both.
func (b *RedisStreams) groupAcknowledgedBelow(ctx context.Context, group redis.XInfoGroup) (entryID, error) {
	pending, err := b.redis.XPending(ctx, Stream, group.Name).Result()
	if err != nil {
		return entryID{}, err
	}
	if pending.Count > 0 {
		return parseEntryID(pending.Lower)
	}
	delivered, err := parseEntryID(group.LastDeliveredID)
	return delivered.next(), err
}

// Oldest returns when the oldest entry of the stream was added, by the clock of Redis; the zero time when there is none.
func (b *RedisStreams) Oldest(ctx context.Context) (time.Time, error) {
	entries, err := b.redis.XRangeN(ctx, Stream, "-", "+", 1).Result()
	if err != nil {
		return time.Time{}, fmt.Errorf("read the oldest entry of stream %s: %w", Stream, err)
	}
	if len(entries) == 0 {
		return time.Time{}, nil
	}
	id, err := parseEntryID(entries[0].ID)
	return time.UnixMilli(int64(min(id.ms, math.MaxInt64))), err
}

// entryID is the id of an entry: milliseconds, and a number among those of the same.
type entryID struct{ ms, seq uint64 }

func parseEntryID(s string) (entryID, error) {
	ms, seq, _ := strings.Cut(s, "-")
	m, err := strconv.ParseUint(ms, 10, 64)
	if err != nil {
		return entryID{}, fmt.Errorf("%q is not the id of an entry", s)
	}
	n, err := strconv.ParseUint(seq, 10, 64)
	if err != nil {
		return entryID{}, fmt.Errorf("%q is not the id of an entry", s)
	}
	return entryID{m, n}, nil
}

func (id entryID) less(other entryID) bool {
	return id.ms < other.ms || id.ms == other.ms && id.seq < other.seq
}

// next returns the id just after.
func (id entryID) next() entryID {
	if id.seq+1 == 0 {
		return entryID{id.ms + 1, 0}
	}
	return entryID{id.ms, id.seq + 1}
}

func (id entryID) String() string {
	return strconv.FormatUint(id.ms, 10) + "-" + strconv.FormatUint(id.seq, 10)
}
