package server

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

const (
	stormKeys  = 200
	stormSends = 16
)

// Two hundred keys, each sent sixteen times at once to two servers: two hundred orders, whatever Redis does meanwhile.
func TestSimultaneousSendsPlaceOneOrderEach(t *testing.T) {
	for name, disturb := range map[string]func(t *testing.T, api *testAPI, halfWay, over <-chan struct{}){
		"undisturbed": func(*testing.T, *testAPI, <-chan struct{}, <-chan struct{}) {},
		"while Redis is flushed": func(t *testing.T, api *testAPI, _, over <-chan struct{}) {
			for {
				select {
				case <-over:
					return
				default:
					api.redis.FlushAll(t.Context())
				}
			}
		},
		"and Redis is killed half way": func(_ *testing.T, api *testAPI, halfWay, _ <-chan struct{}) {
			<-halfWay
			api.server.Kill()
		},
		"and Redis is killed half way and comes back empty": func(_ *testing.T, api *testAPI, halfWay, _ <-chan struct{}) {
			<-halfWay
			api.server.Kill()
			api.server.Forget()
			api.server.Start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api := newAPI(t)
			servers := []*testAPI{api, api.second()}
			halfWay, over, disturbed := make(chan struct{}), make(chan struct{}), make(chan struct{})
			go func() { defer close(disturbed); disturb(t, api, halfWay, over) }()

			answers := storm(t, servers, halfWay)
			close(over)
			<-disturbed
			for key, ids := range answers {
				for _, id := range ids {
					if id != ids[0] {
						t.Errorf("key %s was answered with orders %s and %s", key, ids[0], id)
					}
				}
			}
			api.expectRows(stormKeys)
		})
	}
}

// storm sends every key many times at once, each send again until it is answered, and returns the orders answered by key.
func storm(t *testing.T, servers []*testAPI, halfWay chan<- struct{}) map[string][]uuid.UUID {
	answers := map[string][]uuid.UUID{}
	var mu sync.Mutex
	var keys sync.WaitGroup
	atOnce := make(chan struct{}, 8) // keys under way
	for k := range stormKeys {
		if k == stormKeys/2 {
			close(halfWay)
		}
		atOnce <- struct{}{}
		keys.Go(func() {
			defer func() { <-atOnce }()
			key := fmt.Sprintf("key-%d", k)
			var sends sync.WaitGroup
			for i := range stormSends {
				sends.Go(func() {
					id, err := insist(servers[i%len(servers)], key, fmt.Sprintf(`{"amount":%d}`, k+1))
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					answers[key] = append(answers[key], id)
				})
			}
			sends.Wait()
		})
	}
	keys.Wait()
	return answers
}

// insist sends an order until it is answered: 409 and 503 say that it may be sent again.
func insist(api *testAPI, key, body string) (uuid.UUID, error) {
	deadline := time.Now().Add(time.Minute)
	for time.Now().Before(deadline) {
		got, err := api.try("POST", "/orders", headers(key, body), strings.NewReader(body))
		if err != nil {
			return uuid.Nil, err
		}
		switch got.status {
		case http.StatusOK:
			return uuid.Parse(strings.TrimPrefix(got.header.Get("Location"), "/orders/"))
		case http.StatusConflict, http.StatusServiceUnavailable:
		default:
			return uuid.Nil, fmt.Errorf("%s was answered %d %s", key, got.status, got.body)
		}
	}
	return uuid.Nil, fmt.Errorf("%s was not answered within a minute", key)
}
