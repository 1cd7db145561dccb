package local

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// TestMain lets the test program play the process that starts a server and dies.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LOCAL_TEST_STARTER"); dir != "" {
		playStarter(dir)
	}
	os.Exit(m.Run())
}

// playStarter starts both servers in the folder, tells what happens on standard output, and waits to be killed. Its life
// is tied to its standard input, so that it does not outlive a failed test.
func playStarter(dir string) {
	var discard [1]byte
	log := slog.New(hook(func(r slog.Record) { fmt.Println(r.Message) }))
	postgreSQL, err := StartPostgreSQL(context.Background(), PostgreSQLOptions{Dir: dir, Settings: fast, Log: log})
	if err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
	redis, err := StartRedis(context.Background(), RedisOptions{Dir: dir, Log: log})
	if err != nil {
		fmt.Println("failed", err)
		os.Exit(1)
	}
	fmt.Println("pids", postgreSQL.Pid(), redis.Pid())
	_, _ = os.Stdin.Read(discard[:])
	os.Exit(0)
}

// starterKilledAt runs playStarter in a process of its own, and kills it as soon as it has said a line that begins so.
func starterKilledAt(t *testing.T, dir, line string) (said string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "LOCAL_TEST_STARTER="+dir)
	input, err := cmd.StdinPipe()
	must(t, err)
	defer input.Close()
	output, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer cmd.Wait()
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "failed") {
			t.Fatal(lines.Text())
		}
		if strings.HasPrefix(lines.Text(), line) {
			must(t, cmd.Process.Kill())
			return lines.Text()
		}
	}
	t.Fatalf("the starter ended before it said %q", line)
	return ""
}

var fast = map[string]string{"fsync": "off"}

// hook is a log handler that calls a function, by which tests step in at the right moment.
type hook func(slog.Record)

func (h hook) Enabled(context.Context, slog.Level) bool { return true }
func (h hook) WithAttrs([]slog.Attr) slog.Handler       { return h }
func (h hook) WithGroup(string) slog.Handler            { return h }
func (h hook) Handle(_ context.Context, r slog.Record) error {
	h(r)
	return nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newFolder returns a folder that an unprivileged user can enter, unlike t.TempDir, whose parent is closed to others. Its
// name has in it what folders of applications have, and worse.
func newFolder(t *testing.T) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("no local servers on Windows")
	}
	dir, err := os.MkdirTemp("", "local [server] ")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	dir, err = filepath.EvalSymlinks(dir)
	must(t, err)
	return dir
}

// stopped stops a server that the last user held, and fails unless its process is gone.
func stopped(t *testing.T, server interface {
	Stop(context.Context) error
	Pid() int
}) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	must(t, server.Stop(ctx))
	if command, ok := commandLine(server.Pid()); ok {
		t.Fatalf("process %d is still there: %s", server.Pid(), command)
	}
}

func startPostgreSQL(t *testing.T, dir string) *PostgreSQL {
	t.Helper()
	p, err := StartPostgreSQL(t.Context(), PostgreSQLOptions{Dir: dir, Settings: fast})
	must(t, err)
	t.Cleanup(func() { must(t, p.Stop(context.Background())) })
	return p
}

func startRedis(t *testing.T, o RedisOptions) *Redis {
	t.Helper()
	r, err := StartRedis(t.Context(), o)
	must(t, err)
	t.Cleanup(func() { must(t, r.Stop(context.Background())) })
	return r
}

// query runs a statement in a connection of its own and returns the first column of the first row, if any.
func query(t *testing.T, p *PostgreSQL, sql string) (value string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.URL("postgres"))
	must(t, err)
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), sql)
	must(t, err)
	defer rows.Close()
	if rows.Next() {
		must(t, rows.Scan(&value))
	}
	rows.Close()
	must(t, rows.Err())
	return value
}

// stranger starts a process that has nothing to do with us, as the user the servers run as.
func stranger(t *testing.T) *exec.Cmd {
	t.Helper()
	owner, err := serverAccount("")
	must(t, err)
	cmd := exec.Command("sleep", "600")
	owner.runs(cmd)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}
