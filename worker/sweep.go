package worker

import (
	"context"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/gen/db"
)

const (
	sweepEvery = time.Hour
	// daysAhead is for how many days after today the archive has partitions.
	daysAhead = 7
	// sweepTimeout bounds one round.
	sweepTimeout = 15 * time.Second
)

// Sweep keeps the archive of published events partitioned by day, ahead of time, until ctx is done. Any number may run.
func Sweep(ctx context.Context, pool *pgxpool.Pool, log *slog.Logger) {
	sweeping := trouble{log: log, doing: "Creating outbox partitions"}
	failed := backoff{least: time.Second, most: time.Minute}
	for ctx.Err() == nil {
		created, err := createPartitions(ctx, pool)
		if ctx.Err() != nil {
			return
		}
		sweeping.note(ctx, err)
		if err != nil {
			failed.wait(ctx, nil)
			continue
		}
		failed.reset()
		if created > 0 {
			log.InfoContext(ctx, "Outbox partitions created", "days", created)
		}
		select {
		case <-ctx.Done():
		case <-time.After(sweepEvery):
		}
	}
}

func createPartitions(ctx context.Context, pool *pgxpool.Pool) (int32, error) {
	ctx, cancel := context.WithTimeout(ctx, sweepTimeout)
	defer cancel()
	return db.New(pool).CreateOutboxPartitions(ctx, daysAhead)
}
