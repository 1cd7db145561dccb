package main

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/google/uuid"
)

// The claims. Each violation breaks one.
const (
	claimLinear    = "every answer makes sense in one order (linearizable per key)"
	claimOne       = "at most one order for a key"
	claimKept      = "every acknowledged order is kept"
	claimReplay    = "every answer to a key is the same, byte for byte"
	claimPrivate   = "nobody sees another's data"
	claimAnswers   = "no answer that the contract does not have (no 5xx but 503)"
	claimAnnounced = "every order is announced: a mail for each"
	claimOneMail   = "one mail for each, but for the documented case"
	claimReconcile = "reconcile is clean"
	claimRecovery  = "recovery within 5 s for intake, 10 s for delivery"
	claimHealthy   = "no process panics, races, or fails to end on SIGTERM"
)

var claims = []string{claimLinear, claimOne, claimKept, claimReplay, claimPrivate, claimAnswers, claimAnnounced, claimOneMail,
	claimReconcile, claimRecovery, claimHealthy}

// violation is a claim that was broken, and how.
type violation struct {
	Claim  string `json:"claim"`
	Detail string `json:"detail"`
}

// dbOrder is an order in the database, with the key that holds it.
type dbOrder struct {
	id            uuid.UUID
	caller, key   string // of the key; empty: no key holds the order
	owner, userID string // of the order; empty: the key's order does not exist
	amount        int64
}

// strike is a fault as it was done.
type strike struct {
	fault
	Began time.Duration `json:"began"`
	Ended time.Duration `json:"ended"`
	Error string        `json:"error,omitempty"`

	Intake   time.Duration `json:"intake"`   // how long after the end each server had answered a fresh key with 200
	Delivery time.Duration `json:"delivery"` // how long after the end an order placed since was mailed
	Seen     bool          `json:"seen"`     // both were seen
}

// evidence is what the judge is given. It asks nobody.
type evidence struct {
	keys      []*keyLog
	orders    []dbOrder
	events    map[uuid.UUID]uuid.UUID // event to order, of all events there are
	mails     []mail
	strikes   []strike
	until     time.Duration // when the clients stopped
	reconcile string        // what reconcile says against it; empty: clean
	cries     []string      // what processes said that none may say
	unclean   []string      // processes that did not end on SIGTERM
}

// verdict is what the judge found.
type verdict struct {
	Violations []violation `json:"violations"`
	Count      map[string]int
	Doubled    int // mails sent again in the documented case
	Undecided  int // keys whose history could not be judged in time; each is a violation
}

const (
	intakeLimit, deliveryLimit = 5 * time.Second, 10 * time.Second
	// keyLimit bounds the judging of one key.
	keyLimit = 20 * time.Second
	// mostShown is how many violations of a claim are kept in words.
	mostShown = 20
)

func (v *verdict) add(claim, format string, args ...any) {
	v.Count[claim]++
	if v.Count[claim] <= mostShown {
		v.Violations = append(v.Violations, violation{claim, fmt.Sprintf(format, args...)})
	}
}

// judgeAll judges everything.
func judgeAll(e *evidence) *verdict {
	v := &verdict{Count: map[string]int{}}
	v.judgeKeys(e)
	v.judgeOrders(e)
	v.judgeMails(e)
	v.judgeRecovery(e)
	if e.reconcile != "" {
		v.add(claimReconcile, "%s", e.reconcile)
	}
	for _, cry := range e.cries {
		v.add(claimHealthy, "%s", cry)
	}
	for _, name := range e.unclean {
		v.add(claimHealthy, "%s did not end within %s of SIGTERM, and was killed", name, stopPatience)
	}
	return v
}

func name(k *keyLog) string { return fmt.Sprintf("key %s of %s", k.value(), callerNames[k.caller]) }

// judgeKeys judges each key by what its callers saw.
func (v *verdict) judgeKeys(e *evidence) {
	results := make([]porcupine.CheckResult, len(e.keys))
	var work sync.WaitGroup
	for w := range runtime.GOMAXPROCS(0) {
		work.Go(func() {
			for i := w; i < len(e.keys); i += runtime.GOMAXPROCS(0) {
				results[i] = linearizable(e.keys[i], keyLimit)
			}
		})
	}
	work.Wait()
	for i, k := range e.keys {
		switch results[i] {
		case porcupine.Illegal:
			v.add(claimLinear, "%s: %s", name(k), k.story())
		case porcupine.Unknown:
			v.Undecided++
			v.add(claimLinear, "%s: not decided within %s: %s", name(k), keyLimit, k.story())
		}
		for _, a := range k.answers[min(1, len(k.answers)):] {
			if a.order != k.answers[0].order {
				v.add(claimOne, "%s was answered with orders %s and %s: %s", name(k), k.answers[0].order, a.order, k.story())
			} else {
				v.add(claimReplay, "%s: two answers differ: %s", name(k), k.story())
			}
		}
		for _, c := range k.calls {
			switch {
			case c.op == spy && c.outcome == found:
				v.add(claimPrivate, "%s: another caller read its order", name(k))
			case c.outcome == wrong && c.op == spy, c.outcome == wrong && c.status == 200:
				v.add(claimPrivate, "%s: %v", name(k), k.odd)
			case c.outcome == wrong:
				v.add(claimAnswers, "%s: %v", name(k), k.odd)
			}
		}
	}
}

var outcomeNames = [...]string{"placed", "replayed", "422", "409", "unclear", "found", "404", "401", "wrong"}

// story tells what happened under a key, for a person.
func (k *keyLog) story() string {
	text := ""
	for _, c := range k.calls {
		text += fmt.Sprintf("[%s-%s %s body %d at server %d: %s %d", at(c.start), at(c.end), []string{"POST", "GET", "GET by another", "POST without secret"}[c.op],
			c.body, c.server+1, outcomeNames[c.outcome], c.status)
		if c.outcome == placed || c.outcome == replayed || c.outcome == found {
			text += " " + k.answers[c.answer].order.String()
		}
		text += "] "
	}
	return text
}

// keyName is a key as the database has it.
type keyName struct{ caller, key string }

// judgeOrders compares what callers were promised with what there is.
func (v *verdict) judgeOrders(e *evidence) {
	held := v.judgeHeld(e.orders)
	answered := map[uuid.UUID]*keyLog{}
	for _, k := range e.keys {
		o, exists := held[keyName{callerNames[k.caller], k.value()}]
		delete(held, keyName{callerNames[k.caller], k.value()})
		if exists && (o.userID != k.userID() || !slices.ContainsFunc(k.calls, func(c call) bool { return c.op == post && k.amount(c.body) == o.amount })) {
			v.add(claimPrivate, "%s: its order %s is for user %s and amount %d, which nobody asked for under this key", name(k), o.id, o.userID, o.amount)
		}
		for _, a := range k.answers {
			if other := answered[a.order]; other != nil && other != k {
				v.add(claimPrivate, "order %s was the answer to %s and to %s", a.order, name(other), name(k))
			}
			answered[a.order] = k
		}
		order, body, acknowledged := k.acknowledged()
		switch {
		case !acknowledged:
		case !exists:
			v.add(claimKept, "%s: order %s was acknowledged, and does not exist: %s", name(k), order, k.story())
		case o.id != order:
			v.add(claimOne, "%s: order %s was acknowledged, and %s exists: %s", name(k), order, o.id, k.story())
		case o.amount != k.amount(body):
			v.add(claimKept, "%s: order %s was acknowledged with amount %d, and has %d", name(k), order, k.amount(body), o.amount)
		}
	}
	for key, o := range held {
		v.add(claimOne, "order %s is held by the key %v, which nobody sent", o.id, key)
	}
}

// judgeHeld looks whether the orders and keys there are belong together, and returns the orders by their keys.
func (v *verdict) judgeHeld(orders []dbOrder) map[keyName]dbOrder {
	held, seen := map[keyName]dbOrder{}, map[uuid.UUID]keyName{}
	for _, o := range orders {
		key := keyName{o.caller, o.key}
		switch {
		case o.caller == "":
			v.add(claimOne, "order %s of user %s has no key", o.id, o.userID)
			continue
		case o.owner == "":
			v.add(claimKept, "the key %s of %s holds order %s, which does not exist", o.key, o.caller, o.id)
			continue
		case o.owner != o.caller:
			v.add(claimPrivate, "order %s is %s's, and its key %s's", o.id, o.owner, o.caller)
		}
		if other, twice := seen[o.id]; twice {
			v.add(claimPrivate, "order %s is held by the keys %v and %v", o.id, other, key)
		}
		if other, twice := held[key]; twice {
			v.add(claimOne, "the key %s of %s holds the orders %s and %s", o.key, o.caller, other.id, o.id)
		}
		seen[o.id], held[key] = key, o
	}
	return held
}

// judgeMails looks for the mail of each order, and for more than one.
func (v *verdict) judgeMails(e *evidence) {
	owner := make(map[uuid.UUID]string, len(e.orders))
	for _, o := range e.orders {
		owner[o.id] = o.userID
	}
	first := make(map[uuid.UUID]mail, len(e.orders)) // by event
	mailed := make(map[uuid.UUID]uuid.UUID, len(e.orders))
	for _, m := range e.mails {
		order, known := e.events[m.event]
		switch {
		case !known || order != m.order:
			v.add(claimOneMail, "a mail to %s about order %s has a Message-ID of no event of it: %s", m.to, m.order, m.event)
			continue
		case m.to != owner[m.order]+"@example.com":
			v.add(claimPrivate, "the mail about order %s of user %s went to %s", m.order, owner[m.order], m.to)
		}
		if other, twice := mailed[m.order]; twice && other != m.event {
			v.add(claimOneMail, "order %s was mailed under the Message-IDs %s and %s", m.order, other, m.event)
		}
		mailed[m.order] = m.event
		before, again := first[m.event]
		switch {
		case !again:
			first[m.event] = m
		case excused(before.at, e.strikes):
			v.Doubled++
		default:
			v.add(claimOneMail, "the mail about order %s was sent at %s and at %s, and no fault near the first excuses it%s", m.order, clock(before.at), clock(m.at),
				near(before.at, e.strikes))
		}
	}
	for _, o := range e.orders {
		if _, ok := mailed[o.id]; !ok && o.owner != "" {
			v.add(claimAnnounced, "order %s of user %s was not mailed", o.id, o.userID)
		}
	}
}

// Around the moment when a mail was accepted, what excuses that it is sent again: the consumer was killed before it could mark
// the mail, or the answer of the mail server was lost on its line. markTime is how long a mark may take when nothing is in
// its way; what is in its way, an outage of the database or of the line to it, makes it longer by as much.
const markTime = 1500 * time.Millisecond

func excused(accepted time.Duration, strikes []strike) bool {
	for _, s := range strikes {
		switch {
		case s.Kind == "kill" && isConsumer(s.Target):
			if accepted <= s.Began+100*time.Millisecond && accepted >= unmarked(s.Began, strikes) {
				return true
			}
		case isLine(s.Kind) && isConsumer(s.Target) && isLineTo(s.Target, smtpSink):
			if accepted >= s.Began-markTime && accepted <= s.Ended+markTime {
				return true
			}
		}
	}
	return false
}

// unmarked returns since when mails may be without a mark at a moment.
func unmarked(at time.Duration, strikes []strike) time.Duration {
	since := at - markTime
	for _, s := range slices.Backward(strikes) {
		between := isConsumer(s.Target) && isLineTo(s.Target, postgres) || strings.HasPrefix(s.Kind, "postgres") || s.Kind == "freeze" && isConsumer(s.Target)
		if between && s.Began <= at && s.Ended+3*time.Second >= since {
			since = min(since, s.Began-markTime)
		}
	}
	return since
}

// near names the faults around a moment.
func near(at time.Duration, strikes []strike) (text string) {
	for _, s := range strikes {
		if s.Began < at+5*time.Second && s.Ended > at-5*time.Second {
			text += fmt.Sprintf("; %s-%s %s %s", clock(s.Began), clock(s.Ended), s.Kind, s.Target)
		}
	}
	return text
}

func isLine(kind string) bool {
	return slices.Contains([]string{"cut", "slow", "reset", "silent", "cut-after-commit"}, kind)
}

// isConsumer tells whether a target is a consumer, or a line of one.
func isConsumer(target string) bool { return strings.HasPrefix(target, "consumer") }

// isLineTo tells whether a target is a line to somewhere.
func isLineTo(target, to string) bool { return strings.HasSuffix(target, ">"+to) }
