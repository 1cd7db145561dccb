package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	vegeta "github.com/tsenart/vegeta/v12/lib"

	"idempotent-orders/internal/command"
)

// readTargets reads targets as the vegeta tool does.
func readTargets(t *testing.T, text string) []vegeta.Target {
	t.Helper()
	read, err := vegeta.ReadAllTargets(vegeta.NewJSONTargeter(strings.NewReader(text), nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	return read
}

func TestTargetsAreOrdersInTheFormatOfVegeta(t *testing.T) {
	t.Parallel()
	stdout, stderr, err := load(t, "targets", "--orders", "50", "--url", "http://example.com:81/")
	if err != nil || stderr != "" {
		t.Fatalf("%v, %q", err, stderr)
	}
	read := readTargets(t, stdout)
	if len(read) != 50 || strings.Count(stdout, "\n") != 50 {
		t.Errorf("%d targets in %d lines; want 50", len(read), strings.Count(stdout, "\n"))
	}
	keys := map[string]bool{}
	for _, target := range read {
		key := target.Header.Get(keyHeader)
		keys[key] = true
		if target.Method != "POST" || target.URL != "http://example.com:81/orders" || len(target.Header) != 2 ||
			target.Header.Get("Content-Type") != "application/json" || uuid.Validate(key) != nil {
			t.Errorf("%s %s %v", target.Method, target.URL, target.Header)
		}
		if !regexp.MustCompile(`^\{"user_id":"user-\d+","amount":\d+\}$`).Match(target.Body) {
			t.Errorf("body %s", target.Body)
		}
	}
	if len(keys) != 50 {
		t.Errorf("%d keys; want one for each order", len(keys))
	}
}

func TestTheShareOfDuplicatesIsExact(t *testing.T) {
	t.Parallel()
	for duplicates, orders := range map[string]int{"0%": 3000, "5%": 2850, "0.25": 2250, "100%": 1, "1": 1} {
		stdout, stderr, err := load(t, "targets", "--orders", "3000", "--duplicates", duplicates)
		if err != nil {
			t.Fatal(stderr)
		}
		var recent []string // keys, the last one last
		bodies := map[string]string{}
		for _, target := range readTargets(t, stdout) {
			key, body := target.Header.Get(keyHeader), string(target.Body)
			first, repeated := bodies[key]
			switch {
			case !repeated:
				recent, bodies[key] = append(recent, key), body
			case first != body:
				t.Errorf("%s is sent with %s and with %s", key, first, body)
			case !slices.Contains(recent[max(0, len(recent)-recentOrders):], key):
				t.Errorf("%s is repeated, which is not among the last %d", key, recentOrders)
			}
			if prefers := target.Header.Get("Prefer"); (prefers == preferWait) != (duplicates != "0%") {
				t.Errorf("with %s duplicates, a send prefers %q", duplicates, prefers)
			}
		}
		if len(bodies) != orders {
			t.Errorf("with %s duplicates, %d orders; want %d", duplicates, len(bodies), orders)
		}
	}
}

func TestTargetsEndWhenTheReaderGoes(t *testing.T) {
	t.Parallel()
	cmd := program(t, "targets") // without end
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := stdout.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || stderr.Len() > 0 {
		t.Errorf("after %s: %v, %q", line, err, stderr.String())
	}
}

// failingWriter fails every write.
type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestTargetsThatCannotBeWrittenAreAnError(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"targets"}, {"targets", "--orders", "1"}} {
		var stderr bytes.Buffer
		err := tool.Run(t.Context(), args, failingWriter{errors.New("the disk is full")}, &stderr)
		if err == nil || stderr.String() != "loadtest: write the targets: the disk is full\n" {
			t.Errorf("%q: %v, %q", args, err, stderr.String())
		}
		if err := tool.Run(t.Context(), args, failingWriter{io.ErrClosedPipe}, &stderr); err != nil {
			t.Errorf("%q: nobody reads: %v", args, err)
		}
	}
}

func TestAnInterruptEndsTheTargets(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var stdout, stderr bytes.Buffer
	if err := tool.Run(ctx, []string{"targets"}, &stdout, &stderr); err != nil || stderr.Len() > 0 {
		t.Errorf("endless targets: %v, %q", err, stderr.String())
	}
	if err := tool.Run(ctx, []string{"targets", "--orders", "5"}, &stdout, &stderr); err == nil || errors.Is(err, command.ErrUsage) {
		t.Errorf("five targets: %v", err)
	}
	if want := "loadtest: interrupted: 0 of 5 orders were printed\n"; stderr.String() != want {
		t.Errorf("stderr is %q, want %q", stderr.String(), want)
	}
}

// vegetaTool returns a command that is the pinned vegeta, to be started.
func vegetaTool(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"tool", "-modfile=tools/go.mod", "vegeta"}, args...)...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = t.Output()
	return cmd
}

func TestTheVegetaToolAttacksTheTargets(t *testing.T) {
	t.Parallel()
	url, pool := serveOrders(t)
	printing, attacking := program(t, "targets", "--url", url, "--duplicates", "20%"),
		vegetaTool(t, "attack", "-format=json", "-lazy", "-rate=200", "-duration=1s")
	var stderr, results bytes.Buffer
	printing.Stderr, attacking.Stdout = &stderr, &results
	pipe, err := printing.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	attacking.Stdin = pipe
	if err := printing.Start(); err != nil {
		t.Fatal(err)
	}
	if err := attacking.Run(); err != nil {
		t.Fatal(err)
	}
	_ = pipe.Close() // now that vegeta has gone, nobody reads
	if err := printing.Wait(); err != nil || stderr.Len() > 0 {
		t.Errorf("targets: %v, %q", err, stderr.String())
	}

	reporting := vegetaTool(t, "report")
	reporting.Stdin = bytes.NewReader(results.Bytes())
	report, err := reporting.Output()
	if err != nil || !regexp.MustCompile(`Success\s+\[ratio\]\s+100\.00%`).Match(report) {
		t.Errorf("vegeta report: %v\n%s", err, report)
	}
	answers, replays := 0, 0
	for decode := vegeta.NewDecoder(&results); ; answers++ {
		var r vegeta.Result
		if err := decode(&r); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if r.Code != 200 || !orderID.Match(r.Body) {
			t.Errorf("answered %d %s %s", r.Code, r.Body, r.Error)
		}
		if replayed(&r) {
			replays++
		}
	}
	if answers < 10 || replays != answers/5 {
		t.Errorf("%d answers, %d of them replays; want a fifth", answers, replays)
	}
	var placed int
	if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&placed); err != nil || placed != answers-replays {
		t.Errorf("%d orders are in the database, %v; want %d", placed, err, answers-replays)
	}
}

var orderID = regexp.MustCompile(`"order_id":"[0-9a-f-]{36}"`)
