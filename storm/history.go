package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
)

// operation is what a call asked for.
type operation uint8

const (
	post     operation = iota // place an order
	get                       // read an own order, which was acknowledged
	spy                       // read another caller's order
	stranger                  // place an order without the caller's secret
)

// outcome is what a call was answered.
type outcome uint8

const (
	placed     outcome = iota // 200: the order was placed by this send
	replayed                  // 200, marked as a replay
	mismatched                // 422
	inProgress                // 409
	unclear                   // 503, or no answer: it may have been done, or be done later
	found                     // 200 to a read
	absent                    // 404 to a read
	refused                   // 401
	wrong                     // anything else: never allowed
)

// call is one call, small: a storm has millions.
type call struct {
	start, end int64 // nanoseconds from the start of the storm
	op         operation
	outcome    outcome
	body       uint8 // which of the key's bodies was sent
	answer     uint8 // for placed, replayed and found: which of the key's answers came
	server     uint8
	status     uint16 // 0: no answer
}

// answer is a 200: the order it names, and a digest of everything that has to be the same in every answer to the key.
type answer struct {
	order  uuid.UUID
	digest uint64
}

// keyLog is what happened under one key of one caller.
type keyLog struct {
	caller  int
	number  uint64
	mu      sync.Mutex
	calls   []call
	answers []answer
	acked   answer // the first answer, zero if there was none
	ackedBy uint8  // the body of the send that got it
	odd     []string
}

// history is everything that happened.
type history struct {
	mu   sync.Mutex
	keys []*keyLog // guarded by mu
}

// open begins the log of a key.
func (h *history) open(caller int, number uint64) *keyLog {
	k := &keyLog{caller: caller, number: number}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys = append(h.keys, k)
	return k
}

// note adds a call; reply is the answer's content for the outcomes that have one.
func (k *keyLog) note(c call, reply answer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch c.outcome {
	case placed, replayed, found:
		c.answer = k.place(reply)
	}
	if (c.outcome == placed || c.outcome == replayed) && k.acked == (answer{}) {
		k.acked, k.ackedBy = reply, c.body
	}
	k.calls = append(k.calls, c)
}

func (k *keyLog) place(reply answer) uint8 {
	for i, a := range k.answers {
		if a == reply {
			return uint8(i)
		}
	}
	if len(k.answers) == 255 {
		return 254
	}
	k.answers = append(k.answers, reply)
	return uint8(len(k.answers) - 1)
}

// remark notes what no answer may have: it is a violation whatever else happened.
func (k *keyLog) remark(format string, args ...any) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.odd = append(k.odd, fmt.Sprintf(format, args...))
}

// acknowledged returns the order that was acknowledged under the key, if one was.
func (k *keyLog) acknowledged() (uuid.UUID, uint8, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.acked.order, k.ackedBy, k.acked != answer{}
}

// value is the key as it is sent. Callers use the same values on purpose: one that leaked to another would show.
func (k *keyLog) value() string { return fmt.Sprintf("storm-%d", k.number) }

// userID and amount are what a body of the key asks for. Every order of the storm tells by its user whose it is.
func (k *keyLog) userID() string { return fmt.Sprintf("%s.%d", callerNames[k.caller], k.number) }

func (k *keyLog) amount(body uint8) int64 { return 1000 + int64(k.number%1000)*100 + int64(body) }

// callerNames are the callers. The first is the only one while the program knows no API keys.
var callerNames = []string{"anonymous", "alice", "bob", "carol"}

func at(nanoseconds int64) time.Duration { return time.Duration(nanoseconds) }
