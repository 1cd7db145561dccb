package worker

import (
	"log/slog"
	"testing"
)

// What it costs to move an event from the outbox to the stream, and from the stream to the mark in the inbox, in full batches,
// on a PostgreSQL that does not sync. One operation is an event. Compare runs with benchstat.

func BenchmarkRelay(b *testing.B) {
	stage := newBench(b)
	stage.fill(b.N)
	relay := NewRelay(stage.pool, stage.broker, stage.logger())
	b.ReportAllocs()
	b.ResetTimer()
	if err := relay.Drain(b.Context()); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkConsumer(b *testing.B) {
	stage := newBench(b)
	stage.fill(b.N)
	if err := stage.relay(stage.broker).Drain(b.Context()); err != nil {
		b.Fatal(err)
	}
	consumer := NewConsumer(stage.pool, stage.broker.Subscribe(EmailConsumer, "one", AbandonedAfter), DiscardSender{}, AbandonedAfter, slog.New(slog.DiscardHandler))
	b.ReportAllocs()
	b.ResetTimer()
	if err := consumer.Drain(b.Context()); err != nil {
		b.Fatal(err)
	}
}
