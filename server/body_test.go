package server

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"unicode/utf8"

	"idempotent-orders/gen/api"
	"idempotent-orders/order"
)

// Fingerprint and stored values come from the same parse. Whatever a stranger sends: what is handed on to the generated
// code, and so to the fingerprint and to the tables, is what parseOrderRequest understood; it keeps the rules; and a body
// that is accepted means, to any strict reader, what was understood.
func FuzzOrderBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `{"user_id":"a","amount":1}`, `{"amount":1,"amount":2}`, `{"Amount":1}`, `{"\u0061mount":5}`, `{"user_id":"\ud83d\ude00"}`,
		`{"user_id":"\ud800"}`, `{"amount":1e3}`, `{"amount":-0}`, `{"user_id":"<&>\u2028"}`, `null`, `[]`, "{\"user_id\":\"\xff\"}", `{} {}`,
	} {
		f.Add([]byte(seed))
	}
	s := New(Config{Log: slog.New(slog.DiscardHandler)})
	f.Fuzz(func(t *testing.T, body []byte) {
		understood, err := parseOrderRequest(body)
		var handedOn *api.OrderRequest
		next := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			content, err := io.ReadAll(r.Body)
			if err != nil {
				t.Fatal(err)
			}
			handedOn = &api.OrderRequest{}
			if err := json.Unmarshal(content, handedOn); err != nil {
				t.Fatal(err)
			}
		})
		r := httptest.NewRequest("POST", "/orders", bytes.NewReader(body))
		r.Pattern = "POST /orders"
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		s.strictBody(next).ServeHTTP(w, r)

		if err != nil || len(body) > maxBody {
			if handedOn != nil || w.Code < 400 {
				t.Fatalf("%q was refused (%v) and yet handed on", body, err)
			}
			return
		}
		if handedOn == nil || *handedOn.UserId != *understood.UserId || *handedOn.Amount != *understood.Amount {
			t.Fatalf("%q: %v was understood, %v handed on", body, understood, handedOn)
		}
		draft := order.Draft{UserID: *handedOn.UserId, Amount: *handedOn.Amount}
		if draft.Fingerprint() != (order.Draft{UserID: *understood.UserId, Amount: *understood.Amount}).Fingerprint() {
			t.Fatalf("%q has two fingerprints", body)
		}
		if n := utf8.RuneCountInString(draft.UserID); n < 1 || n > order.MaxUserID || !utf8.ValidString(draft.UserID) ||
			bytes.IndexByte([]byte(draft.UserID), 0) >= 0 || draft.Amount < 1 || draft.Amount > order.MaxAmount {
			t.Fatalf("%q was accepted as %+v", body, draft)
		}
		checkMeaning(t, body, draft)
	})
}

// checkMeaning reads an accepted body with another reader.
func checkMeaning(t *testing.T, body []byte, draft order.Draft) {
	want := map[string]any{}
	if len(body) > 0 {
		if err := json.Unmarshal(body, &want); err != nil {
			t.Fatalf("%q was accepted, and is not JSON: %v", body, err)
		}
	}
	for name := range want {
		if name != "user_id" && name != "amount" {
			t.Fatalf("%q was accepted with member %q", body, name)
		}
	}
	if id, given := want["user_id"]; given && id != draft.UserID || !given && draft.UserID != order.DefaultUserID {
		t.Fatalf("%q: the user is %q", body, draft.UserID)
	}
	if amount, given := want["amount"]; given && amount != float64(draft.Amount) || !given && draft.Amount != order.DefaultAmount {
		t.Fatalf("%q: the amount is %d", body, draft.Amount)
	}
}
