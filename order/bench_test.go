package order

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"idempotent-orders/internal/testenv"
)

// Placing with as many callers as there are, on a PostgreSQL that does not sync: what the code costs, not the disk.
// Compare runs with benchstat.
func BenchmarkPlace(b *testing.B) {
	for _, callers := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			store := NewStore(testenv.Database(b), time.Hour, nil)
			var n atomic.Int64
			b.ReportAllocs()
			b.SetParallelism(callers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := store.Place(send(fmt.Sprint(n.Add(1)), 1)); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

func BenchmarkRecall(b *testing.B) {
	store := NewStore(testenv.Database(b), time.Hour, nil)
	if _, err := store.Place(send("k", 1)); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := store.Recall(send("k", 1)); err != nil {
			b.Fatal(err)
		}
	}
}
