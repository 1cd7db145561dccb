package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"idempotent-orders/internal/testenv"
)

// buildPrevious builds the program of the previous release, which .ci/previous-release names, and returns the file.
func buildPrevious(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(".ci/previous-release")
	if err != nil {
		t.Fatal(err)
	}
	release := strings.TrimSpace(string(content))
	if _, err := exec.LookPath("git"); err != nil {
		t.Fatalf("the program of the previous release is built from the repository: install git (%v)", err)
	}
	if output, err := exec.Command("git", "rev-parse", "--verify", "--quiet", release+"^{commit}").CombinedOutput(); err != nil {
		t.Fatalf("the previous release, %s, is not in this clone (%v %s): clone with the whole history "+
			"(git fetch --unshallow --tags; fetch-depth: 0 for actions/checkout)", release, err, output)
	}
	dir := testenv.Dir(t)
	archive, source, file := filepath.Join(dir, "source.tar"), filepath.Join(dir, "source"), filepath.Join(dir, "previous")
	if err := os.Mkdir(source, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"git", "archive", "--output", archive, release}, {"tar", "-x", "-f", archive, "-C", source},
		{"go", "build", "-C", source, "-buildvcs=false", "-o", file, "."},
	} {
		if output, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, output)
		}
	}
	return file
}

// release are the parts of one release, at work.
type release struct{ server, worker, consumer *program }

func startRelease(t *testing.T, file string, env []string) release {
	t.Helper()
	r := release{startFile(t, file, env, "server").serving(), startFile(t, file, env, "worker"), startFile(t, file, env, "consumer")}
	r.worker.waitFor(regexp.MustCompile("Outbox worker started"))
	r.consumer.waitFor(regexp.MustCompile("Email consumer started"))
	return r
}

// A database of the previous release, in use, is migrated by this program; then both releases work on it, together and each
// on what the other left.
func TestThePreviousReleaseRunsBesideThisOneOverTheMigration(t *testing.T) {
	t.Parallel()
	previous := buildPrevious(t)
	database := testenv.DatabaseURL(t)
	pool := testenv.Pool(t, database)
	if _, err := pool.Exec(t.Context(), "DROP SCHEMA public CASCADE; CREATE SCHEMA public"); err != nil {
		t.Fatal(err)
	}
	_, redisServer := testenv.Redis(t)
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t), "DATABASE_URL=" + database, "REDIS_ADDR=" + redisServer.Addr(), "EMAIL_SENDER=discard"}
	migrateUp := startFile(t, previous, env, "migrate", "up")
	if err := <-migrateUp.exit; err != nil {
		t.Fatalf("the previous release's migrate up: %v\n%s", err, migrateUp.said())
	}
	old := startRelease(t, previous, env)
	before := placeMany(t, "before", old.server)

	stop, loaded := make(chan struct{}), make(chan int)
	go func() { // the migration may not disturb who is at work
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				loaded <- n
				return
			default:
			}
			if status, body, _, err := old.server.place(fmt.Sprint("during-", n)); err != nil || status != 200 {
				t.Errorf("during the migration: %d %s, %v", status, body, err)
			}
		}
	}()
	if out, errs, code := finish(t, env, "migrate", "up"); code != 0 {
		t.Fatalf("migrate up: %d\n%s%s", code, out, errs)
	}
	this := startRelease(t, os.Args[0], env)
	close(stop)
	during := <-loaded

	expectReplays(t, before, this.server)
	expectReplays(t, placeMany(t, "by the previous release", old.server), this.server)
	expectReplays(t, placeMany(t, "by this release", this.server), old.server)
	expectReplays(t, placeMany(t, "by both", old.server, this.server), old.server, this.server)
	reconciled(t, env)

	this.worker.terminate()
	this.consumer.terminate()
	placeMany(t, "left to the previous release", this.server)
	reconciled(t, env)

	startFile(t, previous, env, "server").serving().terminate() // a way back, on the migrated database
	worker, consumer := start(t, env, "worker"), start(t, env, "consumer")
	worker.waitFor(regexp.MustCompile("Outbox worker started"))
	old.worker.terminate()
	old.consumer.terminate()
	placeMany(t, "left to this release", old.server)
	reconciled(t, env)
	expectOrders(t, pool, 6*many+during)
	for _, p := range []*program{old.server, this.server, worker, consumer} {
		p.terminate()
	}
}

const many = 50

// answered is how a key was answered, but for the mark of a replay.
type answered struct{ body, location, expires string }

// placeMany places orders under as many keys, each sent to all of the servers at once, and returns the answers by key.
func placeMany(t *testing.T, name string, servers ...*program) map[string]answered {
	t.Helper()
	answers := map[string]answered{}
	for i := range many {
		key := fmt.Sprintf("%s-%d", strings.ReplaceAll(name, " ", "-"), i)
		got := make([]answered, len(servers))
		var sends sync.WaitGroup
		for s, server := range servers {
			sends.Go(func() { got[s], _ = server.insist(key) })
		}
		sends.Wait()
		for _, g := range got {
			if g != got[0] || g.body == "" {
				t.Errorf("%s was answered %v", key, got)
			}
		}
		answers[key] = got[0]
	}
	return answers
}

// insist sends an order until no other send of its key stands in the way.
func (p *program) insist(key string) (a answered, replayed bool) {
	for {
		status, body, header, err := p.place(key)
		if status == 409 {
			continue
		}
		if err != nil || status != 200 {
			p.t.Errorf("%s was answered %d %s, %v", key, status, body, err)
			return answered{}, false
		}
		return answered{body, header.Get("Location"), header.Get("Idempotency-Expires")}, header.Get("Idempotency-Replayed") == "true"
	}
}

// expectReplays sends keys again, to other servers, which have to answer the same.
func expectReplays(t *testing.T, answers map[string]answered, servers ...*program) {
	t.Helper()
	for key, want := range answers {
		for _, server := range servers {
			if got, replayed := server.insist(key); got != want || !replayed {
				t.Errorf("%s was answered %v, and then %v, replayed %t", key, want, got, replayed)
			}
		}
	}
}

func expectOrders(t *testing.T, pool *pgxpool.Pool, want int) {
	t.Helper()
	var orders int
	if err := pool.QueryRow(t.Context(), "SELECT count(*) FROM orders").Scan(&orders); err != nil || orders != want {
		t.Errorf("there are %d orders, %v; want %d", orders, err, want)
	}
}
