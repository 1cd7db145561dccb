package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
)

const (
	// callTimeout is how long a client waits for an answer before it takes it for lost.
	callTimeout = 8 * time.Second
	// A client sends again after firstRetry, then less and less often.
	firstRetry, lastRetry = 20 * time.Millisecond, 300 * time.Millisecond
	// recentKeys is how many keys the clients remember, to come back to.
	recentKeys = 20000
	// probeEvery is how often each server is asked for a fresh key, whatever else there is, and mostProbes how many of these
	// sends may be under way: they tell when it serves again.
	probeEvery, mostProbes = 100 * time.Millisecond, 100
)

// crowd is all clients.
type crowd struct {
	lab     *lab
	history *history
	rate    int
	urls    []string // of the lines to the servers
	http    *http.Client
	next    atomic.Uint64 // numbers of keys
	slot    atomic.Int64  // when the next call may begin, nanoseconds from the start
	done    [wrong + 1]atomic.Int64

	mu     sync.Mutex
	recent []*keyLog // guarded by mu; keys that were acknowledged, to be sent and read again
}

func newCrowd(l *lab, h *history, rate int) *crowd {
	c := &crowd{lab: l, history: h, rate: rate}
	for _, server := range serverNames {
		c.urls = append(c.urls, "http://"+l.lines[line(clients, server)].addr())
	}
	c.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 256, IdleConnTimeout: 30 * time.Second, DisableCompression: true}}
	return c
}

// run sends until ctx is done, and returns when every call has ended.
func (c *crowd) run(ctx context.Context, seed uint64, size int) {
	c.slot.Store(int64(c.lab.since()))
	var all sync.WaitGroup
	for i := range size {
		all.Go(func() { c.client(ctx, rand.New(rand.NewPCG(seed, uint64(i)+1000))) })
	}
	for server := range serverNames {
		all.Go(func() { c.probe(ctx, server) })
	}
	all.Wait()
	c.http.CloseIdleConnections()
}

// client does one thing after the other.
func (c *crowd) client(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		switch draw := r.IntN(100); {
		case draw < 40:
			c.insist(ctx, r, c.fresh(), 0)
		case draw < 60:
			c.burst(ctx, r)
		case draw < 72:
			c.abandon(ctx, r)
		case draw < 84:
			c.comeBack(ctx, r, 0)
		case draw < 90:
			c.comeBack(ctx, r, 1+uint8(r.IntN(3)))
		case draw < 96:
			c.read(ctx, r)
		default:
			c.intrude(ctx, r)
		}
	}
}

// fresh opens a key. Callers share numbers: about as often as not, one takes a number that another has.
func (c *crowd) fresh() *keyLog {
	callers := c.lab.callers()
	n := c.next.Add(1) - 1
	// Each number goes round the callers, so that every caller has it, at about the same time.
	return c.history.open(callers[int(n)%len(callers)], n/uint64(len(callers)))
}

// insist sends until there is an answer that says what became of the send.
func (c *crowd) insist(ctx context.Context, r *rand.Rand, k *keyLog, body uint8) {
	wait := firstRetry
	for ctx.Err() == nil {
		if o := c.post(ctx, r, k, body, r.IntN(len(c.urls)), callTimeout); o != unclear && o != inProgress {
			break
		}
		pause(ctx, wait/2+time.Duration(r.Int64N(int64(wait))))
		wait = min(wait*2, lastRetry)
	}
	c.remember(r, k)
}

// burst sends one key several times at once, to whichever server, and now and then with bodies that conflict.
func (c *crowd) burst(ctx context.Context, r *rand.Rand) {
	k := c.fresh()
	conflicting := r.IntN(3) == 0
	var sends sync.WaitGroup
	for i := range 2 + r.IntN(3) {
		body := uint8(0)
		if conflicting {
			body = uint8(i)
		}
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		sends.Go(func() { c.post(ctx, own, k, body, own.IntN(len(c.urls)), callTimeout) })
	}
	sends.Wait()
	_, body, _ := k.acknowledged()
	c.insist(ctx, r, k, body)
}

// abandon gives up waiting after a moment, and comes back.
func (c *crowd) abandon(ctx context.Context, r *rand.Rand) {
	k := c.fresh()
	c.post(ctx, r, k, 0, r.IntN(len(c.urls)), time.Duration(r.Int64N(int64(30*time.Millisecond))))
	if r.IntN(10) == 0 {
		return // for ever: the order may exist, unacknowledged
	}
	c.insist(ctx, r, k, 0)
}

// comeBack sends an acknowledged key again, some time later: with its body it is replayed, with another refused.
func (c *crowd) comeBack(ctx context.Context, r *rand.Rand, other uint8) {
	k := c.known(r)
	if k == nil {
		c.insist(ctx, r, c.fresh(), 0)
		return
	}
	_, body, _ := k.acknowledged()
	c.post(ctx, r, k, body+other, r.IntN(len(c.urls)), callTimeout)
}

// read reads an order that was acknowledged.
func (c *crowd) read(ctx context.Context, r *rand.Rand) {
	if k := c.known(r); k != nil {
		c.get(ctx, r, k, get, k.caller)
	}
}

// intrude tries what only another may: to read an order of another caller, and to place one without a secret.
func (c *crowd) intrude(ctx context.Context, r *rand.Rand) {
	k := c.known(r)
	if k == nil || c.lab.secrets == nil {
		return
	}
	if r.IntN(4) == 0 {
		c.send(ctx, k, call{op: stranger, server: uint8(r.IntN(len(c.urls)))}, r, "", callTimeout)
		return
	}
	callers := c.lab.callers()
	other := callers[r.IntN(len(callers))]
	for other == k.caller {
		other = callers[r.IntN(len(callers))]
	}
	c.get(ctx, r, k, spy, other)
}

// probe asks a server for fresh keys, at a steady rate.
func (c *crowd) probe(ctx context.Context, server int) {
	r := rand.New(rand.NewPCG(uint64(server), 7))
	var under errgroup.Group
	under.SetLimit(mostProbes) // beyond, the answers that are waited for tell as well
	for ; ctx.Err() == nil; pause(ctx, probeEvery) {
		own := rand.New(rand.NewPCG(r.Uint64(), 0))
		under.TryGo(func() error {
			c.post(ctx, own, c.fresh(), 0, server, callTimeout)
			return nil
		})
	}
	_ = under.Wait()
}

func (c *crowd) remember(r *rand.Rand, k *keyLog) {
	if _, _, ok := k.acknowledged(); !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.recent) < recentKeys {
		c.recent = append(c.recent, k)
		return
	}
	c.recent[r.IntN(recentKeys)] = k
}

func (c *crowd) known(r *rand.Rand) *keyLog {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.recent) == 0 {
		return nil
	}
	return c.recent[r.IntN(len(c.recent))]
}

// take waits for the next slot: all clients together make no more than rate calls a second.
func (c *crowd) take(ctx context.Context) {
	every := int64(time.Second) / int64(c.rate)
	now := int64(c.lab.since())
	for {
		slot := c.slot.Load()
		mine := max(slot, now-int64(200*time.Millisecond)) // what could not be sent in an outage is not made up for all at once
		if c.slot.CompareAndSwap(slot, mine+every) {
			pause(ctx, time.Duration(mine-now))
			return
		}
	}
}

// post sends a key with one of its bodies.
func (c *crowd) post(ctx context.Context, r *rand.Rand, k *keyLog, body uint8, server int, patience time.Duration) outcome {
	return c.send(ctx, k, call{op: post, body: body, server: uint8(server)}, r, c.secret(k.caller), patience)
}

func (c *crowd) secret(caller int) string {
	if c.lab.secrets == nil {
		return ""
	}
	return c.lab.secrets[caller]
}

func (c *crowd) get(ctx context.Context, r *rand.Rand, k *keyLog, op operation, as int) {
	c.send(ctx, k, call{op: op, server: uint8(r.IntN(len(c.urls)))}, r, c.secret(as), callTimeout)
}

// send makes a call and notes it. The storm's end does not cut it off: whoever was promised an answer hears it.
func (c *crowd) send(ctx context.Context, k *keyLog, this call, r *rand.Rand, secret string, patience time.Duration) outcome {
	c.take(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	request := c.request(ctx, k, this, r)
	if secret != "" {
		request.Header.Set("Authorization", "Bearer "+secret)
	}
	this.start = int64(c.lab.since())
	status, header, content, err := c.exchange(request)
	this.end = int64(c.lab.since())
	this.outcome = unclear
	var reply answer
	if err == nil {
		this.status = uint16(status)
		this.outcome, reply = k.judge(this, status, header, content)
	}
	k.note(this, reply)
	c.done[this.outcome].Add(1)
	return this.outcome
}

func (c *crowd) request(ctx context.Context, k *keyLog, this call, r *rand.Rand) *http.Request {
	url := c.urls[this.server] + "/orders"
	if this.op == get || this.op == spy {
		order, _, _ := k.acknowledged()
		request, _ := http.NewRequestWithContext(ctx, http.MethodGet, url+"/"+order.String(), nil)
		return request
	}
	request, _ := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(k.body(this.body, r)))
	request.GetBody = nil // else Go sends again by itself what it takes to be lost, and one call would be two
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Idempotency-Key", k.value())
	if r.IntN(4) == 0 {
		request.Header.Set("Prefer", "wait=2")
	}
	return request
}

// body writes a body of the key, each time in one of several ways that mean the same.
func (k *keyLog) body(body uint8, r *rand.Rand) []byte {
	layouts := []string{`{"user_id":%[1]q,"amount":%[2]d}`, `{"amount":%[2]d,"user_id":%[1]q}`, "{ \"amount\" : %[2]d,\n\t\"user_id\": %[1]q }"}
	return fmt.Appendf(nil, pick(r, layouts), k.userID(), k.amount(body))
}

// exchange makes a call, and reads the answer to its end: half an answer is none.
func (c *crowd) exchange(request *http.Request) (status int, header http.Header, content []byte, err error) {
	response, err := c.http.Do(request)
	if err != nil {
		return 0, nil, nil, err
	}
	defer response.Body.Close()
	content, err = io.ReadAll(response.Body)
	return response.StatusCode, response.Header, content, err
}

// judge tells what an answer is. What no answer may be, it remarks.
func (k *keyLog) judge(this call, status int, header http.Header, content []byte) (outcome, answer) {
	switch {
	case status == http.StatusServiceUnavailable:
		return unclear, answer{}
	case status == http.StatusUnauthorized && this.op == stranger:
		return refused, answer{}
	case (this.op == get || this.op == spy) && status == http.StatusNotFound:
		return absent, answer{}
	case (this.op == get || this.op == spy) && status == http.StatusOK:
		return k.judgeOrder(content)
	case this.op == post && status == http.StatusConflict:
		return inProgress, answer{}
	case this.op == post && status == http.StatusUnprocessableEntity:
		return mismatched, answer{}
	case this.op == post && status == http.StatusOK:
		return k.judgePlaced(header, content)
	}
	k.remark("%s was answered %d %s", []string{"a send", "a read", "a read by another caller", "a send without a secret"}[this.op], status, oneLine(string(content)))
	return wrong, answer{}
}

func (k *keyLog) judgePlaced(header http.Header, content []byte) (outcome, answer) {
	var body struct {
		Status  string    `json:"status"`
		OrderID uuid.UUID `json:"order_id"`
	}
	if err := json.Unmarshal(content, &body); err != nil || body.Status != "success" || header.Get("Location") != "/orders/"+body.OrderID.String() {
		k.remark("a 200 is no answer: %s, Location %q", oneLine(string(content)), header.Get("Location"))
		return wrong, answer{}
	}
	digest := fnv.New64a()
	_, _ = digest.Write(content)
	for _, name := range []string{"Content-Type", "Location", "Idempotency-Expires"} {
		fmt.Fprintf(digest, "\n%s: %s", name, header.Get(name))
	}
	reply := answer{body.OrderID, digest.Sum64()}
	if header.Get("Idempotency-Replayed") == "true" {
		return replayed, reply
	}
	return placed, reply
}

// judgeOrder looks whether an order that was read is the one that the key's first answer named.
func (k *keyLog) judgeOrder(content []byte) (outcome, answer) {
	var o struct {
		OrderID uuid.UUID `json:"order_id"`
		UserID  string    `json:"user_id"`
		Amount  int64     `json:"amount"`
	}
	order, body, _ := k.acknowledged()
	if err := json.Unmarshal(content, &o); err != nil || o.OrderID != order || o.UserID != k.userID() || o.Amount != k.amount(body) {
		k.remark("order %s of user %s and amount %d was read as %s", order, k.userID(), k.amount(body), oneLine(string(content)))
		return wrong, answer{}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return found, k.acked
}
