package naive_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"idempotent-orders/bench/naive"
	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// The figures count for nothing if the contender cuts corners.
func TestTheNaiveServerMakesOneOrderAKey(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t)
	pool, err := naive.Open(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	rdb, _ := testenv.Redis(t)
	handler := naive.New(pool, rdb)
	post := func(key, body string) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/orders", strings.NewReader(body))
		r.Header.Set("Idempotency-Key", key)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w
	}

	var sends sync.WaitGroup
	for range 20 {
		sends.Go(func() {
			if code := post("same", "").Code; code != http.StatusOK && code != http.StatusConflict {
				t.Errorf("a concurrent send got %d", code)
			}
		})
	}
	sends.Wait()
	first, again := post("same", `{"amount":1000}`), post("same", "")
	if first.Code != http.StatusOK || first.Body.String() != again.Body.String() || again.Header().Get("Idempotency-Replayed") != "true" {
		t.Errorf("a replay got %d %s, then %d %s", first.Code, first.Body, again.Code, again.Body)
	}
	if code := post("same", `{"amount":2}`).Code; code != http.StatusUnprocessableEntity {
		t.Errorf("another order under the key got %d", code)
	}
	if code := post("", "").Code; code != http.StatusBadRequest {
		t.Errorf("no key got %d", code)
	}
	if code := post("other", "").Code; code != http.StatusOK {
		t.Errorf("another key got %d", code)
	}
	if rdb.FlushAll(t.Context()); post("same", "").Body.String() != first.Body.String() {
		t.Error("without Redis the answer is another")
	}

	var orders, keys, events int
	if err := pool.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM idempotency_keys),
		(SELECT count(*) FROM outbox)`).Scan(&orders, &keys, &events); err != nil {
		t.Fatal(err)
	}
	if orders != 2 || keys != 2 || events != 2 {
		t.Errorf("two keys made %d orders, %d keys, %d events", orders, keys, events)
	}
}
