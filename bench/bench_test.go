package main

import (
	"cmp"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"idempotent-orders/internal/command"
)

func TestAWrongCommandLineIsRefusedWithTheRemedy(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "figures.md")
	for _, c := range []struct{ args, want string }{
		{"--rounds 0", "--rounds is 0"},
		{"--seconds 31", "from 1 to 30"},
		{"--only intake,outtake", `"outtake"; it knows empty, pgbench`},
		{"--out no/such/folder/figures.md", "name another file"},
		{"--fast", "fast"},
		{"fast", `"fast" is not an option`},
	} {
		_, err := parse(append([]string{"--out", out}, strings.Fields(c.args)...))
		if !errors.Is(err, command.ErrUsage) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "--help") {
			t.Errorf("%s: %v", c.args, err)
		}
	}
}

func TestAPartIsNotWrittenOverTheWhole(t *testing.T) {
	t.Parallel()
	if o, err := parse([]string{"--only", "idle,open"}); err != nil || o.out != "" {
		t.Errorf("it goes to %q, %v", o.out, err)
	}
	if o, err := parse([]string{"--only", "idle", "--out", "part.md"}); err != nil || o.out != "part.md" {
		t.Errorf("it goes to %q, %v", o.out, err)
	}
}

func TestHelpNamesEveryGroup(t *testing.T) {
	t.Parallel()
	var help strings.Builder
	if err := tool.Run(t.Context(), []string{"--help"}, &help, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, group := range groups() {
		if !strings.Contains(help.String(), group) {
			t.Errorf("%s is not in it", group)
		}
	}
}

func TestReadAnswers(t *testing.T) {
	t.Parallel()
	a, err := readAnswers([]byte("Running 5s test\n  64 connections\n" +
		`{"Requests":100,"Refused":2,"Broken":1,"Micros":2000000,"P50":500,"P99":900}` + "\nbye\n"))
	if want := (answers{100, 2, 1, 2e6, 500, 900, false, 0, 0}); err != nil || a != want {
		t.Errorf("read %+v, %v", a, err)
	}
	if s := sampleOf(a); s.rate != 49 || s.failed != 3 {
		t.Errorf("of 100 in 2 s, with 2 refused and 1 broken: %.0f/s, %d failed", s.rate, s.failed)
	}
	for _, output := range []string{"", "unable to connect to 127.0.0.1:1", `{"Requests":1,"Micros":0}`, `{"Requests"`} {
		if _, err := readAnswers([]byte(output)); err == nil {
			t.Errorf("%q passes for figures", output)
		}
	}
}

func TestReadPgbench(t *testing.T) {
	t.Parallel()
	tps, average, err := readPgbench(`pgbench (15.18)
number of transactions actually processed: 10224
number of failed transactions: 0 (0.000%)
latency average = 3.130 ms
initial connection time = 60.1 ms
tps = 5112.25 (without initial connection time)
`)
	if err != nil || tps != 5112.25 || average != 3.13 {
		t.Errorf("read %v/s, %v ms, %v", tps, average, err)
	}
	if _, _, err := readPgbench("pgbench: error: connection failed"); err == nil {
		t.Error("an error passes for figures")
	}
}

func TestMedian(t *testing.T) {
	t.Parallel()
	for want, values := range map[float64][]float64{0: nil, 3: {3}, 2: {3, 1, 2}, 2.5: {4, 1, 3, 2}} {
		if got := median(values); got != want {
			t.Errorf("of %v it is %v", values, got)
		}
	}
}

func TestPretty(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{0: "0", 0.856: "0.86", 4: "4", 999: "999", 1000: "1,000", 1234567.8: "1,234,568"} {
		if got := pretty(v); got != want {
			t.Errorf("%v is written %s", v, got)
		}
	}
}

// everyLine returns a report in which every measurement has found the same in every round.
func everyLine(rounds int) *report {
	r := &report{}
	for _, m := range (&lab{seconds: 5, wrk: "wrk"}).measurements() {
		l := &line{measurement: m}
		for range rounds {
			l.samples = append(l.samples, &sample{rate: 1000, p50: 1, p99: 2, used: usage{peak: 100e6}})
		}
		r.lines = append(r.lines, l)
	}
	return r
}

func TestEveryGoalIsMeasured(t *testing.T) {
	t.Parallel()
	for _, g := range goals {
		if _, _, _, verdict := g.judge(everyLine(1), 1); verdict == "not measured" {
			t.Errorf("%s: no measurement gives its figure", g.name)
		}
		if _, _, _, verdict := g.judge(&report{}, 1); verdict != "not measured" {
			t.Errorf("%s: with nothing measured it is %s", g.name, verdict)
		}
	}
}

func TestWhatHasNoGoalIsNeitherReachedNorMissed(t *testing.T) {
	t.Parallel()
	text := everyLine(1).markdown(1)
	if want := "| replay of one key ÷ handler that reads, 64 connections each | 1 | 1 – 1 | – | no goal |"; !strings.Contains(text, want) {
		t.Errorf("%q is not in it", want)
	}
}

func TestHandlersThatPlaceNothingAnswerAsIfTheyDid(t *testing.T) {
	t.Parallel()
	var first string
	for _, name := range []string{emptyServer, readingServer, waitingServer} {
		w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader(body))
		bare[name](w, r)
		first = cmp.Or(first, w.Body.String())
		replayed := w.Header().Get("Idempotency-Replayed") == "true"
		if w.Code != http.StatusOK || w.Body.String() != first || len(w.Header().Get("Location")) != 44 || replayed != (name == readingServer) {
			t.Errorf("%s answers %d with %v: %s", name, w.Code, w.Header(), w.Body)
		}
		if rest, _ := io.ReadAll(r.Body); (len(rest) == 0) == (name == emptyServer) {
			t.Errorf("%s left %q", name, rest)
		}
	}
}

func TestAGoalIsJudgedByTheMedianOfItsRounds(t *testing.T) {
	t.Parallel()
	r := everyLine(3)
	intake, pgbench := r.find(nameOf(server, clientsMany)), r.find(namePgbench("prepared", 64))
	for i, rate := range []float64{9000, 40000, 41000} {
		intake.samples[i].rate, pgbench.samples[i].rate = rate, 10000
	}
	middle, least, most, verdict := goals[0].judge(r, 3)
	if middle != 4 || least != 0.9 || most != 4.1 || verdict != "reached" {
		t.Errorf("4 of 4 at the median: %v, %v to %v, %s", middle, least, most, verdict)
	}
	intake.samples[2] = nil // failed
	if middle, _, _, verdict = goals[0].judge(r, 3); middle != 2.45 || verdict != "**not reached**" {
		t.Errorf("a round without a figure counts: %v, %s", middle, verdict)
	}
	intake.samples[1].rate, intake.samples[1].failed = 90000, 1
	if _, _, _, verdict = goals[0].judge(r, 3); !strings.Contains(verdict, "requests failed") {
		t.Errorf("with failed requests it is %s", verdict)
	}
}

func TestTheReportShowsWhatFailed(t *testing.T) {
	t.Parallel()
	r := everyLine(2)
	r.failures = []string{"idle, round 2: no luck"}
	r.find(nameReplay).samples[1].failed = 7
	text := r.markdown(2)
	for _, want := range []string{"median of 2 rounds", "- idle, round 2: no luck", "**7 requests failed in a round**", "wrk -t1 -c256 -d5s", "| 1,000 orders/s |"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in it", want)
		}
	}
}

func TestTheGeneratorsCountWhatTheServerAnswers(t *testing.T) {
	t.Parallel()
	vegeta := func(o load) (answers, error) { return send(o), nil }
	generators := map[string]func(load) (answers, error){"closed": vegeta, "open": vegeta}
	if wrk, err := exec.LookPath("wrk"); err == nil {
		l := &lab{dir: t.TempDir(), wrk: wrk}
		generators["wrk"] = func(o load) (answers, error) {
			return l.closed(t.Context(), o)
		}
	}
	for name, generate := range generators {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			keys, requests, refused := map[string]bool{}, 0, 0
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				key := r.Header.Get("Idempotency-Key")
				sent, _ := io.ReadAll(r.Body)
				if len(key) != 36 || keys[key] || string(sent) != body || r.Method+r.URL.Path != "POST/orders" {
					t.Errorf("%s %s with key %q and body %q", r.Method, r.URL, key, sent)
				}
				keys[key] = true
				if requests++; requests%5 == 0 {
					refused++
					w.WriteHeader(http.StatusConflict)
				}
			}))
			defer s.Close()
			const connections, warmUp = 4, 1000
			o := load{Addr: s.Listener.Addr().String(), Connections: connections, Seconds: 1, Body: body}
			if name == "open" {
				o.Rate = warmUp
			}
			a, err := generate(o)
			if err != nil {
				t.Fatal(err)
			}
			s.Close() // waits for requests that wrk left under way
			mu.Lock()
			defer mu.Unlock()
			least := requests - connections // wrk leaves with requests under way
			if name == "open" {
				least = requests - warmUp - connections
			}
			if a.Requests == 0 || a.Requests > requests || a.Requests < least || a.Refused == 0 || a.Refused > refused ||
				a.Broken != 0 || a.P50 <= 0 || a.P99 < a.P50 {
				t.Errorf("the server answered %d and refused %d of them; the generator tells %+v", requests, refused, a)
			}
		})
	}
}
