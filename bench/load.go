package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	vegeta "github.com/tsenart/vegeta/v12/lib"

	"idempotent-orders/internal/testbed"
)

const body = `{"user_id":"user-456","amount":1000}`

// load is what a load generator shall send. It is the one argument of this program when it runs again as one.
type load struct {
	Addr        string
	Connections int    // closed loop: each sends again when it has its answer
	Rate        int    // open loop: requests a second, whatever the answers do; 0: a closed loop
	Workers     int    // open loop: how many requests may be under way; 0: 1024
	Seconds     int    // for how long it is measured
	Key         string // empty: a fresh one for each request
	Token       string // empty: no API key
	Body        string
	// OwnProcessors: the last half of them, which nothing else uses that is measured.
	OwnProcessors bool
}

// answers is what came back: one line of JSON from each generator.
type answers struct {
	Requests int     // answered, whatever the status
	Refused  int     // of those, with a status of 400 or more
	Broken   int     // not answered: connect, read, write, timeout
	Micros   float64 // how long it took
	P50, P99 float64 // microseconds
	Apart    bool    // P50 and P99 are of what was not refused
	Refusal  float64 // p99 of what was, in microseconds, when apart
	cores    float64 // that the generator used
}

// freshKeys returns a function that makes keys in the form of UUIDs: no two are the same, and they are spread over an index
// as random ones are, but cost the generator less. Each call counts on from its argument.
func freshKeys() func(n uint64) string {
	tail := uuid.NewString()[8:]
	return func(n uint64) string { return fmt.Sprintf("%08x%s", n*2654435761&math.MaxUint32, tail) }
}

// closed sends load in a closed loop, from another process: wrk, or without it vegeta.
func (l *lab) closed(ctx context.Context, o load) (answers, error) {
	if l.wrk == "" {
		return l.open(ctx, o)
	}
	script := filepath.Join(l.dir, "wrk.lua")
	if err := os.WriteFile(script, []byte(wrkScript(o)), 0o600); err != nil {
		return answers{}, err
	}
	return l.generate(ctx, o, l.wrk, "-t1", fmt.Sprintf("-c%d", o.Connections), fmt.Sprintf("-d%ds", o.Seconds),
		"--timeout", "5s", "-s", script, "http://"+o.Addr+"/orders")
}

// open sends load with vegeta, from another process.
func (l *lab) open(ctx context.Context, o load) (answers, error) {
	return l.generate(ctx, o, l.self, hiddenLoad, mustJSON(o))
}

// generate runs a load generator and reads its answers.
func (l *lab) generate(ctx context.Context, o load, program string, args ...string) (answers, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(o.Seconds+30)*time.Second)
	defer cancel()
	if o.OwnProcessors && l.canBeApart() {
		own := fmt.Sprintf("%d-%d", runtime.NumCPU()/2, runtime.NumCPU()-1)
		program, args = l.taskset, append([]string{"-c", own, program}, args...)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = testbed.Env()
	output, err := cmd.CombinedOutput()
	if err != nil {
		return answers{}, fmt.Errorf("%s: %w: %s", filepath.Base(program), err, lastLine(output))
	}
	a, err := readAnswers(output)
	a.cores = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds() / max(a.Micros/1e6, 1)
	return a, err
}

// readAnswers finds the generator's line among what else it printed.
func readAnswers(output []byte) (a answers, err error) {
	for line := range bytes.Lines(output) {
		if bytes.HasPrefix(line, []byte(`{"Requests"`)) {
			err = json.Unmarshal(line, &a)
			if err == nil && a.Micros <= 0 {
				err = errors.New("it took no time")
			}
			return a, err
		}
	}
	return a, fmt.Errorf("the load generator printed no figures: %s", lastLine(output))
}

// wrkScript returns what wrk sends, and has it print answers. The keys are as freshKeys makes them.
func wrkScript(o load) string {
	key := fmt.Sprintf("%q", o.Key)
	if o.Key == "" {
		key = fmt.Sprintf("string.format('%%08x%s', n * 2654435761 %% 4294967296)", uuid.NewString()[8:])
	}
	head, tail, _ := strings.Cut(rawRequest(o, "\x00"), "\x00")
	return fmt.Sprintf(`local n = 0
function request()
  n = n + 1
  return %q .. %s .. %q
end
function done(s, latency)
  local e = s.errors
  print(string.format('{"Requests":%%d,"Refused":%%d,"Broken":%%d,"Micros":%%d,"P50":%%d,"P99":%%d}', s.requests, e.status,
    e.connect + e.read + e.write + e.timeout, s.duration, latency:percentile(50), latency:percentile(99)))
end
`, head, key, tail)
}

func rawRequest(o load, key string) string {
	authorization := ""
	if o.Token != "" {
		authorization = "Authorization: Bearer " + o.Token + "\r\n"
	}
	return fmt.Sprintf("POST /orders HTTP/1.1\r\nHost: %s\r\nIdempotency-Key: %s\r\nContent-Type: application/json\r\n%s"+
		"Content-Length: %d\r\n\r\n%s", o.Addr, key, authorization, len(o.Body), o.Body)
}

func exchange(conn io.Writer, reader *bufio.Reader, request string) (status int, err error) {
	if _, err = io.WriteString(conn, request); err != nil {
		return 0, err
	}
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return response.StatusCode, err
}

// openWarmUp is how long the open loop runs before it is measured: connections are made, and the server's own are.
const openWarmUp = time.Second

// send sends load with vegeta, in an open loop, or in a closed one when it has no rate. What is sent in an open loop while the server
// is slow waits in line, and the wait counts.
func send(o load) answers {
	key, n := freshKeys(), atomic.Uint64{}
	target := func(t *vegeta.Target) error {
		t.Method, t.URL, t.Body = http.MethodPost, "http://"+o.Addr+"/orders", []byte(o.Body)
		t.Header = http.Header{"Idempotency-Key": {cmp.Or(o.Key, key(n.Add(1)))}, "Content-Type": {"application/json"}}
		if o.Token != "" {
			t.Header.Set("Authorization", "Bearer "+o.Token)
		}
		return nil
	}
	workers, warmUp := cmp.Or(o.Workers, 1024), openWarmUp
	if o.Rate == 0 {
		workers, warmUp = o.Connections, 0
	}
	attacker := vegeta.NewAttacker(vegeta.Workers(uint64(min(workers, 64))), vegeta.MaxWorkers(uint64(workers)), vegeta.Connections(workers), vegeta.Timeout(5*time.Second))
	a := answers{Apart: o.Workers > 0}
	var metrics, refusals vegeta.LatencyMetrics
	measured := time.Duration(o.Seconds) * time.Second
	start := time.Now()
	for r := range attacker.Attack(target, vegeta.Rate{Freq: o.Rate, Per: time.Second}, warmUp+measured, "") {
		if r.Timestamp.Sub(start) < warmUp {
			continue
		}
		if r.Code == 0 {
			a.Broken++
			continue
		}
		a.Requests++
		refused := r.Code >= 400
		if refused {
			a.Refused++
		}
		if refused && a.Apart {
			refusals.Add(r.Latency)
		} else {
			metrics.Add(r.Latency)
		}
	}
	a.Micros = micros(time.Since(start) - warmUp)
	if a.Apart && a.Refused > 0 {
		a.Refusal = micros(refusals.Quantile(0.99))
	}
	if a.Requests > 0 {
		a.P50, a.P99 = micros(metrics.Quantile(0.5)), micros(metrics.Quantile(0.99))
	}
	return a
}

// hidden runs a part of the benchmark that has to be a process of its own, and reports whether args ask for one.
func hidden(ctx context.Context, args []string, stdout io.Writer) (bool, error) {
	if len(args) != 2 {
		return false, nil
	}
	switch args[0] {
	case hiddenServer:
		return true, serveContender(ctx, args[1])
	case hiddenLoad:
		var o load
		if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
			return true, err
		}
		_, err := fmt.Fprintln(stdout, mustJSON(send(o)))
		return true, err
	}
	return false, nil
}

// The parts that run as processes of their own.
const (
	hiddenServer = "contender"
	hiddenLoad   = "load"
)

func mustJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("encode: %v", err)) // plain numbers and strings
	}
	return string(text)
}

func micros(d time.Duration) float64 { return float64(d.Microseconds()) }

// lastLine returns the end of what a program printed, which is where it says why it failed.
func lastLine(output []byte) string {
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return strconv.Quote(lines[len(lines)-1])
}
