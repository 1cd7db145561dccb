package worker

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/gen/db"
	"idempotent-orders/internal/fault"
)

// A shift is one run of a consumer. One goroutine owns it, and decides; what is slow is done aside, each by a goroutine of its
// own: one receives, one enters events into the inbox, one marks and acknowledges, one keeps what is in hand, and several send.
// So a slow step holds up no other, and each crossing carries what came together during the last.
//
//	arrived --enter--> ready --send--> finished --mark, acknowledge--> (gone)
//	   ^                         |
//	   +------ held: not now <---+
type shift struct {
	*Consumer
	until  context.Context // when the consumer is to stop
	longer context.Context // for what has begun: some time longer
	sends  context.Context // for mails that have begun: not quite as long
	drain  bool            // stop when there is nothing to receive
	err    error           // why the shift ended early

	aside    chan func() // what to do here after something was done aside
	underWay int         // how many things are done aside
	alarm    *time.Timer
	stopping bool

	inHand   map[uuid.UUID]*task // every task, wherever it is
	arrived  []*task             // to be entered
	ready    []*task             // entered, to be sent
	held     []*task             // to be entered again when they are due, in that order
	finished []*task             // to be marked
	acks     []string            // deliveries that need nothing more
	markAt   time.Time           // when what is finished is marked at the latest
	keepAt   time.Time           // when the deliveries in hand are kept next
	alone    *task               // one that nothing else is sent beside

	receiving, entering, marking, keeping bool
	sending                               int

	// The mail server, or the way to it, is taken to be away after concurrentSends failures without a success between them. Then
	// one mail is tried at a time, with longer and longer pauses.
	failures int
	pause    time.Duration
	pausedTo time.Time
	away     trouble

	receiveFailed  backoff
	receiveTrouble trouble
}

func newShift(c *Consumer, until, longer, sends context.Context, drain bool) *shift {
	return &shift{
		Consumer: c, until: until, longer: longer, sends: sends, drain: drain,
		// With room for everything that may be under way, so that nothing aside ever waits.
		aside: make(chan func(), concurrentSends+5), alarm: time.NewTimer(time.Hour), inHand: map[uuid.UUID]*task{},
		away:          trouble{log: c.log, doing: "Sending mails"},
		receiveFailed: backoff{least: failedLeast, most: failedMost}, receiveTrouble: trouble{log: c.log, doing: "Receiving events"},
	}
}

// work works until it is told to stop, or has drained what there was, and everything that was begun is done.
func (s *shift) work() {
	defer s.alarm.Stop()
	for {
		s.begin()
		if s.underWay == 0 && s.stopping {
			return
		}
		s.wait()
	}
}

// begin begins whatever can be begun.
func (s *shift) begin() {
	now := time.Now()
	if s.until.Err() != nil {
		s.stopping = true
	}
	s.mark(now)
	s.keep(now)
	if s.stopping {
		return
	}
	s.receive()
	s.send(now)
	s.enter(now)
	if s.drain && s.underWay == 0 && len(s.inHand) == len(s.held) { // which leave no room to receive more
		s.stopping = true
	}
}

// busy tells whether there are mails to send now, or being sent.
func (s *shift) busy() bool { return s.entering || s.sending > 0 || len(s.arrived)+len(s.ready) > 0 }

// paused tells whether the mail server is taken to be away.
func (s *shift) paused() bool { return s.failures >= concurrentSends }

// wait waits until something is done, or due, or the shift is to stop.
func (s *shift) wait() {
	stop := s.until.Done()
	if s.stopping {
		stop = nil
	}
	var due <-chan time.Time
	if next := s.next(); !next.IsZero() {
		s.alarm.Reset(max(time.Until(next), time.Millisecond))
		due = s.alarm.C
	}
	select {
	case then := <-s.aside:
		s.underWay--
		then()
	case <-due:
	case <-stop:
	}
}

// next returns when something is due that nothing under way will lead to; zero: never.
func (s *shift) next() (next time.Time) {
	earlier := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	if len(s.finished) > 0 && !s.marking {
		earlier(s.markAt)
	}
	if len(s.inHand) > 0 && !s.keeping {
		earlier(s.keepAt)
	}
	if s.stopping || s.entering {
		return next
	}
	switch paused := s.paused(); {
	case paused && s.sending > 0:
	case paused && len(s.ready)+len(s.arrived) > 0:
		earlier(s.pausedTo)
	case paused && len(s.held) > 0 && s.held[0].due.Before(s.pausedTo):
		earlier(s.pausedTo)
	case len(s.held) > 0:
		earlier(s.held[0].due)
	}
	return next
}

// do does something aside, and then, here, what it returns.
func (s *shift) do(slow func() (then func())) {
	s.underWay++
	go func() { s.aside <- slow() }()
}

// receive receives when there is room: a batch ahead of what is being sent, and none beside one that is to be alone.
func (s *shift) receive() {
	ahead := len(s.arrived) + len(s.ready)
	if s.receiving || s.alone != nil || ahead >= consumerBatch || len(s.inHand) >= s.Consumer.inHand {
		return
	}
	wait := receiveWait
	if s.drain {
		wait = 0
		if s.busy() {
			wait = markWithin
		}
	}
	s.receiving = true
	s.do(func() func() {
		deliveries, err := s.subscription.Receive(s.longer, consumerBatch, wait)
		s.receiveTrouble.note(s.until, err)
		if err == nil {
			s.receiveFailed.reset()
			deliveries = s.isolate(deliveries)
		} else if !s.drain {
			s.receiveFailed.wait(s.until, nil)
		}
		tasks, done := s.read(s.longer, deliveries)
		return func() { s.received(tasks, done, err) }
	})
}

// isolate returns the first delivery that is suspected of killing its receivers, and releases the others; or all, if none is.
func (s *shift) isolate(deliveries []broker.Delivery) []broker.Delivery {
	counting, ok := s.subscription.(broker.Counting)
	first := slices.IndexFunc(deliveries, func(d broker.Delivery) bool { return suspected(d.Deliveries) })
	if !ok || first < 0 {
		return deliveries
	}
	others := slices.Concat(deliveries[:first], deliveries[first+1:])
	ctx, cancel := context.WithTimeout(s.longer, stepTimeout)
	defer cancel()
	_ = counting.Release(ctx, others) // else they are abandoned, and count
	return deliveries[first : first+1]
}

func suspected(deliveries int64) bool {
	return deliveries >= suspectDeliveries && deliveries <= maxDeliveries
}

func (s *shift) received(tasks []*task, done []string, err error) {
	s.receiving = false
	s.acks = append(s.acks, done...)
	if len(s.inHand) == 0 {
		s.keepAt = time.Now().Add(s.abandonedAfter / 4)
	}
	var again []*task
	for _, t := range tasks {
		id := t.mail.EventID
		if known := s.inHand[id]; known != nil {
			if known.deliveredAgain(t) {
				again = append(again, known)
			}
			continue
		}
		s.inHand[id] = t
		s.arrived = append(s.arrived, t)
		if suspected(t.deliveries) {
			s.alone = t
		}
	}
	s.recount(again)
	if s.drain && (err != nil || len(tasks)+len(done) == 0) {
		s.drained(err)
	}
}

// deliveredAgain takes over what another delivery of the same event brings, and tells whether it is one that is in hand already:
// this consumer stood still, and counted as dead. Otherwise the event was published twice.
func (t *task) deliveredAgain(again *task) bool {
	if again.forced.After(t.forced) {
		t.forced = again.forced
	}
	if slices.Contains(t.tags, again.tags[0]) {
		return true
	}
	t.tags = append(t.tags, again.tags...)
	t.deliveries = max(t.deliveries, again.deliveries)
	return false
}

// drained ends a shift that was to drain when nothing is left but what cannot be sent now.
func (s *shift) drained(err error) {
	if err != nil || !s.busy() || s.paused() {
		s.stopping, s.err = true, err
	}
}

// enter takes what has arrived, and what is due again, into the inbox. While the mail server is away, one that is due is enough.
func (s *shift) enter(now time.Time) {
	if s.entering {
		return
	}
	due := consumerBatch
	if s.paused() {
		due = 1
		if s.sending > 0 || len(s.ready)+len(s.arrived) > 0 || now.Before(s.pausedTo) {
			due = 0
		}
	}
	for ; due > 0 && len(s.held) > 0 && !s.held[0].due.After(now); due-- {
		s.arrived = append(s.arrived, s.held[0])
		s.held = s.held[1:]
	}
	batch := s.arrived[:min(len(s.arrived), consumerBatch)]
	if len(batch) == 0 {
		return
	}
	s.arrived = s.arrived[len(batch):]
	s.entering = true
	s.do(func() func() {
		began := time.Now()
		mine, finished, err := s.Consumer.enter(s.longer, batch)
		fault.EmailEntered.Reached()
		return func() { s.entered(batch, mine, finished, began, err) }
	})
}

func (s *shift) entered(batch []*task, mine, finished []uuid.UUID, began time.Time, err error) {
	s.entering = false
	if err != nil { // only when it is time to go
		return
	}
	for _, id := range mine {
		t := s.inHand[id]
		t.entered = began
		if t.reason != "" || t.noMail {
			s.finish(t)
			continue
		}
		s.ready = append(s.ready, t)
	}
	for _, id := range finished {
		s.settled(s.inHand[id])
	}
	if len(mine)+len(finished) == len(batch) {
		return
	}
	for _, t := range batch {
		if s.inHand[t.mail.EventID] == t && !t.entered.Equal(began) {
			s.leave(t)
		}
	}
}

// leave leaves a task to another consumer that has it in the inbox, and looks again later what became of it.
func (s *shift) leave(t *task) {
	s.hold(t, min(failedLeast<<min(t.left, 20), s.abandonedAfter))
	t.left++
}

// send begins to send what is ready, as far as it may.
func (s *shift) send(now time.Time) {
	for s.sending < concurrentSends && len(s.ready) > 0 {
		if s.sending > 0 && (s.alone != nil || s.paused()) {
			return
		}
		if s.paused() && now.Before(s.pausedTo) {
			return
		}
		i := s.pick()
		if i < 0 {
			return
		}
		t := s.ready[i]
		if s.stale(t, now) {
			s.enterAgain(now)
			return
		}
		if s.ready = slices.Delete(s.ready, i, i+1); len(s.ready) == 0 {
			s.ready = nil
		}
		s.sending++
		s.do(func() func() {
			err := s.sendOne(t.mail)
			return func() { s.sent(t, err) }
		})
	}
}

// pick returns the place of the task to send next: the one that is to be alone, if there is one; while the mail server is away
// one that never failed, if there is one, for the others may have failed for themselves; else the first.
func (s *shift) pick() int {
	switch {
	case s.alone != nil:
		return slices.Index(s.ready, s.alone)
	case s.paused():
		return max(slices.IndexFunc(s.ready, func(t *task) bool { return t.tries == 0 }), 0)
	default:
		return 0
	}
}

// stale tells whether a task was entered so long ago that another may have taken it over before its mail is sent, as after a long
// pause of this process or many slow mails.
func (s *shift) stale(t *task, now time.Time) bool { return now.Sub(t.entered) > s.abandonedAfter/2 }

// enterAgain has what is ready and stale entered again: then it is known whose it is.
func (s *shift) enterAgain(now time.Time) {
	var ready []*task
	for _, t := range s.ready {
		if s.stale(t, now) {
			s.arrived = append(s.arrived, t)
		} else {
			ready = append(ready, t)
		}
	}
	s.ready = ready
}

func (s *shift) sendOne(mail Email) error {
	ctx, cancel := context.WithTimeout(s.sends, sendTimeout)
	defer cancel()
	fault.EmailSending.Reached()
	err := s.sender.Send(ctx, mail)
	fault.EmailSent.Reached()
	return err
}

func (s *shift) sent(t *task, err error) {
	s.sending--
	if s.alone == t {
		s.alone = nil
	}
	switch {
	case err == nil:
		s.answered()
		s.finish(t)
	case errors.Is(err, ErrRefused):
		s.answered()
		t.reason = reasonOf(err)
		s.finish(t)
	default:
		s.failed(t, err)
	}
}

// answered notes that the mail server does its work.
func (s *shift) answered() {
	s.failures, s.pause = 0, 0
	s.away.note(s.longer, nil)
}

// failed holds a task whose mail cannot be sent now.
func (s *shift) failed(t *task, err error) {
	if s.stopping {
		return
	}
	t.tries++
	if t.tries == 1 {
		s.log.WarnContext(s.longer, "A mail was not sent, and will be tried again", "event", t.mail.EventID, "order", t.mail.OrderID, "error", err)
	}
	s.hold(t, min(s.least<<min(t.tries-1, 20), s.most))
	s.forgive(t)
	if s.failures++; s.failures < concurrentSends || time.Now().Before(s.pausedTo) {
		return
	}
	s.away.note(s.longer, err)
	s.pause = min(max(2*s.pause, s.least), s.most)
	s.pausedTo = time.Now().Add(jitter(s.pause))
	s.stopping = s.drain
}

// hold keeps a task in hand until about the delay has passed.
func (s *shift) hold(t *task, delay time.Duration) {
	if s.alone == t {
		s.alone = nil
	}
	t.due = time.Now().Add(jitter(delay))
	i, _ := slices.BinarySearchFunc(s.held, t.due, func(t *task, due time.Time) int { return t.due.Compare(due) })
	s.held = slices.Insert(s.held, i, t)
}

// jitter returns a random time from half of d to d, so that tasks and processes do not move in step.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) } // #nosec G404 -- jitter is no secret

// forgive lets the broker forget that a task's receivers died: its mail has been tried, and nobody died of it.
func (s *shift) forgive(t *task) {
	if t.deliveries > 1 {
		t.deliveries = 1
		s.recount([]*task{t})
	}
}

// recount has the broker forget what it counted since tasks came into this hand, which did not die since. Else the deliveries to
// a consumer that stands still would make an event dead that nobody died of.
func (s *shift) recount(tasks []*task) {
	counting, ok := s.subscription.(broker.Counting)
	if !ok || len(tasks) == 0 {
		return
	}
	deliveries := deliveriesOf(tasks)
	s.do(func() func() {
		ctx, cancel := context.WithTimeout(s.longer, stepTimeout)
		defer cancel()
		_ = counting.Recount(ctx, deliveries) // else they are under suspicion a little longer
		return func() {}
	})
}

func deliveriesOf(tasks []*task) (deliveries []broker.Delivery) {
	for _, t := range tasks {
		for _, tag := range t.tags {
			deliveries = append(deliveries, broker.Delivery{Tag: tag, Deliveries: t.deliveries})
		}
	}
	return deliveries
}

// finish notes a task that is to be marked.
func (s *shift) finish(t *task) {
	if s.alone == t {
		s.alone = nil
	}
	if len(s.finished) == 0 {
		s.markAt = time.Now().Add(markWithin)
	}
	s.finished = append(s.finished, t)
}

// settled lets go of a task that needs nothing more but to be acknowledged.
func (s *shift) settled(t *task) {
	if s.alone == t {
		s.alone = nil
	}
	s.acks = append(s.acks, t.tags...)
	delete(s.inHand, t.mail.EventID)
}

// mark marks what is finished, and acknowledges what was marked before. It waits a little for what is being sent.
func (s *shift) mark(now time.Time) {
	if s.marking || len(s.finished)+len(s.acks) == 0 {
		return
	}
	idle := s.sending == 0 && (len(s.ready) == 0 || s.stopping || s.paused())
	enough := len(s.finished) >= markBatch || len(s.finished) > 0 && !now.Before(s.markAt)
	if !idle && !enough {
		return
	}
	tasks, acks := s.finished, s.acks
	s.finished, s.acks = nil, nil
	s.marking = true
	s.do(func() func() {
		marked, err := s.Consumer.mark(s.longer, tasks)
		if err == nil {
			err = s.acknowledge(s.longer, acks)
		}
		return func() { s.marked(tasks, marked, err) }
	})
}

// marked lets go of what is marked. What is not was taken over by another, which will mark it, or abandon it.
func (s *shift) marked(tasks []*task, marked []uuid.UUID, err error) {
	s.marking = false
	for _, id := range marked {
		t := s.inHand[id]
		if t.reason != "" {
			s.log.ErrorContext(s.longer, "An event is dead: its mail will not be sent", "event", id, "order", t.mail.OrderID, "reason", t.reason)
		}
		s.settled(t)
	}
	if len(marked) == len(tasks) {
		return
	}
	for _, t := range tasks {
		if s.inHand[t.mail.EventID] != t {
			continue
		}
		if err != nil { // it is time to go, and this was sent: it is not given back, but abandoned, and may be marked yet
			delete(s.inHand, t.mail.EventID)
			continue
		}
		s.leave(t)
	}
}

// keep tells the broker, from time to time, that what is in hand is not abandoned.
func (s *shift) keep(now time.Time) {
	if s.keeping || len(s.inHand) == 0 || now.Before(s.keepAt) {
		return
	}
	s.keepAt = now.Add(s.abandonedAfter / 4)
	var tags []string
	for _, t := range s.inHand {
		tags = append(tags, t.tags...)
	}
	s.keeping = true
	s.do(func() func() {
		ctx, cancel := context.WithTimeout(s.longer, stepTimeout)
		defer cancel()
		_ = s.subscription.Keep(ctx, tags) // who cannot reach the broker cannot acknowledge either
		return func() { s.keeping = false }
	})
}

// release gives back what is in hand and was not sent, so that others need not wait until it counts as abandoned.
func (s *shift) release() {
	if len(s.inHand) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(s.longer, stepTimeout)
	defer cancel()
	tasks := slices.Collect(maps.Values(s.inHand))
	err := db.New(s.pool).LeaveInbox(ctx, db.LeaveInboxParams{Consumer: EmailConsumer, EventIds: idsOf(tasks), Holder: s.holder})
	if counting, ok := s.subscription.(broker.Counting); ok {
		err = errors.Join(err, counting.Release(ctx, deliveriesOf(tasks)))
	}
	if err != nil {
		s.log.WarnContext(ctx, "Events could not be given back, and wait until they count as abandoned", "events", len(tasks), "error", err)
	}
}
