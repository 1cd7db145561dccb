package server

import (
	"context"
	"io"
	"net/http"

	"idempotent-orders/idempotency"
	"idempotent-orders/order"
)

// repeated answers itself what it knows to be a repeat, as next would, for a fraction of what that costs: POST /orders of a caller
// that has sent the same key and, byte for byte, the same body before, and got a replay for it. A body that is as long and another is
// read here, and handed on.
func (s *Server) repeated(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		known := s.noted(r)
		if known == nil || r.ContentLength != int64(len(known.body)) {
			next.ServeHTTP(w, r)
			return
		}
		body, err := readBody(w, r)
		if err != nil || string(body) != known.body {
			r.Body = &readAlready{r.Body, body, err}
			next.ServeHTTP(w, r)
			return
		}
		s.respond(w, r, known, nil)
	})
}

// replay is a send that was answered: its body, and the answer. What else can change the answer is looked at each time: who calls and
// its rate before, and here the key and the type of the body.
type replay struct {
	body   string
	answer placedText
}

// VisitPlaceOrderResponse writes the answer.
func (known *replay) VisitPlaceOrderResponse(w http.ResponseWriter) error {
	return known.answer.write(w, true)
}

// noted returns what is noted with the key of a request to place an order, or nil.
func (s *Server) noted(r *http.Request) *replay {
	keys := r.Header["Idempotency-Key"]
	if r.Method != http.MethodPost || r.URL.Path != "/orders" || len(keys) != 1 {
		return nil
	}
	key, err := s.keyOf(r.Context(), keys[0])
	if err != nil {
		return nil
	}
	known, _ := s.Orders.Noted(key).(*replay)
	return known
}

// note keeps a replay for the next send, in some 300 bytes and its body, if that is no longer than twice what an order needs.
func (s *Server) note(r *http.Request, header string, body []byte, placed placedResponse) {
	const most = 256
	if key, err := s.keyOf(r.Context(), header); err == nil && len(body) <= most {
		s.Orders.Note(key, order.Placement(placed), &replay{string(body), placed.text()})
	}
}

// keyOf returns the key that a caller names in a header.
func (s *Server) keyOf(ctx context.Context, header string) (idempotency.Key, error) {
	caller, err := s.caller(ctx)
	if err != nil {
		return idempotency.Key{}, err
	}
	value, err := idempotency.ParseKey(header)
	return idempotency.Key{Caller: caller, Operation: order.Operation, Value: value}, err
}

// readAlready is the body of a request that repeated has read, and what readBody said.
type readAlready struct {
	io.ReadCloser
	body []byte
	err  error
}

// bodyOf returns what readBody returns, also when that was called before.
func bodyOf(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if was, ok := r.Body.(*readAlready); ok {
		return was.body, was.err
	}
	return readBody(w, r)
}
