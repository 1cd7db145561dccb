package worker

import (
	"math"
	"testing"
	"time"

	"idempotent-orders/gen/db"
)

func TestTheFloorRisesOnceThoseWhoWroteHaveEndedWhoeverWritesNow(t *testing.T) {
	t.Parallel()
	f := floor{patience: time.Hour}
	for i, round := range []struct {
		lastID  int64
		writers []string
		upTo    int64
		want    int64
	}{
		{lastID: 10, writers: []string{"a", "b"}, upTo: math.MaxInt64, want: 0},
		{lastID: 20, writers: []string{"b", "c"}, upTo: math.MaxInt64, want: 0},  // 10 waits for b and c
		{lastID: 30, writers: []string{"c", "d"}, upTo: math.MaxInt64, want: 0},  // c writes
		{lastID: 40, writers: []string{"d", "e"}, upTo: math.MaxInt64, want: 10}, // neither b nor c does
		{lastID: 50, writers: nil, upTo: math.MaxInt64, want: 40},                // nobody is to be waited for
		{lastID: 60, writers: nil, upTo: 45, want: 45},                           // a full batch left what is above 45
		{lastID: 60, writers: nil, upTo: math.MaxInt64, want: 60},
		{lastID: 5, writers: nil, upTo: math.MaxInt64, want: 60}, // put back in time: look finds what comes
	} {
		f.raise(db.TakeTurnRow{Taken: true, Writers: round.writers, LastID: round.lastID}, round.upTo)
		if got := f.get(); got != round.want {
			t.Fatalf("after round %d the floor is %d; want %d", i, got, round.want)
		}
	}
	f.lower(50)
	if got := f.get(); got != 49 {
		t.Errorf("lowered below 50, the floor is %d", got)
	}
}

func TestTheFloorPassesWhoWritesForLongAndGoesBackWhenOneOfThemEnds(t *testing.T) {
	t.Parallel()
	f := floor{patience: time.Hour}
	for i, round := range []struct {
		lastID  int64
		writers []string
		later   bool // the patience is at its end
		left    bool // the claim cannot be used
		upTo    int64
		want    int64
	}{
		{lastID: 10, upTo: math.MaxInt64, want: 0},
		{lastID: 20, upTo: math.MaxInt64, want: 10},
		{lastID: 30, writers: []string{"a", "b"}, upTo: math.MaxInt64, want: 10},
		{lastID: 40, writers: []string{"a", "b"}, upTo: math.MaxInt64, want: 10}, // 20 waits for a and b
		{lastID: 50, writers: []string{"a", "b", "c"}, later: true, upTo: 15, want: 15},
		{lastID: 60, writers: []string{"a", "b", "c"}, upTo: math.MaxInt64, want: 15}, // 50 waits for c
		{lastID: 70, writers: []string{"a", "b"}, upTo: math.MaxInt64, want: 50},      // and not for those that were passed
		{lastID: 80, writers: []string{"a", "d"}, left: true, want: 10},               // b has ended
		{lastID: 80, writers: []string{"a", "d"}, upTo: math.MaxInt64, want: 10},
		{lastID: 90, writers: []string{"a", "d"}, upTo: math.MaxInt64, want: 10}, // 80 waits for a again, and for d
		{lastID: 99, writers: nil, upTo: math.MaxInt64, want: 80},
	} {
		if round.later {
			f.since = time.Now().Add(-f.patience)
		}
		if f.holds(round.writers) == round.left {
			t.Fatalf("in round %d the claim can be used: %t", i, round.left)
		}
		if !round.left {
			f.raise(db.TakeTurnRow{Taken: true, Writers: round.writers, LastID: round.lastID}, round.upTo)
		}
		if got := f.get(); got != round.want {
			t.Fatalf("after round %d the floor is %d; want %d", i, got, round.want)
		}
	}
}
