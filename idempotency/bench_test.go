package idempotency

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"idempotent-orders/internal/testenv"
)

// A reservation, a placing that costs nothing, and its completion. Compare runs with benchstat.
func BenchmarkOnce(b *testing.B) {
	for _, callers := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			rdb, _ := testenv.Redis(b)
			g := NewGuard(rdb, time.Hour, slog.New(slog.DiscardHandler))
			var n atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(callers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_, err := Once(context.Background(), context.Background(), g, Send[int]{
						Key:   Key{Caller: "anonymous", Operation: "bench", Value: fmt.Sprint(n.Add(1))},
						Find:  func() (int, error) { return 0, ErrNotCommitted },
						Place: func() (int, error) { return 1, nil },
					})
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
