package server

import (
	"bytes"
	"encoding/json"
	"testing"
	"unicode/utf8"

	"idempotent-orders/order"
)

// Fingerprint and stored values come from the same parse. Whatever a stranger sends: what is accepted keeps the rules, and
// means, to any strict reader, what was understood.
func FuzzOrderBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `{"user_id":"a","amount":1}`, `{"amount":1,"amount":2}`, `{"Amount":1}`, `{"\u0061mount":5}`, `{"user_id":"\ud83d\ude00"}`,
		`{"user_id":"\ud800"}`, `{"amount":1e3}`, `{"amount":-0}`, `{"user_id":"<&>\u2028"}`, `null`, `[]`, "{\"user_id\":\"\xff\"}", `{} {}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		understood, err := parseOrderRequest(body)
		if err != nil {
			return
		}
		draft := order.Draft{UserID: *understood.UserId, Amount: *understood.Amount}
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
