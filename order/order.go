// Package order knows what an order is, and places it.
//
// An order, the idempotency key it was sent under and the event that announces it are written by one transaction: all
// three exist, or none. The unique idempotency key decides which of several sends wins; the others get the winner's
// answer. PostgreSQL is the only judge, so any number of servers may place at once, with or without Redis.
package order

import (
	"crypto/sha256"
	"errors"
	"strconv"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/idempotency"
)

// Operation is the scope of the idempotency keys under which orders are placed.
const Operation = "PlaceOrder"

// What may be asked for; openapi.yaml and the table say the same.
const (
	MaxUserID     = 64                // characters; at least one
	MaxAmount     = 1_000_000_000_000 // integer minor units; at least one
	DefaultUserID = "user-456"
	DefaultAmount = 1000
)

var (
	// ErrNotFound: the caller has no such order.
	ErrNotFound = errors.New("no such order")
	// ErrUnavailable: PostgreSQL did not do what was asked, and nothing was committed.
	ErrUnavailable = errors.New("PostgreSQL is unavailable")
)

// Draft is a validated request for an order.
type Draft struct {
	UserID string // 1 to MaxUserID characters, without U+0000
	Amount int64  // 1 to MaxAmount
}

// Fingerprint is the same for two drafts if and only if they ask for the same.
func (d Draft) Fingerprint() idempotency.Fingerprint {
	// The amount has only digits, so the first U+0000s end the parts however the user id goes on.
	parts := make([]byte, 0, 512) // does not escape
	parts = strconv.AppendInt(append(parts, "order.v1\x00"...), d.Amount, 10)
	return sha256.Sum256(append(append(parts, 0), d.UserID...))
}

// Order is a placed order.
type Order struct {
	ID        uuid.UUID
	Caller    string
	UserID    string
	Amount    int64 // integer minor units
	Status    string
	CreatedAt time.Time // UTC, in microseconds, by the clock of the server that placed it
}

// Send is one send of a draft under a key.
type Send struct {
	Key         idempotency.Key
	Draft       Draft
	Traceparent string // W3C Trace Context of the request, or empty; carried on to the event
}

// Placement is the answer to a send.
type Placement struct {
	OrderID   uuid.UUID
	ExpiresAt time.Time // until when the key answers; UTC, by PostgreSQL's clock
	Replayed  bool      // another send placed the order
}

// Result is what became of one send of a batch.
type Result struct {
	Placement Placement
	Err       error // as Place returns it
}
