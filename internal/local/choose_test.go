package local

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/connect"
)

// nobody is an address where nothing listens.
const nobody = "127.0.0.1:1"

func wanted(t *testing.T) Wanted {
	folder := newFolder(t)
	must(t, os.Chmod(folder, 0o755))
	return Wanted{
		DatabaseURL: "postgres://postgres:postgres@" + nobody + "/outbox_db", RedisAddrs: []string{nobody},
		Folder: folder, Log: slog.New(slog.DiscardHandler),
	}
}

func chosen(t *testing.T, w Wanted) *Servers {
	t.Helper()
	s, err := Choose(t.Context(), w)
	must(t, err)
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestWithNobodyAtTheDefaultAddressesServersAreStarted(t *testing.T) {
	w := wanted(t)
	s := chosen(t, w)
	conn, err := pgx.Connect(t.Context(), s.DatabaseURL)
	must(t, err)
	defer conn.Close(context.Background())
	var name string
	must(t, conn.QueryRow(t.Context(), "SELECT current_database()").Scan(&name))
	if name != "outbox_db" {
		t.Errorf("the database is %s", name)
	}
	must(t, connect.Redis(s.RedisAddrs, s.RedisPassword).Ping(t.Context()).Err())
	if s.InProcessRedis {
		t.Error("Redis is in process though there is a redis-server")
	}

	// A second process meets the first at the same servers.
	if again := chosen(t, w); again.DatabaseURL != s.DatabaseURL || again.RedisAddrs[0] != s.RedisAddrs[0] {
		t.Errorf("the second process has %s and %s", again.DatabaseURL, again.RedisAddrs)
	}
}

func TestServersAtTheDefaultAddressesAreUsedIfTheDefaultCredentialsOpenThem(t *testing.T) {
	theirs := startPostgreSQL(t, newFolder(t))
	theirRedis, err := StartRedis(t.Context(), RedisOptions{Dir: newFolder(t)})
	must(t, err)
	t.Cleanup(func() { _ = theirRedis.Stop(context.Background()) })

	w := wanted(t)
	w.DatabaseURL, w.RedisAddrs = theirs.URL("outbox_db"), []string{theirRedis.Addr()}
	for range 2 { // the database is made the first time, and found the second
		s := chosen(t, w)
		if s.DatabaseURL != w.DatabaseURL || s.RedisAddrs[0] != theirRedis.Addr() {
			t.Errorf("uses %s and %s", s.DatabaseURL, s.RedisAddrs)
		}
		conn, err := pgx.Connect(t.Context(), s.DatabaseURL)
		must(t, err)
		must(t, conn.Close(t.Context()))
		must(t, s.Stop(t.Context()))
	}
	must(t, connect.Redis([]string{theirRedis.Addr()}, "").Ping(t.Context()).Err()) // it is left running

	// With other credentials they are somebody else's business.
	query(t, theirs, "ALTER USER postgres PASSWORD 'theirs'")
	closed := redis.NewClient(&redis.Options{Addr: theirRedis.Addr()})
	must(t, closed.ConfigSet(t.Context(), "requirepass", "theirs").Err())
	s := chosen(t, w)
	if s.DatabaseURL == w.DatabaseURL || s.RedisAddrs[0] == theirRedis.Addr() {
		t.Errorf("uses %s and %s", s.DatabaseURL, s.RedisAddrs)
	}
	opened := redis.NewClient(&redis.Options{Addr: theirRedis.Addr(), Password: "theirs"})
	must(t, opened.ConfigSet(t.Context(), "requirepass", "").Err()) // or it cannot be stopped
	must(t, errors.Join(closed.Close(), opened.Close()))
}

// An empty server in the place of one that has the orders would be worse than none.
func TestAServerThatIsFullIsWaitedForAndNotReplaced(t *testing.T) {
	theirs, err := StartPostgreSQL(t.Context(), PostgreSQLOptions{Dir: newFolder(t), Settings: map[string]string{
		"fsync": "off", "max_connections": "3", "superuser_reserved_connections": "0", "max_wal_senders": "0",
	}})
	must(t, err)
	t.Cleanup(func() { stopped(t, theirs) })
	var held []*pgx.Conn
	for range 3 {
		conn, err := pgx.Connect(t.Context(), theirs.URL("postgres"))
		must(t, err)
		held = append(held, conn)
	}
	w := wanted(t)
	w.DatabaseURL, w.RedisSet = theirs.URL("outbox_db"), true
	asked := make(chan struct{}, 1000)
	w.Log = slog.New(hook(func(slog.Record) { asked <- struct{}{} }))
	go func() {
		<-asked // it says after a while that it waits
		for _, conn := range held {
			_ = conn.Close(context.Background())
		}
	}()
	if s := chosen(t, w); s.DatabaseURL != w.DatabaseURL {
		t.Errorf("uses %s", s.DatabaseURL)
	}
}

func TestAServerThatDoesNotAnswerIsAnErrorAndNotReplaced(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer silent.Close()
	w := wanted(t)
	w.DatabaseURL, w.RedisSet = "postgres://postgres:postgres@"+silent.Addr().String()+"/outbox_db", true
	_, err = Choose(t.Context(), w)
	if err == nil || !strings.Contains(err.Error(), "DB_HOST") || !strings.Contains(err.Error(), silent.Addr().String()) {
		t.Errorf("PostgreSQL: %v", err)
	}
	w.DatabaseSet, w.RedisSet, w.RedisAddrs = true, false, []string{silent.Addr().String()}
	_, err = Choose(t.Context(), w)
	if err == nil || !strings.Contains(err.Error(), "REDIS_ADDR") || !strings.Contains(err.Error(), silent.Addr().String()) {
		t.Errorf("Redis: %v", err)
	}
}

func TestWhatIsSetIsUsedAsItIs(t *testing.T) {
	w := wanted(t)
	w.DatabaseSet, w.RedisSet, w.RedisPassword = true, true, "p"
	s := chosen(t, w)
	if s.DatabaseURL != w.DatabaseURL || s.RedisAddrs[0] != nobody || s.RedisPassword != "p" {
		t.Errorf("uses %+v", s)
	}
}

func TestWithoutARedisServerOneRunsInProcessButNotForParts(t *testing.T) {
	findRedisServer = func() (string, error) { return "", errors.New("there is none") }
	defer func() { findRedisServer = FindRedisServer }()
	w := wanted(t)
	w.DatabaseSet = true
	s := chosen(t, w)
	if !s.InProcessRedis {
		t.Error("Redis is not in process")
	}
	must(t, connect.Redis(s.RedisAddrs, s.RedisPassword).Ping(t.Context()).Err())

	w.Parts = true
	if _, err := Choose(t.Context(), w); err == nil || !strings.Contains(err.Error(), "REDIS_ADDR") {
		t.Errorf("parts of the program got %v", err)
	}
}
