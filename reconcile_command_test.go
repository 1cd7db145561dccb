package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"idempotent-orders/internal/testenv"
)

func TestReconcileExitsWithZeroOnlyWhenEverythingIsDone(t *testing.T) {
	t.Parallel()
	database := testenv.DatabaseURL(t)
	_, redisServer := testenv.Redis(t)
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t), "DATABASE_URL=" + database, "REDIS_ADDR=" + redisServer.Addr()}
	server := start(t, env, "server").serving()
	placed, _ := server.mustPlace("k")
	id := orderID.FindStringSubmatch(placed)[1]

	out, errs, code := finish(t, env, "reconcile")
	if code != 1 || !strings.Contains(errs, "idempotent-orders: reconcile: not finished yet: 1") || !strings.Contains(out, "missing: 0\n") || !strings.Contains(out, "not finished yet: 1\n") {
		t.Errorf("with an event in the outbox: %d\n%s%s", code, out, errs)
	}

	worker, consumer := start(t, env, "worker"), start(t, env, "consumer")
	consumer.waitFor(mailFor(placed))
	for _, p := range []*program{server, worker, consumer} {
		p.terminate() // finishes what it holds
	}
	redisServer.Kill() // nobody needs it for this
	out, errs, code = finish(t, env, "reconcile")
	if code != 0 || !strings.Contains(out, "           1  orders\n           1  sent by the consumer\n") {
		t.Errorf("when all is done: %d\n%s%s", code, out, errs)
	}

	if _, err := testenv.Pool(t, database).Exec(t.Context(), "DELETE FROM inbox; DELETE FROM outbox_published"); err != nil {
		t.Fatal(err)
	}
	out, errs, code = finish(t, env, "reconcile", "--json", "--from", "2020-01-01")
	var report struct {
		Missing     int
		Differences []struct {
			Name  string
			First []string
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if first := report.Differences[0]; code != 1 || !strings.Contains(errs, "reconcile: missing: 1") || report.Missing != 1 ||
		first.Name != "orders_without_event" || len(first.First) != 1 || first.First[0] != id {
		t.Errorf("with an event lost: %d\n%s%s", code, out, errs)
	}
	if out, errs, code := finish(t, env, "reconcile", "--to=2020-01-01T00:00:00Z"); code != 0 {
		t.Errorf("of orders from before that: %d\n%s%s", code, out, errs)
	}
}

func TestReconcileFindsTheServersThatTheProgramStarted(t *testing.T) {
	t.Parallel()
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t)}
	p := start(t, env).serving()
	placed, _ := p.mustPlace("k")
	p.waitFor(mailFor(placed))
	if out, errs, _ := finish(t, env, "reconcile"); !strings.Contains(out, "           1  orders\n") {
		t.Errorf("while it runs: %s%s", out, errs)
	}
	p.mustPlace("another") // they were not stopped
	p.terminate()
	if out, errs, _ := finish(t, env, "reconcile"); !strings.Contains(out, "           2  orders\n") || !regexp.MustCompile("Starting PostgreSQL").MatchString(errs) {
		t.Errorf("when it has ended: %s%s", out, errs)
	}
}

func TestReconcileStartsNoServersAfresh(t *testing.T) {
	t.Parallel()
	home := testenv.Dir(t)
	out, errs, code := finish(t, []string{"XDG_DATA_HOME=" + home}, "reconcile")
	if code != 1 || !strings.Contains(errs, "DB_HOST") || out != "" {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	if made, _ := filepath.Glob(filepath.Join(home, "*", "postgresql")); made != nil {
		t.Errorf("it made %v", made)
	}
	if _, err := os.Stat(home); err != nil {
		t.Error(err)
	}
}

func TestReconcileNamesWhatIsWrongWithItsCommandLine(t *testing.T) {
	t.Parallel()
	for says, args := range map[string][]string{
		"--from 2026-01-02T00:00:00Z is not before --to 2026-01-02T00:00:00Z": {"--from", "2026-01-02", "--to", "2026-01-02"},
		"it must be like 2026-01-02T15:04:05Z or 2026-01-02":                  {"--to", "yesterday"},
		`"now" is not an option`:                                              {"now"},
		"-dry-run":                                                            {"--dry-run"},
	} {
		_, errs, code := finish(t, nil, append([]string{"reconcile"}, args...)...)
		if code != 2 || !strings.Contains(errs, says) || !strings.Contains(errs, "reconcile --help") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: %d %s\nwant %q", args, code, errs, says)
		}
	}
	for _, arg := range []string{"--help", "-h", "help"} {
		if out, errs, code := finish(t, []string{"PORT=wrong"}, "reconcile", arg); code != 0 || errs != "" || out != reconcileUsage {
			t.Errorf("%s: %d %s%s", arg, code, errs, out)
		}
	}
}
