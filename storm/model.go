package main

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"
)

// What a key may go through, as every caller may see it. A key is absent until a send of it takes effect, which is at one
// moment between that send's start and its end; from then on it is done, with one order and one body, for ever.
//
// A call that came back tells what the key was at some moment in between:
//
//   - placed: the key was absent, and this send made it done.
//   - replayed: it was done with this order and this body, or pending with this body.
//   - mismatched: it was done, or pending, with another body.
//   - inProgress: it was absent. A 409 is not given before PostgreSQL was asked and knew no such key.
//   - found, absent: it was, or was not, done with the order that is read.
//
// A call that did not come back, and a 503, tell nothing. Such a send may have taken effect at any moment after its start, or
// never; the program may even be at it when the client has long given up. So it has no end: it may be put after everything
// else, where nobody can see its effect, which is the same as none. It makes an absent key pending: done, with an order that
// nobody knows yet. The first answer that names an order settles which.
type keyState struct {
	phase  phase
	body   uint8
	answer uint8
}

type phase uint8

const (
	isAbsent phase = iota
	isPending
	isDone
)

// keyModel is the model of one key. Its inputs are calls.
var keyModel = porcupine.Model{
	Init: func() any { return keyState{} },
	Step: func(state, input, _ any) (bool, any) {
		ok, next := state.(keyState).step(input.(call))
		return ok, next
	},
}

func (s keyState) step(c call) (bool, keyState) {
	switch {
	case c.op == spy || c.op == stranger || c.outcome == wrong:
		return true, s // judged without a history
	case c.op == get && c.outcome == found:
		return s.phase == isDone && s.answer == c.answer, s
	case c.op == get && c.outcome == absent:
		return s.phase == isAbsent, s
	case c.op == get:
		return true, s
	}
	switch c.outcome {
	case placed:
		return s.phase == isAbsent, keyState{isDone, c.body, c.answer}
	case replayed:
		same := s.phase == isDone && s.answer == c.answer || s.phase == isPending
		return same && s.body == c.body, keyState{isDone, c.body, c.answer}
	case mismatched:
		return s.phase != isAbsent && s.body != c.body, s
	case inProgress:
		return s.phase == isAbsent, s
	case unclear:
		if s.phase == isAbsent {
			return true, keyState{phase: isPending, body: c.body}
		}
	}
	return true, s
}

// linearizable tells whether the calls of a key can be put into an order in which each makes sense where it happened. The
// answers that differ only in bytes are one here: that is judged by itself. Undecided within the limit is no.
//
// Of the sends of one body that tell nothing, only the first to start is asked for. A key takes effect once, so at most one
// of them has an effect that can be seen, and whatever another could have done at some moment, the first could have too. This
// changes no verdict, and spares trying the order of many sends that do nothing, of which there are as many as in an outage.
func linearizable(k *keyLog, limit time.Duration) porcupine.CheckResult {
	sameOrder := make([]uint8, len(k.answers))
	for i, a := range k.answers {
		sameOrder[i] = uint8(slices.IndexFunc(k.answers, func(b answer) bool { return b.order == a.order }))
	}
	earliest := map[uint8]int64{}
	for _, c := range k.calls {
		if start, known := earliest[c.body]; c.op == post && c.outcome == unclear && (!known || c.start < start) {
			earliest[c.body] = c.start
		}
	}
	operations := make([]porcupine.Operation, 0, len(k.calls))
	for i, c := range k.calls {
		if c.op == post && c.outcome == unclear && c.start > earliest[c.body] {
			continue
		}
		if c.op == spy || c.op == stranger || c.op == get && c.outcome == unclear {
			continue
		}
		if c.outcome == placed || c.outcome == replayed || c.outcome == found {
			c.answer = sameOrder[c.answer]
		}
		operation := porcupine.Operation{ClientId: i, Input: c, Call: c.start, Return: c.end}
		if c.outcome == unclear {
			operation.Return = math.MaxInt64
		}
		operations = append(operations, operation)
	}
	slices.SortFunc(operations, func(a, b porcupine.Operation) int { return cmp.Compare(a.Call, b.Call) })
	return porcupine.CheckOperationsTimeout(keyModel, operations, limit)
}
