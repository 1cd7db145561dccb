package server

import (
	"context"
	"errors"
	"net/http"
	"time"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/order"
)

// PlaceOrder places an order, or repeats the answer to an earlier send of the same. The body has every member.
func (s *Server) PlaceOrder(ctx context.Context, request api.PlaceOrderRequestObject) (api.PlaceOrderResponseObject, error) {
	key, err := s.keyOf(ctx, request.Params.IdempotencyKey)
	if err != nil {
		return nil, err
	}
	send := order.Send{
		Key:   key,
		Draft: order.Draft{UserID: *request.Body.UserId, Amount: *request.Body.Amount},
	}
	if request.Params.Traceparent != nil {
		send.Traceparent = *request.Params.Traceparent
	}
	if placed, err := s.Orders.Recall(send); !errors.Is(err, idempotency.ErrNotCommitted) {
		return answerTo(placed, err)
	}
	patience, cancel := s.patience(request.Params.Prefer)
	defer cancel()
	under := s.working
	if patience != none {
		under = s.waiting
	}
	if err := under.enter(ctx, send.Key.Caller); err != nil {
		return nil, err
	}
	defer under.leave(send.Key.Caller)
	if refused := s.Admission.refusal(); refused != nil { // but what was placed before is still answered
		placed, err := s.Orders.Find(send)
		if errors.Is(err, idempotency.ErrNotCommitted) {
			err = refused
		}
		return answerTo(placed, err)
	}
	placed, err := idempotency.Once(ctx, patience, s.Guard, idempotency.Send[order.Placement]{
		Key:   send.Key,
		Find:  func() (order.Placement, error) { return s.Orders.Find(send) },
		Place: func() (order.Placement, error) { return s.Orders.Place(send) },
	})
	return answerTo(placed, err)
}

// patience returns a context that is done when a request should no longer wait for another send of its key.
func (s *Server) patience(prefer *string) (context.Context, context.CancelFunc) {
	wait := time.Duration(0)
	if prefer != nil {
		wait = preferredWait(*prefer)
	}
	if wait == 0 { // as nearly always
		return none, func() {}
	}
	return context.WithTimeout(s.stopping, wait)
}

// none is the patience of a request that does not wait.
var none = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// answerTo is the same for every send of a placement, but for the mark of a replay.
func answerTo(placed order.Placement, err error) (api.PlaceOrderResponseObject, error) {
	if err != nil {
		return nil, err
	}
	return placedResponse(placed), nil
}

// placedResponse writes what api.PlaceOrder200JSONResponse would, byte for byte, in a fraction of its time.
type placedResponse order.Placement

var applicationJSON, replayed = []string{"application/json"}, []string{"true"}

// VisitPlaceOrderResponse writes the answer.
func (p placedResponse) VisitPlaceOrderResponse(w http.ResponseWriter) error {
	return p.text().write(w, p.Replayed)
}

// placedText is the answer to a placement, as it is written.
type placedText struct {
	expires, location []string // each the values of a header
	content           []byte
}

func (p placedResponse) text() placedText {
	location := "/orders/" + p.OrderID.String()
	return placedText{
		expires: []string{p.ExpiresAt.Format(time.RFC3339)}, location: []string{location},
		content: []byte(`{"status":"success","order_id":"` + location[len("/orders/"):] + "\"}\n"),
	}
}

func (t placedText) write(w http.ResponseWriter, isReplay bool) error {
	h := w.Header()
	h["Content-Type"] = applicationJSON
	h["Idempotency-Expires"] = t.expires
	if isReplay {
		h["Idempotency-Replayed"] = replayed
	}
	h["Location"] = t.location
	_, err := w.Write(t.content)
	return err
}

// GetOrder returns an order of the caller.
func (s *Server) GetOrder(ctx context.Context, request api.GetOrderRequestObject) (api.GetOrderResponseObject, error) {
	caller, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.working.enter(ctx, caller); err != nil {
		return nil, err
	}
	defer s.working.leave(caller)
	o, err := s.Orders.Get(ctx, caller, request.OrderId)
	if err != nil {
		return nil, err
	}
	return api.GetOrder200JSONResponse{
		OrderId: o.ID, UserId: o.UserID, Amount: o.Amount, Status: api.OrderStatus(o.Status), CreatedAt: o.CreatedAt,
	}, nil
}
