package main

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/internal/testenv"
)

// deadEvents returns a database with events that are dead at the broker, and the environment to find it. There is no Redis.
func deadEvents(t *testing.T, n int) (pool *pgxpool.Pool, env []string) {
	t.Helper()
	address := testenv.DatabaseURL(t)
	pool = testenv.Pool(t, address)
	_, err := pool.Exec(t.Context(), `INSERT INTO outbox_dead (id, event_id, aggregate_id, event_type, source, payload, created_at, attempts, reason)
		SELECT nextval('outbox_id_seq'), gen_random_uuid(), gen_random_uuid(), 'order.created.v1', '/orders', '{"a":1}', now(), 8, E'ERR too\nodd'
		FROM generate_series(1, $1)`, n)
	if err != nil {
		t.Fatal(err)
	}
	return pool, []string{"DATABASE_URL=" + address, "REDIS_ADDR=127.0.0.1:1", "XDG_DATA_HOME=" + testenv.Dir(t)}
}

func count(t *testing.T, pool *pgxpool.Pool, query string, args ...any) (n int) {
	t.Helper()
	if err := pool.QueryRow(t.Context(), query, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEventsSaysWhatIsWrongWithTheCommandLine(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"":                              "say what to do",
		"dead":                          "say what to do",
		"dead bury":                     `"dead bury"`,
		"dead list now":                 `"dead list now"`,
		"dead list --limit 0":           "--limit is 0",
		"dead list --yes":               "--yes is not an option of dead list",
		"dead list --loud":              "-loud",
		"dead show --yes":               "--yes is not an option of dead show",
		"dead show --id 7":              "must be a UUID",
		"dead requeue --rate 0":         "--rate is 0",
		"requeue --rate 1000000":        "--rate is 1000000",
		"dead drop --older-than -1h":    "--older-than is -1h",
		"dead drop --order x":           "must be a UUID",
		"dead requeue --yes now":        `"now" is not an option`,
		"replay --from 2026-01-02":      "replay needs --to",
		"replay --to 2026-01-02":        "replay needs --from",
		"replay --from noon --to never": "like 2026-01-02T15:04:05Z",
		"replay --from 2026-01-02 --to 2026-01-02":            "is not before",
		"replay --from 2026-01-02 --to 2026-01-03 --after -1": "--after is -1",
		"park":                          "park needs --order",
		"unpark --yes":                  "unpark needs --order",
		"park --id " + uuid.NewString(): "--id is not an option of park",
		"parked --limit 0":              "--limit is 0",
		"parked --yes":                  "--yes is not an option of parked",
	} {
		var out, errs bytes.Buffer
		command, _, err := parse(append([]string{"events"}, strings.Fields(args)...), &out, &errs)
		said := errs.String()
		if err != errUsage || command != "" || !strings.Contains(said, want) || !strings.Contains(said, "--help") || strings.Count(said, "\n") != 1 {
			t.Errorf("events %s: %q, %v, %q; want a line with %q", args, command, err, said, want)
		}
	}
	if _, _, code := finish(t, nil, "events", "dead"); code != 2 {
		t.Errorf("the exit code is %d; want 2", code)
	}
}

func TestEventsHelpNamesEveryOption(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"--help", "help", "dead --help", "dead list -h", "replay --help", "dead requeue help"} {
		var out, errs bytes.Buffer
		command, _, err := parse(append([]string{"events"}, strings.Fields(args)...), &out, &errs)
		if command != "help" || err != nil || errs.Len() > 0 {
			t.Fatalf("events %s: %q, %v, %q", args, command, err, errs.String())
		}
		for action, options := range eventsOptionsOf {
			for _, name := range strings.Fields(strings.ReplaceAll(options, "|", "")) {
				if !strings.Contains(out.String(), "--"+name) {
					t.Errorf("events %s does not name --%s of %s", args, name, action)
				}
			}
		}
	}
}

func TestDeadEventsAreListedAndShownWithoutRedis(t *testing.T) {
	t.Parallel()
	pool, env := deadEvents(t, 3)
	out, errs, code := finish(t, env, "events", "dead", "list", "--limit", "2")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); code != 0 || len(lines) != 3 || !strings.HasPrefix(lines[0], "WHERE") ||
		!strings.HasPrefix(lines[1], "publisher") || !strings.HasSuffix(lines[1], "8         ERR too odd") || !strings.Contains(errs, "more than 2 events") {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	out, errs, code = finish(t, env, "events", "dead", "list", "--json")
	var last struct {
		Where    string
		EventID  uuid.UUID `json:"event_id"`
		Attempts int
		Reason   string
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || code != 0 || errs != "" || len(lines) != 3 || last.Attempts != 8 || last.Reason != "ERR too\nodd" {
		t.Errorf("%d, %v\n%s%s", code, err, out, errs)
	}
	out, errs, code = finish(t, env, "events", "dead", "show", "--id", last.EventID.String())
	var shown struct {
		Event struct {
			ID          uuid.UUID
			SpecVersion string
			Data        struct{ A int }
		}
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || code != 0 || shown.Event.ID != last.EventID || shown.Event.SpecVersion != "1.0" || shown.Event.Data.A != 1 {
		t.Errorf("%d, %v\n%s%s", code, err, out, errs)
	}
	out, errs, code = finish(t, env, "events", "dead", "show", "--type", "order.created.v1", "--older-than", "0s", "--limit", "2")
	if n := strings.Count(out, `"specversion": "1.0"`); code != 0 || n != 2 || !strings.Contains(errs, "more than 2 events") {
		t.Errorf("%d of two were shown: %d\n%s%s", n, code, out, errs)
	}
	if _, errs, code := finish(t, env, "events", "dead", "show", "--order", uuid.NewString()); code != 1 || !strings.Contains(errs, "no such dead event") {
		t.Errorf("%d %s", code, errs)
	}
	if out, _, code := finish(t, env, "events", "dead", "list", "--type", "another"); code != 0 || out != "No event is dead.\n" {
		t.Errorf("%d %s", code, out)
	}
	if n := count(t, pool, "SELECT count(*) FROM operations"); n != 0 {
		t.Errorf("%d operations are noted", n)
	}
}

func TestParkedOrdersAreListedWithWhatWaitsOfThem(t *testing.T) {
	t.Parallel()
	pool, env := deadEvents(t, 0)
	if out, errs, code := finish(t, env, "events", "parked"); code != 0 || out != "No order is parked.\n" {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	orders := []uuid.UUID{uuid.New(), uuid.New(), uuid.New()}
	_, err := pool.Exec(t.Context(), `WITH parked AS (
			INSERT INTO outbox_parked (aggregate_id, parked_at) SELECT unnest($1::uuid[]), now() - generate_series(3, 1, -1) * interval '1 hour'
		), held AS (
			INSERT INTO outbox_held (id, event_id, aggregate_id, event_type, source, payload, created_at)
			SELECT nextval('outbox_id_seq'), gen_random_uuid(), $2, 't', 's', '{}', now() FROM generate_series(1, 2)
		)
		INSERT INTO outbox (event_id, aggregate_id, event_type, source, payload)
		SELECT gen_random_uuid(), unnest(ARRAY[$2::uuid, gen_random_uuid()]), 't', 's', '{}'`, orders, orders[0])
	if err != nil {
		t.Fatal(err)
	}
	out, errs, code := finish(t, env, "events", "parked", "--limit", "2")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != 3 || !strings.HasPrefix(lines[0], "ORDER") || !regexp.MustCompile("^"+orders[0].String()+` +3h0m\d+s +3$`).MatchString(lines[1]) ||
		!strings.HasPrefix(lines[2], orders[1].String()) || !strings.Contains(errs, "--limit") {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	out, errs, code = finish(t, env, "events", "parked", "--json")
	lines = strings.Split(strings.TrimSpace(out), "\n")
	var last struct {
		OrderID uuid.UUID `json:"order_id"`
		Events  int
	}
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || code != 0 || errs != "" || len(lines) != 3 || last.OrderID != orders[2] || last.Events != 0 {
		t.Errorf("%d, %v\n%s%s", code, err, out, errs)
	}
}

func TestNothingIsDoneInADryRunOrWhenNobodyAgrees(t *testing.T) {
	t.Parallel()
	pool, env := deadEvents(t, 3)
	_, redisServer := testenv.Redis(t)
	withRedis := append(slices.Clone(env), "REDIS_ADDR="+redisServer.Addr())
	for _, args := range []string{"dead requeue", "requeue", "dead drop", "replay --from 2020-01-01 --to 2099-01-01", "park --order " + uuid.NewString()} {
		words := append([]string{"events"}, strings.Fields(args)...)
		if out, errs, code := finish(t, env, append(words, "--dry-run")...); code != 0 || !strings.Contains(out, " would be ") {
			t.Errorf("%s in a dry run: %d\n%s%s", args, code, out, errs)
		}
		if strings.HasPrefix(args, "replay") {
			continue // has none to do
		}
		if out, errs, code := finish(t, withRedis, words...); code != 1 || !strings.Contains(errs, "--yes") {
			t.Errorf("%s without a terminal: %d\n%s%s", args, code, out, errs)
		}
	}
	if n := count(t, pool, "SELECT (SELECT count(*) FROM operations) + (SELECT count(*) FROM outbox) + (SELECT count(*) FROM outbox_parked)"); n != 0 {
		t.Errorf("%d things were done", n)
	}
	if n := count(t, pool, "SELECT count(*) FROM outbox_dead"); n != 3 {
		t.Errorf("%d events are dead; want 3", n)
	}
}

func TestAnOperatorIsAsked(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]bool{"y\n": true, "Yes\n": true, "n\n": false, "\n": false, "why\n": false} {
		var out, errs bytes.Buffer
		desk := &operatorsDesk{stdin: strings.NewReader(answer), stdout: &out, stderr: &errs, asks: true}
		goOn, err := desk.confirmed(t.Context(), 1, "dropped")
		if goOn != want || err != nil || !strings.HasPrefix(out.String(), "1 event would be dropped") || !strings.Contains(errs.String(), "Go on? [y/N]") {
			t.Errorf("%q: %t, %v\n%s%s", answer, goOn, err, out.String(), errs.String())
		}
	}
	desk := &operatorsDesk{stdin: strings.NewReader(""), stdout: &bytes.Buffer{}, stderr: &bytes.Buffer{}, asks: true}
	if goOn, err := desk.confirmed(t.Context(), 1, "dropped"); goOn || err != errNobodyToAsk {
		t.Errorf("at the end of the input: %t, %v", goOn, err)
	}
}

func TestOperationsAreDoneAndNoted(t *testing.T) {
	t.Parallel()
	pool, env := deadEvents(t, 3)
	_, redisServer := testenv.Redis(t)
	env = append(env, "REDIS_ADDR="+redisServer.Addr())
	var one, another uuid.UUID
	if err := pool.QueryRow(t.Context(), "SELECT min(event_id::text)::uuid, max(event_id::text)::uuid FROM outbox_dead").Scan(&one, &another); err != nil {
		t.Fatal(err)
	}
	order := uuid.NewString()
	for _, step := range []struct {
		args, want string
		events     int
	}{
		{"dead drop --id " + one.String(), "1 event was dropped.", 1},
		{"requeue --id " + another.String() + " --rate 1000", "1 event was requeued.", 1},
		{"dead requeue --type order.created.v1", "1 event was requeued.", 1},
		{"park --order " + order, "is parked, with 0 events waiting.", 0},
		{"unpark --order " + order, "is unparked, with 0 events waiting.", 0},
	} {
		out, errs, code := finish(t, env, append([]string{"events"}, strings.Fields(step.args+" --yes")...)...)
		if code != 0 || !strings.Contains(out, step.want) {
			t.Errorf("%s: %d\n%s%s", step.args, code, out, errs)
		}
		var who, what string
		var events int
		err := pool.QueryRow(t.Context(), "SELECT who, what, events FROM operations ORDER BY id DESC LIMIT 1").Scan(&who, &what, &events)
		if err != nil || !strings.Contains(who, "@") || what != "events "+step.args+" --yes" || events != step.events {
			t.Errorf("noted: %s, %q, %d, %v; want %q, %d", who, what, events, err, step.args, step.events)
		}
	}
	if n := count(t, pool, "SELECT count(*) FROM outbox"); n != 2 {
		t.Errorf("%d events wait to be published; want 2", n)
	}
	if out, _, code := finish(t, env, "events", "requeue", "--yes"); code != 0 || !strings.HasPrefix(out, "0 events would be requeued") {
		t.Errorf("with nothing to do: %d %s", code, out)
	}
}

func TestCtrlCLeavesTheRestForAnotherRun(t *testing.T) {
	t.Parallel()
	pool, env := deadEvents(t, 30)
	_, redisServer := testenv.Redis(t)
	env = append(env, "REDIS_ADDR="+redisServer.Addr())
	p := start(t, env, "events", "requeue", "--yes", "--rate", "1")
	p.waitFor(regexp.MustCompile(`1 of 30`))
	if err := p.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := <-p.exit; err == nil || !strings.Contains(p.said(), "of 30 events were requeued: interrupted") {
		t.Errorf("%v\n%s", err, p.said())
	}
	done := count(t, pool, "SELECT sum(events)::bigint FROM operations")
	if n := count(t, pool, "SELECT count(*) FROM outbox"); n != done || done == 0 || done == 30 {
		t.Errorf("%d were requeued, and %d are noted", n, done)
	}
	if out, errs, code := finish(t, env, "events", "requeue", "--yes", "--rate", "1000"); code != 0 {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	if n := count(t, pool, "SELECT sum(events)::bigint FROM operations"); n != 30 {
		t.Errorf("%d are noted; want 30", n)
	}
}
