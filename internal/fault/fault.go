// Package fault lets a test break the program on purpose: have a process die at a named step between the first byte of a request
// and the last acknowledgement, or do without one of the devices that keep the promise.
//
// Nothing of it is in an ordinary build: there a step is an empty function that is inlined away, and no variable is read. Built with
// -tags=faults, CRASH_AT=place.committed has the process kill itself with SIGKILL when it reaches that step, and
// CRASH_AT=place.committed:3 when it reaches it the third time; with PANIC_AT=place.committed it panics there, each time;
// REMOVE=unique-key takes the unique key away, and so on. A name that is not known ends such a build at its start.
package fault

// Point is a step at which a process may die.
type Point string

// The steps, in the order of an order. A name begins with where the step is taken: server, guard and place in a server; relay, retry,
// redrive and sweep in a worker; email in a consumer.
const (
	ServerRead      Point = "server.read"      // the request is read
	ServerValidated Point = "server.validated" // it is an order
	GuardExchanged  Point = "guard.exchanged"  // Redis has run scripts, which nobody knows yet: reserve, complete or release
	GuardReserved   Point = "guard.reserved"   // this send may go on
	PlaceFound      Point = "place.found"      // keys were looked up, as for a replay
	PlaceBegun      Point = "place.begun"      // a batch has its connection
	PlaceCommitted  Point = "place.committed"  // it is committed, which nobody knows yet
	PlaceLost       Point = "place.lost"       // others had some of its keys before, and have not been looked up
	PlaceUnknown    Point = "place.unknown"    // the connection was lost in it, and its keys have not been looked up
	GuardPlaced     Point = "guard.placed"     // a send is placed, and Redis has not been told
	GuardRefused    Point = "guard.refused"    // a send is not placed, and its reservation is not given back
	ServerAnswering Point = "server.answering" // there is an answer, of which nothing is written
	ServerAnswered  Point = "server.answered"  // it is written, as far as the buffers of the connection

	RelayTurn      Point = "relay.turn"      // the turn is taken
	RelayClaimed   Point = "relay.claimed"   // a batch is claimed
	RelayPublished Point = "relay.published" // it is published, and not committed
	RelayHeld      Point = "relay.held"      // what has to wait is held back, and not committed
	RelayCommitted Point = "relay.committed" // the turn is committed

	RetryPublished Point = "retry.published" // what was held back is published, and still held back
	RetryArchived  Point = "retry.archived"  // it is in the archive, and not committed

	RedriveNoted     Point = "redrive.noted"     // the broker's new epoch is noted, and not committed
	RedrivePublished Point = "redrive.published" // a slice of the archive is published again, and not noted
	RedriveMoved     Point = "redrive.moved"     // that is noted, and not committed

	SweepBegun     Point = "sweep.begun"     // the sweep is taken
	SweepTrimmed   Point = "sweep.trimmed"   // the stream is trimmed
	SweepMarked    Point = "sweep.marked"    // it is noted up to where everything is finished
	SweepExpired   Point = "sweep.expired"   // a day has left the archive
	SweepForgotten Point = "sweep.forgotten" // its events have left the inbox, and its table is still there
	SweepKeys      Point = "sweep.keys"      // expired keys are deleted

	EmailReceived     Point = "email.received"     // events are received
	EmailEntered      Point = "email.entered"      // they are in the inbox
	EmailSending      Point = "email.sending"      // a mail is about to be sent
	EmailSent         Point = "email.sent"         // it is sent, and not marked
	EmailMarked       Point = "email.marked"       // it is marked, and not acknowledged
	EmailAcknowledged Point = "email.acknowledged" // events that were marked before are acknowledged
)

var points = []Point{
	ServerRead, ServerValidated, GuardExchanged, GuardReserved, PlaceFound, PlaceBegun, PlaceCommitted, PlaceLost, PlaceUnknown,
	GuardPlaced, GuardRefused, ServerAnswering, ServerAnswered,
	RelayTurn, RelayClaimed, RelayPublished, RelayHeld, RelayCommitted,
	RetryPublished, RetryArchived,
	RedriveNoted, RedrivePublished, RedriveMoved,
	SweepBegun, SweepTrimmed, SweepMarked, SweepExpired, SweepForgotten, SweepKeys,
	EmailReceived, EmailEntered, EmailSending, EmailSent, EmailMarked, EmailAcknowledged,
}

// Points returns every step, in the order of an order.
func Points() []Point { return append([]Point(nil), points...) }

// Removal is a device that keeps the promise, and that a test build can do without.
type Removal string

// The devices.
const (
	UniqueKey         Removal = "unique-key"         // at most one row for an idempotency key
	TokenCheck        Removal = "token-check"        // who has lost its reservation neither completes nor releases it
	Turn              Removal = "turn"               // one relay publishes at a time
	MaterializedClaim Removal = "materialized-claim" // what a turn claims is decided once
	FloorHorizon      Removal = "floor-horizon"      // the floor waits for those who write to the outbox
	Inbox             Removal = "inbox"              // a second delivery is known
	CommitLookUp      Removal = "commit-look-up"     // after a commit of unknown outcome the keys are looked up
	Fingerprint       Removal = "fingerprint"        // a key answers only for the request it was used for
)

var removals = []Removal{UniqueKey, TokenCheck, Turn, MaterializedClaim, FloorHorizon, Inbox, CommitLookUp, Fingerprint}

// Removals returns every device.
func Removals() []Removal { return append([]Removal(nil), removals...) }
