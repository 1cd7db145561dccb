package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"
	vegeta "github.com/tsenart/vegeta/v12/lib"

	"idempotent-orders/idempotency"
	"idempotent-orders/internal/testenv"
	"idempotent-orders/order"
	"idempotent-orders/server"
)

// serveOrders serves a fresh database and a Redis of its own, and returns the service's URL and the database.
func serveOrders(t *testing.T) (url string, pool *pgxpool.Pool) {
	t.Helper()
	rdb, _ := testenv.Redis(t)
	pool = testenv.Database(t)
	log := slog.New(slog.DiscardHandler)
	s := server.New(server.Config{
		Orders: order.NewStore(pool, time.Hour, nil), Guard: idempotency.NewGuard(rdb, time.Hour, log),
		Pool: pool, Redis: rdb, Log: log,
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, listener) }()
	t.Cleanup(func() {
		stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "http://" + listener.Addr().String(), pool
}

// Not parallel, because the key is in the environment.
func TestEveryModeSendsTheAPIKey(t *testing.T) {
	t.Setenv("LOADTEST_API_KEY", "a-token")
	s := newService(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.Header.Get("Authorization") != "Bearer a-token" {
			refuse(w, 401, "{}")
			return
		}
		succeed(w)
	})
	if stdout, stderr, err := load(t, "--url", s.URL, "--orders", "3"); err != nil {
		t.Errorf("at once: %v\n%s%s", err, stdout, stderr)
	}
	if stdout, stderr, err := attackWith(t, nil, "--url", s.URL, "--rate", "50", "--duration", "100ms"); err != nil {
		t.Errorf("at a rate: %v\n%s%s", err, stdout, stderr)
	}
	stdout, _, err := load(t, "targets", "--url", s.URL, "--orders", "1")
	if err != nil || !strings.Contains(stdout, `"Authorization":["Bearer a-token"]`) {
		t.Errorf("targets: %v\n%s", err, stdout)
	}
}

// attackWith attacks as the command line asks, but however low the rate: how fast this machine is, is no test's business.
func attackWith(t *testing.T, change func(*attack), args ...string) (stdout, stderr string, err error) {
	t.Helper()
	o, err := parse(args)
	if err != nil {
		t.Fatal(err)
	}
	a := newAttack(o)
	a.leastPercent = 0
	if change != nil {
		change(&a)
	}
	var out, errOut bytes.Buffer
	err = a.run(t.Context(), &out, &errOut)
	return out.String(), errOut.String(), err
}

// number returns the number of a line of the summary.
func number(t *testing.T, stdout, name string) int {
	t.Helper()
	match := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + `: (\d+)\b`).FindStringSubmatch(stdout)
	if match == nil {
		t.Fatalf("there is no %s in\n%s", name, stdout)
	}
	n, err := strconv.Atoi(match[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func readReport(t *testing.T, text []byte) report {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	var r report
	if err := decoder.Decode(&r); err != nil || decoder.More() {
		t.Fatalf("%v in %s", err, text)
	}
	return r
}

func TestAnAttackOnTheServiceReplaysTheDuplicates(t *testing.T) {
	t.Parallel()
	url, pool := serveOrders(t)
	dir := t.TempDir()
	page, numbers := filepath.Join(dir, "plot.html"), filepath.Join(dir, "numbers.json")
	stdout, stderr, err := attackWith(t, nil, "--url", url, "--rate", "300", "--duration", "1s", "--connections", "8",
		"--duplicates", "20%", "--html", page, "--json", numbers)
	if err != nil || stderr != "" {
		t.Fatalf("%v, %q:\n%s", err, stderr, stdout)
	}

	total, replayed := number(t, stdout, "Total"), number(t, stdout, "Replayed")
	if total < 10 || number(t, stdout, "Success") != total || number(t, stdout, "Failed") != 0 || replayed != total/5 {
		t.Errorf("want a fifth replayed, and no failure:\n%s", stdout)
	}
	var placed int
	if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&placed); err != nil || placed != total-replayed {
		t.Errorf("%d orders are in the database, %v; want %d", placed, err, total-replayed)
	}

	text, err := os.ReadFile(numbers)
	if err != nil {
		t.Fatal(err)
	}
	r := readReport(t, text)
	if r.URL != url || r.AskedRate != 300 || r.AskedTime != 1 || r.Connections != 8 || r.Duplicates != 0.2 {
		t.Errorf("the report does not tell what was asked: %s", text)
	}
	if r.Total != total || r.Success != total || r.Replayed != replayed || r.StatusCodes["200"] != total || r.Error != "" {
		t.Errorf("the report says\n%s\nand the summary\n%s", text, stdout)
	}
	if r.Failed != 0 || r.Unanswered != 0 || r.Doubled != 0 || len(r.Failures) != 0 || r.Interrupted {
		t.Errorf("the report has failures: %s", text)
	}
	var inHistogram uint64
	for _, b := range r.Histogram {
		inHistogram += b.Count
	}
	if inHistogram != uint64(total) {
		t.Errorf("the histogram has %d of %d answers", inHistogram, total)
	}
	var latencies []float64
	for _, name := range []string{"min", "p50", "p90", "p95", "p99", "p99.9", "max"} {
		latencies = append(latencies, r.Latency[name])
	}
	if !slices.IsSorted(latencies) || latencies[0] <= 0 || r.Latency["mean"] <= 0 {
		t.Errorf("the latencies are %v", r.Latency)
	}

	html, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for label, want := range map[string]bool{"orders: placed": true, "orders: replayed": true, "orders: ERROR": false} {
		if bytes.Contains(html, []byte(label)) != want {
			t.Errorf("the plot shows %q: %t; want %t", label, !want, want)
		}
	}
	if loads := loading.FindAll(html, -1); loads != nil {
		t.Errorf("the plot loads something: %q", loads)
	}
}

// loading finds what makes a browser load something with a page.
var loading = regexp.MustCompile(`(?i)<[^>]*\s(src|href|srcset|data|action)\s*=|<(link|iframe|object|embed|base|img)\b|@import|` +
	`\burl\(\s*['"]?(https?:|/)|\bfetch\(|XMLHttpRequest|WebSocket|EventSource|importScripts|sendBeacon|\bimport\s*\(|\.src\s*=`)

func TestWhatMakesAPageLoadSomethingIsFound(t *testing.T) {
	t.Parallel()
	for _, page := range []string{
		`<script src="https://cdn.example/x.js"></script>`, `<link rel=stylesheet href=x.css>`, `<style>@import "x.css"</style>`,
		`<style>a{background:url(https://example.com/x.png)}</style>`, `<script>fetch("/x")</script>`, `<img src=x>`,
	} {
		if !loading.MatchString(page) {
			t.Errorf("%s is not found", page)
		}
	}
}

func TestEverySendOfAnAttackIsAnOrderOfTheContract(t *testing.T) {
	t.Parallel()
	s := newService(t, nil)
	stdout, _, err := attackWith(t, nil, "--url", s.URL+"/", "--rate", "200", "--duration", "200ms")
	if err != nil {
		t.Fatal(err)
	}
	if total := number(t, stdout, "Total"); len(s.keys) != total || len(s.bodies) != total {
		t.Errorf("%d sends of %d keys, and %d answers", len(s.bodies), len(s.keys), total)
	}
	for i, body := range s.bodies {
		sent := regexp.MustCompile(`^application/json \{"user_id":"user-\d+","amount":\d+\}$`)
		if !sent.MatchString(body) || uuid.Validate(s.keys[i]) != nil {
			t.Errorf("%s %s", s.keys[i], body)
		}
	}
	if strings.Contains(stdout, "Replayed") {
		t.Errorf("without duplicates nothing is said about replays:\n%s", stdout)
	}
}

func TestTwoOrdersForOneKeyIsAFailure(t *testing.T) {
	t.Parallel()
	s := newService(t, nil) // which makes a new order of every send
	stdout, _, err := attackWith(t, nil, "--url", s.URL, "--rate", "100", "--duration", "500ms", "--duplicates", "50%")
	line := regexp.MustCompile(`^2 orders for 1 key, (\d+) times: [0-9a-f-]{36} was answered with [0-9a-f-]{36} and with ` +
		`[0-9a-f-]{36}; \d+ of \d+ orders failed$`)
	if err == nil || !line.MatchString(err.Error()) {
		t.Fatalf("%v does not match %s", err, line)
	}
	total := number(t, stdout, "Total")
	if failed := number(t, stdout, "Failed"); failed != total/2 || line.FindStringSubmatch(err.Error())[1] != strconv.Itoa(failed) {
		t.Errorf("%v; want each repeat to fail:\n%s", err, stdout)
	}
	if n := number(t, stdout, "Failed with 200 with a second order for its key"); n != total/2 {
		t.Errorf("the summary does not tell why:\n%s", stdout)
	}
}

func TestAnAttackFailsWhenSendsFail(t *testing.T) {
	t.Parallel()
	s := newService(t, func(w http.ResponseWriter, _ *http.Request, n int) {
		switch n {
		case 1:
			refuse(w, 503, unavailable)
		case 2:
			refuse(w, 409, `{}`)
		case 3:
			w.Header().Set("Location", "/livez")
			w.WriteHeader(http.StatusFound)
		case 4:
			fmt.Fprint(w, `{"status":"success"}`)
		case 5:
			panic(http.ErrAbortHandler)
		default:
			succeed(w)
		}
	})
	numbers := filepath.Join(t.TempDir(), "numbers.json")
	stdout, _, err := attackWith(t, nil, "--url", s.URL, "--rate", "100", "--duration", "500ms", "--json", numbers)
	total := number(t, stdout, "Total")
	if want := fmt.Sprintf("5 of %d orders failed", total); err == nil || err.Error() != want {
		t.Fatalf("%v; want %s", err, want)
	}
	for _, what := range []string{"503 Service Unavailable", "409 Conflict", "302 Found", "200 without an order id", "EOF"} {
		if n := number(t, stdout, "Failed with "+what); n != 1 {
			t.Errorf("%d times %s", n, what)
		}
	}
	text, readErr := os.ReadFile(numbers)
	if readErr != nil {
		t.Fatal(readErr)
	}
	r := readReport(t, text)
	if r.Failed != 5 || len(r.Failures) != 5 || r.StatusCodes["503"] != 1 || r.StatusCodes["0"] != 1 || r.Error != err.Error() {
		t.Errorf("the report is %s", text)
	}
}

func TestASendIsGivenUpAfterItsTime(t *testing.T) {
	t.Parallel()
	s := newService(t, func(_ http.ResponseWriter, r *http.Request, _ int) { <-r.Context().Done() })
	stdout, _, err := attackWith(t, func(a *attack) { a.sendTimeout = 20 * time.Millisecond },
		"--url", s.URL, "--rate", "50", "--duration", "100ms")
	if err == nil || number(t, stdout, "Failed with no answer within 20ms") != number(t, stdout, "Total") {
		t.Errorf("%v\n%s", err, stdout)
	}
}

func TestAServiceThatIsSlowShowsAsLatencyFirst(t *testing.T) {
	t.Parallel()
	arrived, all := make(chan struct{}), make(chan struct{})
	go func() {
		for range 20 {
			<-arrived
		}
		close(all)
	}()
	s := newService(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		select {
		case arrived <- struct{}{}:
			<-all // a loop that were not open would wait for an answer here, for ever
		case <-all:
		}
		succeed(w)
	})
	stdout, _, err := attackWith(t, nil, "--url", s.URL, "--rate", "200", "--duration", "1s")
	if err != nil {
		t.Errorf("%v\n%s", err, stdout)
	}
}

func TestAServiceThatIsTooSlowForTheRateIsAFailure(t *testing.T) {
	t.Parallel()
	s := newService(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		time.Sleep(50 * time.Millisecond) // this is what is tested: 5 at a time are at most 100 per second
		succeed(w)
	})
	slow := func(a *attack) { a.maxWaiting, a.leastPercent = 5, leastPercent }
	stdout, _, err := attackWith(t, slow, "--url", s.URL, "--rate", "1000", "--duration", "300ms", "--connections", "7")
	line := regexp.MustCompile(`^sent \d+\.\d\d orders/sec where --rate asks for 1000: 5 sends were waiting at once, ` +
		`the most that may: the service or this machine is too slow, or --connections 7 too few$`)
	if err == nil || !line.MatchString(err.Error()) {
		t.Errorf("%v does not match %s", err, line)
	}
	if number(t, stdout, "Failed") != 0 || number(t, stdout, "Sent") > 200 {
		t.Errorf("got\n%s", stdout)
	}
}

func TestAnAttackOpensNoMoreConnectionsThanAsked(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	clients := map[string]bool{}
	s := newService(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		mu.Lock()
		clients[r.RemoteAddr] = true
		mu.Unlock()
		time.Sleep(10 * time.Millisecond) // so that more connections would be of use
		succeed(w)
	})
	if _, _, err := attackWith(t, nil, "--url", s.URL, "--rate", "500", "--duration", "200ms", "--connections", "3"); err != nil {
		t.Fatal(err)
	}
	if len(clients) > 3 {
		t.Errorf("%d connections were opened; want at most 3", len(clients))
	}
}

func TestTheRateIsThatOfTheWholeTimeAskedFor(t *testing.T) {
	t.Parallel()
	a := newAttack(options{rate: 100, duration: 10 * time.Second})
	for _, test := range []struct {
		sends int
		over  time.Duration
		want  string // part of the verdict
	}{
		{1000, 10 * time.Second, ""},
		{980, 10 * time.Second, ""},
		{979, 10 * time.Second, "sent 97.90 orders/sec where --rate asks for 100: this machine is too slow"},
		{500, 5 * time.Second, "sent 50.00 orders/sec"},   // then it stalled
		{1000, 20 * time.Second, "sent 50.00 orders/sec"}, // and sent the rest too late
	} {
		tally := newTally(true)
		start := time.Now()
		for i := range test.sends {
			tally.metrics.Add(&vegeta.Result{Timestamp: start.Add(test.over * time.Duration(i) / time.Duration(test.sends-1))})
		}
		switch verdict := a.conclude(tally, false, false).verdict; {
		case test.want == "" && verdict != nil, test.want != "" && (verdict == nil || !strings.Contains(verdict.Error(), test.want)):
			t.Errorf("%d sends in %s: %v; want %q", test.sends, test.over, verdict, test.want)
		}
	}
}

func TestAnInterruptEndsTheAttackAndShowsWhatWasAnswered(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancel(t.Context())
	s := newService(t, func(w http.ResponseWriter, r *http.Request, n int) {
		if n > 3 {
			interrupt() // over the one connection this comes when three are answered
			<-r.Context().Done()
			return
		}
		succeed(w)
	})
	dir := t.TempDir()
	var stdout, stderr bytes.Buffer
	o, err := parse([]string{"--url", s.URL, "--rate", "50", "--duration", "1h", "--connections", "1",
		"--json", "-", "--html", filepath.Join(dir, "plot.html")})
	if err != nil {
		t.Fatal(err)
	}
	a := newAttack(o)
	a.sendTimeout = time.Hour // who waited for the answers would wait for ever
	err = a.run(ctx, &stdout, &stderr)
	if err == nil || !regexp.MustCompile(`^interrupted: [1-9]\d* sends were not answered$`).MatchString(err.Error()) {
		t.Errorf("run: %v", err)
	}
	shown := stderr.String() // the JSON has stdout
	if number(t, shown, "Total") != 3 || number(t, shown, "Success") != 3 || number(t, shown, "Failed") != 0 {
		t.Errorf("got\n%s", shown)
	}
	if r := readReport(t, stdout.Bytes()); !r.Interrupted || r.Total != 3 || r.Unanswered < 1 || r.Error != err.Error() {
		t.Errorf("the report is %s", stdout.String())
	}
	if _, err := os.Stat(filepath.Join(dir, "plot.html")); err != nil {
		t.Error(err)
	}
}

func TestASignalInterruptsTheProgram(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		arrived := make(chan struct{})
		s := newService(t, func(_ http.ResponseWriter, r *http.Request, n int) {
			if n == 1 {
				close(arrived)
			}
			<-r.Context().Done()
		})
		cmd := program(t, "--url", s.URL, "--rate", "50", "--duration", "1h")
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-arrived
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(stderr.String(), "loadtest: interrupted: ") {
			t.Errorf("%s: exit code %d, %q", signal, code, stderr.String())
		}
		if number(t, stdout.String(), "Total") != 0 {
			t.Errorf("got\n%s", stdout.String())
		}
	}
}

// program returns a command that is the program, to be started.
func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), beLoadtest+"=1")
	return cmd
}

func TestAFileThatCannotBeWrittenFailsBeforeAnythingIsSent(t *testing.T) {
	t.Parallel()
	s := newService(t, nil)
	dir, socket := t.TempDir(), filepath.Join(t.TempDir(), "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--json", filepath.Join(dir, "none", "numbers.json")}, "--json cannot be written; name another file: "},
		{[]string{"--html", filepath.Join(dir, "none", "plot.html")}, "--html cannot be written; name another file: "},
		{[]string{"--html", filepath.Join(dir, "plot.html"), "--json", dir}, "--json is " + dir + ", which is not a file; name one"},
		{[]string{"--json", socket}, "--json is " + socket + ", which is not a file; name one"},
	} {
		stdout, stderr, err := load(t, append([]string{"--url", s.URL, "--rate", "100"}, test.args...)...)
		if err == nil || stdout != "" || !strings.HasPrefix(stderr, "loadtest: "+test.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: %v; %q, %q", test.args, err, stdout, stderr)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 || len(s.keys) > 0 {
		t.Errorf("%d orders were sent; left over: %v, %v", len(s.keys), left, err)
	}
}

func TestAFileThatCannotBeWrittenInTheEndIsAFailure(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "numbers.json")
	s := newService(t, func(w http.ResponseWriter, _ *http.Request, n int) {
		if n == 1 { // a folder takes the name
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Error(err)
			}
		}
		succeed(w)
	})
	stdout, _, err := attackWith(t, nil, "--url", s.URL, "--rate", "50", "--duration", "100ms", "--json", path)
	if err == nil || !strings.HasPrefix(err.Error(), "write --json: ") || number(t, stdout, "Failed") != 0 {
		t.Errorf("%v\n%s", err, stdout)
	}
}

func TestAnAttackSaysThatNothingAnswersAndWritesNothing(t *testing.T) {
	t.Parallel()
	const url = "http://127.0.0.1:1"
	path := filepath.Join(t.TempDir(), "numbers.json")
	stdout, stderr, err := load(t, "--url", url, "--rate", "100", "--json", path)
	if err == nil || stdout != "" || !strings.HasPrefix(stderr, "loadtest: nothing answers at "+url+"; start") {
		t.Errorf("%v; %q, %q", err, stdout, stderr)
	}
	if left, err := filepath.Glob(path + "*"); err != nil || left != nil {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestTheFirstOrderOfAKeyIsRememberedForTheLastKeys(t *testing.T) {
	t.Parallel()
	first := newTally(true).first
	orders := make([]uuid.UUID, 2*rememberedKeys+1)
	for i := range orders {
		orders[i] = uuid.New()
		if got := first.of(strconv.Itoa(i), orders[i]); got != orders[i] {
			t.Fatalf("the first order of %d is %s", i, got)
		}
	}
	for i := rememberedKeys; i < len(orders); i++ {
		if got := first.of(strconv.Itoa(i), uuid.New()); got != orders[i] {
			t.Fatalf("the first order of %d is %s; want %s", i, got, orders[i])
		}
	}
	if other := uuid.New(); first.of("0", other) != other || len(first.young)+len(first.old) > 2*rememberedKeys {
		t.Errorf("the oldest key is still remembered, with %d others", len(first.young)+len(first.old))
	}
}

func TestTheProgressTellsWhatCameSinceTheLastLine(t *testing.T) {
	t.Parallel()
	for _, terminal := range []bool{true, false} {
		var out bytes.Buffer
		p := newProgress(&out, 30*time.Second)
		if p.terminal || p.every != progressElsewhere {
			t.Error("a buffer is no terminal")
		}
		p.terminal = terminal
		p.start = time.Now().Add(-12 * time.Second)
		for range 3 {
			p.add(&vegeta.Result{Latency: 250 * time.Millisecond})
		}
		p.show(7)
		p.show(8)
		p.clear()
		pattern := `^12s/30s  \d+ answers/sec  p99 250ms  7 failed\n12s/30s  0 answers/sec  p99 -  8 failed\n$`
		if terminal {
			pattern = `^\r12s/30s  \d+ answers/sec  p99 250ms  7 failed\x1b\[K\r12s/30s  0 answers/sec  p99 -  8 failed\x1b\[K\r\x1b\[K$`
		}
		if !regexp.MustCompile(pattern).MatchString(out.String()) {
			t.Errorf("got %q, want %s", out.String(), pattern)
		}
	}
}

func TestTheSummaryOfAnAttackShowsTheLatencies(t *testing.T) {
	t.Parallel()
	tally := newTally(true)
	start := time.Now()
	for i := range 100 {
		id := uuid.NewString()
		r := &vegeta.Result{
			Seq: uint64(i), Code: 200, Timestamp: start.Add(time.Duration(i) * 10 * time.Millisecond), Latency: 1500 * time.Microsecond,
			Body: fmt.Appendf(nil, `{"order_id":%q}`, id), Headers: http.Header{keyHeader: {id}},
		}
		if i == 99 {
			r.Latency = 10 * time.Millisecond
			r.Headers.Set("Idempotency-Replayed", "true")
		}
		if err := tally.add(r); err != nil {
			t.Fatal(err)
		}
	}
	a := newAttack(options{rate: 100, duration: time.Second, duplicates: 0.01})
	want := `
--- Summary ---
Total: 100 orders
Success: 100
Failed: 0
Duration: 1s
Rate: 100.00 orders/sec
Replayed: 1
Sent: 100.00 orders/sec, of 100 asked for

--- Latency ---
min: 1.5ms
mean: 1.59ms
p50: 1.5ms
p90: 1.5ms
p95: 1.5ms
`
	got := a.conclude(tally, false, false).String()
	if !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	bars := `max: 10ms
  1ms - 2ms          99  99.00%  ##################################################
  2ms - 5ms           0   0.00%
  5ms - 10ms          0   0.00%
 10ms - 20ms          1   1.00%  #
`
	if !strings.HasSuffix(got, bars) {
		t.Errorf("got\n%s\nwant\n%s", got, bars)
	}
}

func TestThePlotShowsWhatCameAfterASendThatWasCutOff(t *testing.T) {
	t.Parallel()
	tally := newTally(true)
	start := time.Now()
	for i, message := range []string{"500 Internal Server Error", errInterrupted.Error(), "503 Service Unavailable"} {
		r := &vegeta.Result{Attack: "orders", Seq: uint64(i), Timestamp: start, Latency: time.Millisecond, Error: message}
		if err := tally.add(r); err != nil {
			t.Fatal(err)
		}
	}
	var page bytes.Buffer
	if err := newAttack(options{rate: 1, duration: time.Second}).conclude(tally, true, false).writeHTML(&page); err != nil {
		t.Fatal(err)
	}
	points := regexp.MustCompile(`\[0,(null|1),(null|1)\]`).FindAll(page.Bytes(), -1)
	if len(points) != 3 || !bytes.Contains(page.Bytes(), []byte("orders: not answered")) || tally.failed != 2 || tally.unanswered != 1 {
		t.Errorf("%q are shown; %d failed, %d were not answered", points, tally.failed, tally.unanswered)
	}
}

func TestAnAttackWithoutAnyAnswerHasAReport(t *testing.T) {
	t.Parallel()
	r := newAttack(options{rate: 1, duration: time.Second}).conclude(newTally(true), true, false)
	var numbers, page bytes.Buffer
	if err := errors.Join(r.writeJSON(&numbers), r.writeHTML(&page)); err != nil {
		t.Fatal(err)
	}
	if report := readReport(t, numbers.Bytes()); report.Total != 0 || report.Rate != 0 || report.SendRate != 0 || page.Len() == 0 {
		t.Errorf("the report is %s", numbers.String())
	}
	if number(t, r.String(), "Total") != 0 || strings.Contains(r.String(), "Latency") {
		t.Errorf("got\n%s", r)
	}
}

func TestDurationsAreShownWithFewDigits(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0s", 999: "999ns", 1234: "1.23µs", 56_789: "56.8µs", 1_234_567: "1.23ms", 409_876_543: "410ms",
		12_345_678_901: "12.3s", time.Second: "1s",
	} {
		if got := shown(d); got != want {
			t.Errorf("%d ns are shown as %s; want %s", d, got, want)
		}
	}
}
