package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func TestPostgreSQLKeepsItsDataAndItsPort(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first := startPostgreSQL(t, dir)
	query(t, first, "CREATE TABLE kept AS SELECT 'still here' AS what")
	if got := query(t, first, "SHOW fsync"); got != "off" {
		t.Errorf("fsync is %s", got)
	}
	if got := query(t, first, "SHOW listen_addresses"); got != "127.0.0.1" {
		t.Errorf("listens on %s", got)
	}
	stopped(t, first)
	must(t, first.Stop(t.Context()))

	second := startPostgreSQL(t, dir)
	if got := query(t, second, "SELECT what FROM kept"); got != "still here" {
		t.Errorf("found %q", got)
	}
	if first.URL("x") != second.URL("x") {
		t.Errorf("moved from %s to %s", first.URL("x"), second.URL("x"))
	}
	stopped(t, second)
}

func TestUsersOfAFolderShareOnePostgreSQL(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	var users [4]*PostgreSQL
	var wg sync.WaitGroup
	for i := range users {
		wg.Go(func() {
			var err error
			users[i], err = StartPostgreSQL(t.Context(), PostgreSQLOptions{Dir: dir, Settings: fast})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	last := len(users) - 1
	for _, user := range users[:last] {
		if user.Pid() != users[last].Pid() {
			t.Errorf("two servers, %d and %d", user.Pid(), users[last].Pid())
		}
		must(t, user.Stop(t.Context()))
		must(t, user.Stop(t.Context()))
		query(t, users[last], "SELECT 'alive'")
	}
	stopped(t, users[last])
}

func TestUsersWhoLeaveTogetherStopPostgreSQL(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	var users [8]*PostgreSQL
	for i := range users {
		users[i] = startPostgreSQL(t, dir)
	}
	var wg sync.WaitGroup
	for _, user := range users {
		wg.Go(func() {
			if err := user.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	stopped(t, users[0])
}

func TestPostgreSQLRecoversAfterKill(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first := startPostgreSQL(t, dir)
	query(t, first, "CREATE TABLE kept AS SELECT 'still here' AS what")
	postmaster, err := os.FindProcess(first.Pid())
	must(t, err)
	must(t, postmaster.Kill())

	second := startPostgreSQL(t, dir)
	if first.Pid() == second.Pid() {
		t.Error("a killed server was used")
	}
	if got := query(t, second, "SELECT what FROM kept"); got != "still here" {
		t.Errorf("found %q", got)
	}
	must(t, first.Stop(t.Context()))
	stopped(t, second)
}

func TestServersOutliveTheirStarter(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	var postgreSQLPid, redisPid int
	_, err := fmt.Sscanf(starterKilledAt(t, dir, "pids"), "pids %d %d", &postgreSQLPid, &redisPid)
	must(t, err)

	p := startPostgreSQL(t, dir)
	if p.Pid() != postgreSQLPid {
		t.Errorf("PostgreSQL %d was started although %d was running", p.Pid(), postgreSQLPid)
	}
	query(t, p, "SELECT 1::text")
	r := startRedis(t, RedisOptions{Dir: dir})
	if r.Pid() != redisPid {
		t.Errorf("Redis %d was started although %d was running", r.Pid(), redisPid)
	}
	stopped(t, p)
	stopped(t, r)
}

func TestADatabaseFolderThatWasNotFinishedIsMadeAgain(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	starterKilledAt(t, dir, "Creating a database folder")

	p := startPostgreSQL(t, dir) // the initdb of the dead starter may still be at work
	query(t, p, "SELECT 1::text")
	stopped(t, p)
}

func TestAStalePidOfAnotherProcessIsRecognised(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first := startPostgreSQL(t, dir)
	data := query(t, first, "SHOW data_directory")
	stopped(t, first)
	for name, content := range map[string]string{
		"another process": fmt.Sprintf("%d\n%s\n1\n5432\n\n127.0.0.1\n 1 2\nready   \n", stranger(t).Process.Pid, data),
		"this process":    fmt.Sprintf("%d\n%s\n1\n5432\n\n127.0.0.1\n 1 2\nready   \n", os.Getpid(), data),
		"torn":            "12",
		"empty":           "",
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(filepath.Join(data, "postmaster.pid"), []byte(content), 0o600))
			owner, err := serverAccount(data)
			must(t, err)
			must(t, owner.owns(filepath.Join(data, "postmaster.pid")))
			p := startPostgreSQL(t, dir)
			query(t, p, "SELECT 1::text")
			stopped(t, p)
		})
	}
	other := stranger(t)
	must(t, os.WriteFile(filepath.Join(data, "postmaster.pid"),
		fmt.Appendf(nil, "%d\n%s\n1\n5432\n\n127.0.0.1\n 1 2\nready   \n", other.Process.Pid, data), 0o600))
	p := startPostgreSQL(t, dir)
	stopped(t, p)
	if command, ok := commandLine(other.Process.Pid); !ok || !strings.Contains(command, "sleep") {
		t.Error("the other process was ended")
	}
}

func TestAStartThatIsCancelledLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, moment := range []string{"Creating a database folder", "Starting PostgreSQL"} {
		t.Run(moment, func(t *testing.T) {
			t.Parallel()
			dir := newFolder(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var pid int64
			log := slog.New(hook(func(r slog.Record) {
				if r.Message != moment {
					return
				}
				r.Attrs(func(a slog.Attr) bool {
					if a.Key == "pid" {
						pid = a.Value.Int64()
					}
					return true
				})
				cancel()
			}))
			_, err := StartPostgreSQL(ctx, PostgreSQLOptions{Dir: dir, Settings: fast, Log: log})
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("got %v", err)
			}
			if command, ok := commandLine(int(pid)); ok {
				t.Errorf("left behind: %s", command)
			}
			p := startPostgreSQL(t, dir)
			query(t, p, "SELECT 1::text")
			stopped(t, p)
		})
	}
}

func TestAStartThatLosesTheRaceForThePortIsRepeated(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	log := slog.New(hook(func(r slog.Record) {
		if r.Message == "Starting PostgreSQL again" {
			l.Close()
		}
	}))
	p, err := StartPostgreSQL(t.Context(), PostgreSQLOptions{
		Dir: newFolder(t), Settings: map[string]string{"fsync": "off", "port": strconv.Itoa(port)}, Log: log,
	})
	must(t, err)
	if p.port != port {
		t.Errorf("on port %d, not %d", p.port, port)
	}
	stopped(t, p)
}

func TestTheServersLogIsInTheError(t *testing.T) {
	t.Parallel()
	_, err := StartPostgreSQL(t.Context(), PostgreSQLOptions{
		Dir: newFolder(t), Settings: map[string]string{"fsync": "off", "no_such_setting": "1"},
	})
	if err == nil || !strings.Contains(err.Error(), "no_such_setting") {
		t.Errorf("got %v", err)
	}
}

func TestAnotherServerOnThePortIsNotMistaken(t *testing.T) {
	t.Parallel()
	other := startPostgreSQL(t, newFolder(t))
	err := login(t.Context(), other.port, "/somewhere/else")
	if !errors.Is(err, errOtherServer) || !refused(err) {
		t.Errorf("got %v", err)
	}
	dir := newFolder(t) // its port of the last time is taken now
	must(t, os.WriteFile(filepath.Join(dir, "postgres.port"), fmt.Appendln(nil, other.port), 0o600))
	p := startPostgreSQL(t, dir)
	if p.port == other.port {
		t.Error("two servers on one port")
	}
	stopped(t, p)
	stopped(t, other)
}

func TestAClosedFolderIsNamed(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root changes to another user")
	}
	closed := newFolder(t) // as os.MkdirTemp makes it, for its owner alone
	dir := filepath.Join(closed, "data")
	_, err := StartPostgreSQL(t.Context(), PostgreSQLOptions{Dir: dir, Settings: fast})
	if err == nil || !strings.Contains(err.Error(), "cannot enter "+closed+":") || !strings.Contains(err.Error(), "XDG_DATA_HOME") {
		t.Errorf("PostgreSQL: got %v", err)
	}
	_, err = StartRedis(t.Context(), RedisOptions{Dir: dir})
	if err == nil || !strings.Contains(err.Error(), "cannot enter "+closed+":") {
		t.Errorf("Redis: got %v", err)
	}
}
