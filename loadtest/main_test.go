package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/internal/command"
	"idempotent-orders/internal/testenv"
)

// beLoadtest in the environment makes the test binary the program.
const beLoadtest = "IDEMPOTENT_ORDERS_BE_LOADTEST"

func TestMain(m *testing.M) {
	if os.Getenv(beLoadtest) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(testenv.Main(m))
}

// service answers as the contract says, and remembers what it was sent.
type service struct {
	*httptest.Server
	mu     sync.Mutex
	keys   []string // each once, in the order they came
	bodies []string // of every request
}

// newService returns a service. Its n-th order, from 1, is answered by answer, or with success when answer is nil; sent again
// with its key, which net/http may do by itself when a connection breaks, it is the same order.
func newService(t *testing.T, answer func(w http.ResponseWriter, r *http.Request, n int)) *service {
	t.Helper()
	s := &service{}
	if answer == nil {
		answer = func(w http.ResponseWriter, _ *http.Request, _ int) { succeed(w) }
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintln(w, `{"status":"alive"}`)
	})
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		key := r.Header.Get("Idempotency-Key")
		s.mu.Lock()
		if !slices.Contains(s.keys, key) {
			s.keys = append(s.keys, key)
		}
		s.bodies = append(s.bodies, r.Header.Get("Content-Type")+" "+string(body))
		n := slices.Index(s.keys, key) + 1
		s.mu.Unlock()
		answer(w, r, n)
	})
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

func succeed(w http.ResponseWriter) {
	id := uuid.NewString()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Location", "/orders/"+id)
	w.Header().Set("Idempotency-Expires", "2026-01-02T15:04:05Z")
	fmt.Fprintf(w, "{\"status\":\"success\",\"order_id\":%q}\n", id)
}

func refuse(w http.ResponseWriter, status int, problem string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	fmt.Fprint(w, problem)
}

const unavailable = `{"type":"/problems/unavailable","title":"Unavailable","status":503,"detail":"Send it again.","instance":"r-1"}`

// load runs the program as its user does and returns what it shows.
func load(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	err = tool.Run(t.Context(), args, &out, &errOut)
	return out.String(), errOut.String(), err
}

var summaryPattern = regexp.MustCompile(`^\n--- Summary ---\nTotal: (\d+) orders\nSuccess: (\d+)\nFailed: (\d+)\n` +
	`Duration: ((?:\d+h)?(?:\d+m)?[\d.]+m?s)\nRate: (\d+\.\d\d) orders/sec\n$`)

// split divides what is shown into the answers and the numbers of the summary: total, success, failed, duration, rate.
func split(t *testing.T, stdout string) (answers, numbers []string) {
	t.Helper()
	i := strings.Index(stdout, "\n--- Summary")
	if i < 0 {
		t.Fatalf("there is no summary:\n%s", stdout)
	}
	numbers = summaryPattern.FindStringSubmatch(stdout[i:])
	if numbers == nil {
		t.Fatalf("the summary is\n%s\nand does not match\n%s", stdout[i:], summaryPattern)
	}
	return strings.Split(strings.TrimSuffix(stdout[:i], "\n"), "\n"), numbers[1:]
}

func TestPlacesAHundredOrdersEachWithAKeyOfItsOwn(t *testing.T) {
	t.Parallel()
	s := newService(t, nil)
	stdout, stderr, err := load(t, "--url", s.URL)
	if err != nil || stderr != "" {
		t.Fatalf("run: %v, %q", err, stderr)
	}

	if len(s.keys) != 100 || len(s.bodies) != 100 {
		t.Errorf("%d requests with %d keys, want 100 with a key each", len(s.bodies), len(s.keys))
	}
	for _, key := range s.keys {
		if err := uuid.Validate(key); err != nil {
			t.Errorf("key %q: %v", key, err)
		}
	}
	for _, body := range s.bodies {
		if body != "application/json {}" {
			t.Errorf("body %q, want an order with every default", body)
		}
	}

	answers, numbers := split(t, stdout)
	line := regexp.MustCompile(`^\[(\d+)\] 200: \{"status":"success","order_id":"[0-9a-f-]{36}"\}$`)
	seen := map[int]bool{}
	for _, answer := range answers {
		match := line.FindStringSubmatch(answer)
		if match == nil {
			t.Fatalf("%q does not match %s", answer, line)
		}
		number, _ := strconv.Atoi(match[1])
		seen[number] = true
	}
	if got := slices.Sorted(maps.Keys(seen)); len(answers) != 100 || len(got) != 100 || got[0] != 1 || got[99] != 100 {
		t.Errorf("%d lines, for the orders %v; want one each for 1 to 100", len(answers), got)
	}
	if got := numbers[:3]; !slices.Equal(got, []string{"100", "100", "0"}) {
		t.Errorf("total, success, failed = %v", got)
	}
}

func TestSendsAHundredOrdersAtTheSameMoment(t *testing.T) {
	t.Parallel()
	arrived, all := make(chan struct{}), make(chan struct{})
	go func() {
		for range 100 {
			<-arrived
		}
		close(all)
	}()
	s := newService(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		arrived <- struct{}{}
		<-all // nobody is answered before everybody is here
		succeed(w)
	})
	if _, stderr, err := load(t, "--url", s.URL); err != nil {
		t.Fatal(stderr)
	}
}

func TestPlacesAsManyOrdersAsAsked(t *testing.T) {
	t.Parallel()
	for _, orders := range []int{1, 7, 250} { // 250 is more than may be in flight
		s := newService(t, nil)
		stdout, stderr, err := load(t, "--url", s.URL+"/", "--orders", strconv.Itoa(orders))
		if err != nil {
			t.Fatal(stderr)
		}
		answers, numbers := split(t, stdout)
		if len(s.keys) != orders || len(answers) != orders || numbers[0] != strconv.Itoa(orders) {
			t.Errorf("%d orders: %d sent, %d shown, %s counted", orders, len(s.keys), len(answers), numbers[0])
		}
	}
}

func TestWhatIsNotASuccessIsShownAndCounted(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		answer func(w http.ResponseWriter)
		line   string // a pattern
	}{
		{"a problem", func(w http.ResponseWriter) { refuse(w, 503, unavailable+"\n") }, `503: ` + regexp.QuoteMeta(unavailable)},
		{"a page in lines", func(w http.ResponseWriter) {
			w.WriteHeader(http.StatusBadGateway)
			fmt.Fprint(w, "<html>\r\n<p>Bad gateway\n</html>\r\n")
		}, `502: <html> <p>Bad gateway </html>`},
		{"a problem that is cut off", func(w http.ResponseWriter) { refuse(w, 500, `{"type":`) }, `500: {"type":`},
		{"a 200 without an order id", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"status":"success"}`)
		}, `200: {"status":"success"}`},
		{"a 201 with an order id", func(w http.ResponseWriter) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusCreated)
			fmt.Fprint(w, `{"order_id":"01890a5d-ac96-774b-bcce-b302099a8057"}`)
		}, `201: {"order_id":"01890a5d-ac96-774b-bcce-b302099a8057"}`},
		{"a connection that is cut", func(http.ResponseWriter) { panic(http.ErrAbortHandler) }, `error: Post "http://.*/orders": EOF`},
		{"an answer that is cut", func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, `{"status":"success",`)
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, `error: unexpected EOF`},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newService(t, func(w http.ResponseWriter, _ *http.Request, n int) {
				if n == 2 || n == 4 {
					test.answer(w)
				} else {
					succeed(w)
				}
			})
			stdout, stderr, err := load(t, "--url", s.URL, "--orders", "5")
			if err == nil || errors.Is(err, command.ErrUsage) || stderr != "loadtest: 2 of 5 orders failed\n" {
				t.Errorf("run: %v, %q", err, stderr)
			}
			answers, numbers := split(t, stdout)
			line := regexp.MustCompile(`^\[\d\] ` + test.line + `$`)
			shown := slices.DeleteFunc(slices.Clone(answers), func(a string) bool { return !line.MatchString(a) })
			if len(answers) != 5 || len(shown) != 2 {
				t.Errorf("want five lines, two of them like %s:\n%s", line, stdout)
			}
			if got := numbers[:3]; !slices.Equal(got, []string{"5", "3", "2"}) {
				t.Errorf("total, success, failed = %v", got)
			}
		})
	}
}

func TestGivesUpARequestAfterItsTime(t *testing.T) {
	t.Parallel()
	s := newService(t, func(_ http.ResponseWriter, r *http.Request, _ int) { <-r.Context().Done() })
	client, err := newClient(options{url: s.URL}, 20*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	a := placeOne(t.Context(), client, 1)
	if a.succeeded() || !strings.HasPrefix(a.String(), "[1] error: Post ") || !strings.Contains(a.String(), "Client.Timeout") {
		t.Errorf("got %s", a)
	}
}

// onLine calls then when the n-th line was written.
type onLine struct {
	bytes.Buffer
	n    int
	then func()
}

func (w *onLine) Write(p []byte) (int, error) {
	if w.n -= bytes.Count(p, []byte("\n")); w.n == 0 {
		w.then()
	}
	return w.Buffer.Write(p)
}

func TestAnInterruptStopsAndShowsTheSummarySoFar(t *testing.T) {
	t.Parallel()
	s := newService(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n > 3 {
			<-r.Context().Done() // the others hang until the client goes
			return
		}
		succeed(w)
	})
	ctx, interrupt := context.WithCancel(t.Context())
	stdout, stderr := &onLine{n: 3, then: interrupt}, new(bytes.Buffer)
	err := tool.Run(ctx, []string{"--url", s.URL, "--orders", "300"}, stdout, stderr)
	if err == nil || errors.Is(err, command.ErrUsage) {
		t.Errorf("run: %v", err)
	}
	if want := "loadtest: interrupted: of 300 orders, 297 were not sent or not answered\n"; stderr.String() != want {
		t.Errorf("stderr is %q, want %q", stderr, want)
	}
	answers, numbers := split(t, stdout.String())
	if len(answers) != 3 || !slices.Equal(numbers[:3], []string{"3", "3", "0"}) {
		t.Errorf("got\n%s", stdout)
	}
}

func TestSaysInOneLineThatNothingAnswers(t *testing.T) {
	t.Parallel()
	const url = "http://127.0.0.1:1"
	stdout, stderr, err := load(t, "--url", url)
	if err == nil || errors.Is(err, command.ErrUsage) || stdout != "" {
		t.Errorf("run: %v; stdout %q", err, stdout)
	}
	line := regexp.MustCompile("^loadtest: nothing answers at " + regexp.QuoteMeta(url) + "; start the service with `go run .`[^\n]*refused\n$")
	if !line.MatchString(stderr) {
		t.Errorf("stderr is %q, want %s", stderr, line)
	}
}

func TestRefusesACommandLineItDoesNotUnderstand(t *testing.T) {
	t.Parallel()
	s := newService(t, nil)
	for _, test := range []struct {
		names string // what is wrong
		args  []string
	}{
		{"--orders", []string{"--orders", "0"}},
		{"--orders", []string{"--orders", "-1"}},
		{"-orders", []string{"--orders", "many"}},
		{"-orders", []string{"--orders"}},
		{"--url", []string{"--url", "localhost:8080"}},
		{"--url", []string{"--url", "/orders"}},
		{"--url", []string{"--url", "ftp://localhost"}},
		{"--url", []string{"--url", "http://"}},
		{"--url", []string{"--url", "http://a b"}},
		{"-rat", []string{"--rat", "5"}},
		{"100", []string{"100"}},
		{"100", []string{"--url", s.URL, "100"}},

		{"--rate", []string{"--rate", "0"}},
		{"--rate", []string{"--rate", "-5"}},
		{"--rate", []string{"--rate", "1000001"}},
		{"-rate", []string{"--rate", "1.5"}},
		{"--duration", []string{"--rate", "5", "--duration", "0s"}},
		{"--duration", []string{"--rate", "5", "--duration", "-1s"}},
		{"--duration", []string{"--rate", "5", "--duration", "100ms"}},
		{"-duration", []string{"--rate", "5", "--duration", "30"}},
		{"--connections", []string{"--rate", "5", "--connections", "0"}},
		{"-duplicates", []string{"--rate", "5", "--duplicates", "120%"}},
		{"-duplicates", []string{"--rate", "5", "--duplicates", "5"}},
		{"-duplicates", []string{"--rate", "5", "--duplicates", "-1%"}},
		{"-duplicates", []string{"--rate", "5", "--duplicates", "NaN"}},
		{"-duplicates", []string{"--rate", "5", "--duplicates", "some"}},
		{"--html", []string{"--rate", "5", "--html", "-"}},
		{"--json", []string{"--rate", "5", "--html", "same", "--json", "same"}},
		{"--orders", []string{"--rate", "5", "--orders", "5"}},
		{"--duration", []string{"--duration", "5s"}},
		{"--duplicates", []string{"--orders", "5", "--duplicates", "5%"}},
		{"--json", []string{"--json", "-"}},

		{"--rate", []string{"targets", "--rate", "5"}},
		{"--html", []string{"targets", "--html", "file"}},
		{"--orders", []string{"targets", "--orders", "0"}},
		{"--url", []string{"targets", "--url", "nowhere"}},
		{"100", []string{"targets", "100"}},
	} {
		stdout, stderr, err := load(t, test.args...)
		if !errors.Is(err, command.ErrUsage) || stdout != "" {
			t.Errorf("%q: %v; stdout %q", test.args, err, stdout)
		}
		if !strings.HasPrefix(stderr, "loadtest: ") || !strings.HasSuffix(stderr, "see --help\n") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: stderr %q", test.args, stderr)
		}
		if !strings.Contains(stderr, test.names) {
			t.Errorf("%q: stderr %q does not name %s", test.args, stderr, test.names)
		}
	}
	if len(s.keys) > 0 {
		t.Errorf("%d orders were placed", len(s.keys))
	}
}

func TestHelpExplainsAndPlacesNothing(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"-h"}, {"targets", "--help"}, {"--rate", "5", "-h"}} {
		stdout, stderr, err := load(t, args...)
		if err != nil || stderr != "" {
			t.Errorf("%s: %v, %q", args, err, stderr)
		}
		for _, want := range []string{"--url", "http://localhost:8080", "--orders", "100", "exit code", "--rate", "--duration", "10s",
			"--connections", "256", "--duplicates", "5% or 0.05", "Prefer: wait=10", "--html", "--json", "targets", "98%"} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%s does not mention %s:\n%s", args, want, stdout)
			}
		}
		if strings.Contains(stdout, "%!") {
			t.Errorf("%s is badly formatted:\n%s", args, stdout)
		}
	}
}

func TestTheLinesOfTheSummaryAgree(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		summary summary
		want    string
	}{
		{summary{100, 0, 245*time.Millisecond + 400*time.Microsecond},
			"\n--- Summary ---\nTotal: 100 orders\nSuccess: 100\nFailed: 0\nDuration: 245ms\nRate: 408.16 orders/sec\n"},
		{summary{90, 10, 1500 * time.Millisecond},
			"\n--- Summary ---\nTotal: 100 orders\nSuccess: 90\nFailed: 10\nDuration: 1.5s\nRate: 60.00 orders/sec\n"},
		{summary{1, 0, 90 * time.Microsecond},
			"\n--- Summary ---\nTotal: 1 orders\nSuccess: 1\nFailed: 0\nDuration: 1ms\nRate: 1000.00 orders/sec\n"},
		{summary{}, "\n--- Summary ---\nTotal: 0 orders\nSuccess: 0\nFailed: 0\nDuration: 1ms\nRate: 0.00 orders/sec\n"},
	} {
		if got := test.summary.String(); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}
