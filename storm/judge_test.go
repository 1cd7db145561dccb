package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// world is evidence of a small world in which all is well, to be spoilt.
func world() *evidence {
	e := &evidence{events: map[uuid.UUID]uuid.UUID{}, until: time.Minute}
	for n := range 4 {
		k := &keyLog{caller: 1 + n%2, number: uint64(n / 2)}
		order, event := uuid.New(), uuid.New()
		start := int64(n) * int64(time.Second)
		k.note(call{start: start, end: start + 10, op: post, outcome: placed, server: uint8(n % 2), status: 200}, answer{order, 1})
		k.note(call{start: start + 20, end: start + 30, op: post, outcome: replayed, status: 200}, answer{order, 1})
		k.note(call{start: start + 40, end: start + 50, op: get, outcome: found, status: 200}, answer{order, 1})
		e.keys = append(e.keys, k)
		e.orders = append(e.orders, dbOrder{order, callerNames[k.caller], k.value(), callerNames[k.caller], k.userID(), k.amount(0)})
		e.events[event] = order
		e.mails = append(e.mails, mail{event, order, k.userID() + "@example.com", at(start) + 100*time.Millisecond})
	}
	return e
}

func TestTheJudgeFindsNothingWhereAllIsWell(t *testing.T) {
	t.Parallel()
	if v := judgeAll(world()); v.total() > 0 {
		t.Errorf("%+v", v.Violations)
	}
}

func TestTheJudgeFindsEachViolation(t *testing.T) {
	t.Parallel()
	later := func(k *keyLog, c call, reply answer) {
		c.start, c.end = c.start+int64(10*time.Second), c.start+int64(10*time.Second)+10
		k.note(c, reply)
	}
	for title, test := range map[string]struct {
		spoil func(e *evidence)
		claim string
	}{
		"an acknowledged order is gone":            {func(e *evidence) { e.orders = e.orders[1:] }, claimKept},
		"a key holds an order that does not exist": {func(e *evidence) { e.orders[0].owner, e.orders[0].userID = "", "" }, claimKept},
		"an acknowledged order has another amount": {func(e *evidence) {
			e.keys[0].note(call{start: 20, end: 30, op: post, outcome: mismatched, body: 1, status: 422}, answer{})
			e.orders[0].amount = e.keys[0].amount(1)
		}, claimKept},
		"a key is answered with two orders": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: replayed, status: 200}, answer{uuid.New(), 1})
		}, claimOne},
		"a key has another order than it was answered with": {func(e *evidence) { e.orders[0].id = uuid.New() }, claimOne},
		"a key has two orders": {func(e *evidence) {
			o := e.orders[0]
			o.id = uuid.New()
			e.orders = append(e.orders, o)
		}, claimOne},
		"an order has no key":            {func(e *evidence) { e.orders[0].caller, e.orders[0].key = "", "" }, claimOne},
		"an order was placed for nobody": {func(e *evidence) { e.orders[0].key = "never sent" }, claimOne},
		"a replay has other bytes": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: replayed, status: 200}, answer{e.keys[0].answers[0].order, 2})
		}, claimReplay},
		"a key is placed twice": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: placed, status: 200}, e.keys[0].answers[0])
		}, claimLinear},
		"a replay of what nobody sent": {func(e *evidence) { e.keys[0].calls = e.keys[0].calls[1:] }, claimLinear},
		"a replay of another body": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: replayed, body: 1, status: 200}, e.keys[0].answers[0])
		}, claimLinear},
		"a 422 for the right body": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: mismatched, status: 422}, answer{})
		}, claimLinear},
		"a 409 after the answer": {func(e *evidence) {
			later(e.keys[0], call{op: post, outcome: inProgress, status: 409}, answer{})
		}, claimLinear},
		"a 404 for an own order": {func(e *evidence) {
			later(e.keys[0], call{op: get, outcome: absent, status: 404}, answer{})
		}, claimLinear},
		"an order read by another caller": {func(e *evidence) {
			later(e.keys[0], call{op: spy, outcome: found, status: 200}, e.keys[0].answers[0])
		}, claimPrivate},
		"one order for two callers": {func(e *evidence) {
			later(e.keys[1], call{op: post, outcome: replayed, status: 200}, e.keys[0].answers[0])
		}, claimPrivate},
		"an order of another caller under a key": {func(e *evidence) { e.orders[0].owner = "bob" }, claimPrivate},
		"an order for another's user":            {func(e *evidence) { e.orders[0].userID = "bob.0" }, claimPrivate},
		"a mail to another":                      {func(e *evidence) { e.mails[0].to = e.mails[1].to }, claimPrivate},
		"a 500": {func(e *evidence) {
			k := e.keys[0]
			k.remark("500")
			later(k, call{op: post, outcome: wrong, status: 500}, answer{})
		}, claimAnswers},
		"an order without a mail":         {func(e *evidence) { e.mails = e.mails[1:] }, claimAnnounced},
		"a doubled mail":                  {func(e *evidence) { e.mails = append(e.mails, e.mails[0]) }, claimOneMail},
		"a mail under another Message-ID": {func(e *evidence) { e.mails[0].event = uuid.New() }, claimOneMail},
		"an order with two events": {func(e *evidence) {
			m := e.mails[0]
			m.event = uuid.New()
			e.events[m.event] = m.order
			e.mails = append(e.mails, m)
		}, claimOneMail},
		"reconcile says something": {func(e *evidence) { e.reconcile = "1 order without an event" }, claimReconcile},
		"a panic":                  {func(e *evidence) { e.cries = []string{"panic: no"} }, claimHealthy},
		"no end on SIGTERM":        {func(e *evidence) { e.unclean = []string{"worker-1"} }, claimHealthy},
		"no recovery":              {func(e *evidence) { e.strikes = []strike{{Began: 4 * time.Second, Ended: 5 * time.Second}} }, claimRecovery},
		"a slow recovery of one server": {func(e *evidence) {
			e.strikes = []strike{{Began: 0, Ended: 1500 * time.Millisecond}}
			e.keys[3].calls[0].end += int64(10 * time.Second)
			for i := range e.keys[3].calls[1:] {
				e.keys[3].calls[1+i].start += int64(20 * time.Second)
				e.keys[3].calls[1+i].end += int64(20 * time.Second)
			}
		}, claimRecovery},
		"a slow delivery": {func(e *evidence) {
			e.strikes = []strike{{Began: 0, Ended: 1500 * time.Millisecond}}
			e.mails[2].at, e.mails[3].at = 30*time.Second, 31*time.Second
		}, claimRecovery},
	} {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			e := world()
			test.spoil(e)
			if v := judgeAll(e); v.Count[test.claim] == 0 {
				t.Errorf("not found; the judge says %+v", v.Violations)
			}
		})
	}
}

// Not all that looks odd is wrong.
func TestTheJudgeAllowsWhatIsDocumented(t *testing.T) {
	t.Parallel()
	for title, change := range map[string]func(e *evidence){
		"a first answer that is a replay of a send that was lost": func(e *evidence) {
			k := e.keys[0]
			k.calls[0].outcome, k.calls[0].status = unclear, 0
		},
		"a lost send that takes effect long after its client gave up": func(e *evidence) {
			k := e.keys[0]
			k.calls = append([]call{{start: -100, end: -50, op: post, outcome: unclear}, {start: -40, end: -30, op: post, outcome: inProgress}}, k.calls[1:]...)
		},
		"a lost send that never takes effect": func(e *evidence) {
			e.keys[0].note(call{start: 5, end: 6, op: post, outcome: unclear, body: 1}, answer{})
		},
		"a 409 while the first send is under way": func(e *evidence) {
			e.keys[0].note(call{start: 1, end: 5, op: post, outcome: inProgress}, answer{})
		},
		"a mail again after its consumer was killed": func(e *evidence) {
			e.strikes = []strike{{fault: fault{Kind: "kill", Target: "consumer-1"}, Began: e.mails[0].at + 50*time.Millisecond, Ended: e.mails[0].at + time.Second}}
			e.mails = append(e.mails, e.mails[0])
			e.until = 0
		},
		"an order of a send that was never answered": func(e *evidence) {
			k := &keyLog{caller: 1, number: 77}
			k.note(call{op: post, outcome: unclear}, answer{})
			order, event := uuid.New(), uuid.New()
			e.keys, e.events[event] = append(e.keys, k), order
			e.orders = append(e.orders, dbOrder{order, "alice", k.value(), "alice", k.userID(), k.amount(0)})
			e.mails = append(e.mails, mail{event, order, k.userID() + "@example.com", 0})
		},
	} {
		t.Run(title, func(t *testing.T) {
			t.Parallel()
			e := world()
			change(e)
			if v := judgeAll(e); v.total() > 0 {
				t.Errorf("%+v", v.Violations)
			}
		})
	}
}

func TestTheSameSeedGivesTheSameScript(t *testing.T) {
	t.Parallel()
	script := func(seed uint64) string {
		var text strings.Builder
		printScript(&text, seed, draw(seed, 30*time.Minute, 5*time.Second))
		return text.String()
	}
	if first := script(7); script(7) != first || script(8) == first {
		t.Error("a seed does not name one script")
	}
	drawn := draw(7, 30*time.Minute, 5*time.Second)
	if len(drawn) < 300 {
		t.Errorf("%d faults in half an hour", len(drawn))
	}
	seen := map[string]bool{}
	for _, f := range drawn[:len(kinds)] {
		seen[f.Kind] = true
	}
	if len(seen) != len(kinds) {
		t.Errorf("the first %d faults are of %d kinds", len(kinds), len(seen))
	}
}

func TestRecoveryDoesNotCountTheTimeOfOtherFaults(t *testing.T) {
	t.Parallel()
	served := firstsOf([]moment{{9 * time.Second, 10 * time.Second}, {time.Second, 20 * time.Second}})
	strikes := []strike{{Began: 0, Ended: 2 * time.Second}, {Began: 4 * time.Second, Ended: 7 * time.Second}}
	if took, ok := since(2*time.Second, served, strikes); !ok || took != 5*time.Second {
		t.Errorf("it took %s; want 5s, of 8s in which another fault lasted for 3s", took)
	}
	if _, ok := since(11*time.Second, served, strikes); ok {
		t.Error("recovered by what was begun before the fault was over")
	}
}
