package main

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"
)

// moment is a success: of something begun, and done.
type moment struct{ begun, done time.Duration }

// firsts answers when the first of those was done that were begun at a time or later.
type firsts struct {
	begun []time.Duration
	done  []time.Duration // the earliest of this one and all later ones
}

func firstsOf(moments []moment) firsts {
	slices.SortFunc(moments, func(a, b moment) int { return cmp.Compare(a.begun, b.begun) })
	f := firsts{make([]time.Duration, len(moments)), make([]time.Duration, len(moments))}
	earliest := time.Duration(math.MaxInt64)
	for i, m := range slices.Backward(moments) {
		earliest = min(earliest, m.done)
		f.begun[i], f.done[i] = m.begun, earliest
	}
	return f
}

func (f firsts) after(at time.Duration) (time.Duration, bool) {
	i, _ := slices.BinarySearch(f.begun, at)
	if i == len(f.begun) {
		return 0, false
	}
	return f.done[i], true
}

// judgeRecovery measures, after the end of each fault, how long it took until both servers had answered a send of a fresh key,
// begun since, with 200, and until an order placed since was mailed. The end of a kill is when the process is started again.
// Time in which another fault lasted does not count: nothing has to recover then. All other time does, though that fault, too,
// has to be recovered from.
func (v *verdict) judgeRecovery(e *evidence) {
	intake := make([][]moment, len(serverNames))
	var delivery []moment
	mailedAt := make(map[uuid.UUID]time.Duration, len(e.mails))
	for _, m := range slices.Backward(e.mails) {
		mailedAt[m.order] = m.at
	}
	for _, k := range e.keys {
		for _, c := range k.calls {
			if c.op == post && c.outcome == placed {
				intake[c.server] = append(intake[c.server], moment{at(c.start), at(c.end)})
				if mailed, ok := mailedAt[k.answers[c.answer].order]; ok {
					delivery = append(delivery, moment{at(c.start), mailed})
				}
			}
		}
	}
	served := make([]firsts, len(intake))
	for i := range intake {
		served[i] = firstsOf(intake[i])
	}
	delivered := firstsOf(delivery)
	for i := range e.strikes {
		s := &e.strikes[i]
		s.Seen = true
		for server := range served {
			if took, ok := since(s.Ended, served[server], e.strikes); ok {
				s.Intake = max(s.Intake, took)
			} else {
				s.Seen = false
			}
		}
		took, ok := since(s.Ended, delivered, e.strikes)
		s.Delivery, s.Seen = took, s.Seen && ok
		switch {
		case !s.Seen && e.until > s.Ended+deliveryLimit:
			v.add(claimRecovery, "not seen to recover after %s", s.fault)
		case s.Intake > intakeLimit:
			v.add(claimRecovery, "intake took %s after %s", s.Intake.Round(time.Millisecond), s.fault)
		case s.Delivery > deliveryLimit:
			v.add(claimRecovery, "delivery took %s after %s", s.Delivery.Round(time.Millisecond), s.fault)
		}
	}
}

// since returns how long it took, without faults, until the first of what was begun after a moment was done.
func since(ended time.Duration, f firsts, strikes []strike) (time.Duration, bool) {
	recovered, ok := f.after(ended)
	if !ok {
		return 0, false
	}
	took := recovered - ended
	for _, s := range strikes {
		took -= max(0, min(s.Ended, recovered)-max(s.Began, ended))
	}
	return took, true
}
