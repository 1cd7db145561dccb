package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"idempotent-orders/internal/config"
	"idempotent-orders/internal/testenv"
)

// beProgram in the environment makes the test binary the program, with nobody at the default addresses: a developer's own
// servers there are none of the tests' business.
const beProgram = "IDEMPOTENT_ORDERS_BE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(beProgram) != "" {
		for i, v := range config.Variables {
			switch v.Name {
			case "DB_PORT":
				config.Variables[i].Default = "1"
			case "REDIS_ADDR":
				config.Variables[i].Default = "localhost:1"
			case "OPS_ADDR":
				config.Variables[i].Default = "127.0.0.1:0"
			}
		}
		main()
		os.Exit(0)
	}
	os.Exit(testenv.Main(m))
}

// program is a process of the program.
type program struct {
	t    *testing.T
	cmd  *exec.Cmd
	url  string
	exit chan error

	mu    sync.Mutex
	lines []string
}

// start runs the program with arguments, as a user does: the environment has what is given, and where to find things.
func start(t *testing.T, env []string, args ...string) *program {
	t.Helper()
	return startFile(t, os.Args[0], env, args...)
}

// startFile runs the program that a file holds.
func startFile(t *testing.T, file string, env []string, args ...string) *program {
	t.Helper()
	p := &program{t: t, cmd: exec.Command(file, args...), exit: make(chan error, 1)}
	p.cmd.Env = append([]string{beProgram + "=1", "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir()}, env...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			p.mu.Lock()
			p.lines = append(p.lines, lines.Text())
			p.mu.Unlock()
		}
	}()
	go func() { <-read; p.exit <- p.cmd.Wait() }()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%v said:\n%s", args, p.said())
		}
		_ = p.cmd.Process.Kill()
	})
	return p
}

// serving waits until the program serves.
func (p *program) serving() *program {
	p.t.Helper()
	port := p.waitFor(regexp.MustCompile(`Server starting on port (\d+)`))[1]
	p.url = "http://127.0.0.1:" + port
	return p
}

func (p *program) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// waitFor waits for a line in the log and returns its match.
func (p *program) waitFor(line *regexp.Regexp) []string {
	p.t.Helper()
	deadline := time.Now().Add(90 * time.Second)
	for time.Now().Before(deadline) {
		if match := line.FindStringSubmatch(p.said()); match != nil {
			return match
		}
		select {
		case err := <-p.exit:
			p.exit <- err
			if match := line.FindStringSubmatch(p.said()); match != nil {
				return match
			}
			p.t.Fatalf("the program ended (%v) before it said %s:\n%s", err, line, p.said())
		case <-time.After(5 * time.Millisecond):
		}
	}
	p.t.Fatalf("the program did not say %s:\n%s", line, p.said())
	return nil
}

// terminate sends SIGTERM and checks that the program ends well, in time.
func (p *program) terminate() {
	p.t.Helper()
	p.signal()
	p.ends()
}

// signal sends SIGTERM.
func (p *program) signal() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
}

// ends checks that the program, which got a SIGTERM just now, ends well, in time.
func (p *program) ends() {
	p.t.Helper()
	select {
	case err := <-p.exit:
		if err != nil {
			p.t.Errorf("after SIGTERM: %v\n%s", err, p.said())
		}
	case <-time.After(10 * time.Second):
		p.t.Fatalf("ten seconds after SIGTERM it still runs:\n%s", p.said())
	}
}

func (p *program) kill() {
	p.t.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.t.Fatal(err)
	}
	<-p.exit
}

// place sends an order and returns the answer's status, body and headers.
func (p *program) place(key string) (int, string, http.Header, error) {
	r, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, p.url+"/orders", nil)
	if err != nil {
		return 0, "", nil, err
	}
	r.Header.Set("Idempotency-Key", key)
	w, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, "", nil, err
	}
	defer w.Body.Close()
	body, err := io.ReadAll(w.Body)
	return w.StatusCode, strings.TrimSpace(string(body)), w.Header, err
}

func (p *program) mustPlace(key string) (body string, replayed bool) {
	p.t.Helper()
	status, body, header, err := p.place(key)
	if err != nil || status != http.StatusOK {
		p.t.Fatalf("%s was answered %d %s, %v", key, status, body, err)
	}
	return body, header.Get("Idempotency-Replayed") == "true"
}

var orderID = regexp.MustCompile(`"order_id":"([^"]+)"`)

func mailFor(body string) *regexp.Regexp {
	return regexp.MustCompile(`\[EMAIL\] Sending confirmation email for Order ` + orderID.FindStringSubmatch(body)[1] + `"`)
}

func TestTheProgramRunsFromNothingAndStopsCleanly(t *testing.T) {
	t.Parallel()
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t)}
	p := start(t, env).serving()
	placed, replayed := p.mustPlace("k")
	again, replayedAgain := p.mustPlace("k")
	if placed != again || replayed || !replayedAgain {
		t.Errorf("%s, and again %s, replayed %t and %t", placed, again, replayed, replayedAgain)
	}
	p.waitFor(mailFor(placed))
	p.waitFor(regexp.MustCompile(`\[EMAIL\] -> User: user-456"\n.*\[EMAIL\] -> Amount: 1000"\n.*\[EMAIL\] ✓ Email sent successfully!"`))

	output, err := exec.CommandContext(t.Context(), "go", "run", "./loadtest", "--url", p.url).CombinedOutput()
	if err != nil || !bytes.Contains(output, []byte("Success: 100")) || bytes.Count(output, []byte(`] 200: {"status":"success","order_id":"`)) != 100 {
		t.Errorf("loadtest says %s, %v", output, err)
	}

	last := 0
	for _, line := range []string{"Starting PostgreSQL", "Starting Redis", "Connected to database successfully", "Connected to Redis successfully",
		"Outbox worker started", "Email consumer started", "Server starting on port "} {
		at := strings.Index(p.said(), line)
		if at < last {
			t.Errorf("%q is missing, or out of order", line)
		}
		last = at
	}
	p.terminate()
	for _, pid := range regexp.MustCompile(`Starting (?:PostgreSQL|Redis)" .*pid=(\d+)`).FindAllStringSubmatch(p.said(), -1) {
		// One that has ended, and that nobody has waited for yet, has no command line.
		if command, _ := os.ReadFile("/proc/" + pid[1] + "/cmdline"); len(command) > 0 {
			t.Errorf("process %s is left behind", pid[1])
		}
	}

	// What was there is there again.
	p = start(t, env).serving()
	if body, replayed := p.mustPlace("k"); body != placed || !replayed {
		t.Errorf("after a restart: %s, replayed %t; want %s", body, replayed, placed)
	}
	p.terminate()
}

func TestAnAcknowledgedOrderSurvivesHoweverTheProgramEnds(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*program){"SIGTERM": (*program).terminate, "SIGKILL": (*program).kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t)}
			p := start(t, env).serving()
			var clients sync.WaitGroup
			var mu sync.Mutex
			acknowledged := map[string]string{}
			enough := make(chan struct{})
			for c := range 8 {
				clients.Go(func() {
					for i := 0; ; i++ {
						key := fmt.Sprintf("%d-%d", c, i)
						status, body, _, err := p.place(key)
						if err != nil {
							return // the program is gone
						}
						if status != http.StatusOK {
							t.Errorf("%s was answered %d %s", key, status, body)
							return
						}
						mu.Lock()
						acknowledged[key] = body
						if len(acknowledged) == 200 {
							close(enough)
						}
						mu.Unlock()
					}
				})
			}
			<-enough
			end(p)
			clients.Wait()

			after := start(t, env).serving()
			for key, body := range acknowledged {
				if again, replayed := after.mustPlace(key); again != body || !replayed {
					t.Errorf("%s was acknowledged with %s; now it is %s, replayed %t", key, body, again, replayed)
				}
			}
			for _, body := range acknowledged {
				if mailFor(body).MatchString(p.said()) {
					continue
				}
				after.waitFor(mailFor(body))
			}
			after.terminate()
		})
	}
}

func TestSIGTERMWhileStartingEndsWell(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"msg=Starting", "Starting PostgreSQL", "Connected to database"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			p := start(t, []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t)})
			p.waitFor(regexp.MustCompile(at))
			p.terminate()
		})
	}
}

// Silent servers, not dead ones: every connection stays open, and nothing comes back.
func TestSIGTERMEndsWellInTimeThoughTheStoresAreSilent(t *testing.T) {
	t.Parallel()
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t)}
	p := start(t, env).serving()
	placed, _ := p.mustPlace("k")
	p.waitFor(mailFor(placed))
	database := p.waitFor(regexp.MustCompile(`Starting PostgreSQL" .*port=(\d+) pid=(\d+)`))
	pids := []int{number(t, database[2]), number(t, p.waitFor(regexp.MustCompile(`Starting Redis" .*pid=(\d+)`))[1])}
	rows, err := testenv.Pool(t, "postgres://postgres:postgres@127.0.0.1:"+database[1]+"/postgres").
		Query(t.Context(), "SELECT pid FROM pg_stat_activity WHERE datname = 'outbox_db'")
	if err != nil {
		t.Fatal(err)
	}
	for rows.Next() {
		var pid int
		if err := rows.Scan(&pid); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGCONT)
		}
		start(t, env).serving().terminate() // finds the servers, and stops them
	}()
	go p.place("another") // under way, and never answered
	p.terminate()
}

func number(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestThePartsRunInProcessesOfTheirOwn(t *testing.T) {
	t.Parallel()
	_, redisServer := testenv.Redis(t)
	env := []string{"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t), "DATABASE_URL=" + testenv.DatabaseURL(t), "REDIS_ADDR=" + redisServer.Addr()}
	servers := []*program{start(t, env, "server").serving(), start(t, env, "server").serving()}
	workers := []*program{start(t, env, "worker"), start(t, env, "worker")}
	for _, w := range workers {
		w.waitFor(regexp.MustCompile("Outbox worker started"))
	}
	var bodies []string
	for i := range 10 {
		key := fmt.Sprint(i)
		body, _ := servers[i%2].mustPlace(key)
		if again, replayed := servers[(i+1)%2].mustPlace(key); again != body || !replayed {
			t.Errorf("the other server answers %s, replayed %t; want %s", again, replayed, body)
		}
		bodies = append(bodies, body)
	}
	consumer := start(t, env, "consumer") // late
	for _, body := range bodies {
		consumer.waitFor(mailFor(body))
	}
	for _, p := range slices.Concat(servers, workers, []*program{consumer}) {
		p.terminate()
	}
	if n := strings.Count(consumer.said(), "✓ Email sent successfully!"); n != len(bodies) {
		t.Errorf("%d mails were sent; want %d", n, len(bodies))
	}
}

func TestMigrateMovesTheSchema(t *testing.T) {
	t.Parallel()
	env := []string{"DATABASE_URL=" + testenv.DatabaseURL(t), "XDG_DATA_HOME=" + testenv.Dir(t)}
	for _, step := range []struct{ arg, want string }{
		{"status", "applied  00008_retention.sql"}, {"up", "the database is up to date"}, {"down", "down 00008_retention.sql"},
		{"status", "pending  00008_retention.sql"}, {"up", "up   00008_retention.sql"}, {"status", "applied  00008_retention.sql"},
	} {
		out, errs, code := finish(t, env, "migrate", step.arg)
		if code != 0 || !strings.Contains(out, step.want) {
			t.Errorf("migrate %s: %d\n%s%s\nwant %q", step.arg, code, out, errs, step.want)
		}
	}
	finish(t, env, "migrate", "down")
	if _, errs, code := finish(t, append(env, "PORT=0"), "server"); code != 1 || !strings.Contains(errs, "migrate up") {
		t.Errorf("a server on an old schema: %d %s", code, errs)
	}
}

func TestWhatIsWrongIsNamedWithItsRemedy(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { busy.Close() }) // when the parallel cases are done
	_, port, _ := net.SplitHostPort(busy.Addr().String())
	database, home := testenv.DatabaseURL(t), "XDG_DATA_HOME="+testenv.Dir(t)
	for name, test := range map[string]struct {
		env  []string
		args []string
		code int
		says []string
	}{
		"a wrong command":          {args: []string{"serve"}, code: 2, says: []string{"serve", "--help"}},
		"migrate without a way":    {args: []string{"migrate"}, code: 2, says: []string{"up, down or status"}},
		"an argument too many":     {args: []string{"server", "now"}, code: 2, says: []string{"now"}},
		"two wrong variables":      {env: []string{"PORT=x", "LOG_LEVEL=loud"}, code: 1, says: []string{"PORT is \"x\"", "LOG_LEVEL is \"loud\""}},
		"what is not built yet":    {env: []string{"NATS_URL=nats://a"}, code: 1, says: []string{"NATS_URL is not supported"}},
		"no database where it set": {env: []string{"DB_HOST=127.0.0.1", "DB_PORT=1", "PORT=0"}, code: 1, says: []string{"DB_HOST", "127.0.0.1"}},
		"no Redis where it is set": {env: []string{"DATABASE_URL=" + database, "REDIS_ADDR=127.0.0.1:1", "PORT=0"}, code: 1, says: []string{"REDIS_ADDR", "127.0.0.1:1"}},
		"a port in use":            {env: []string{"PORT=" + port}, code: 1, says: []string{"PORT " + port, "set PORT"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := append([]string{home}, test.env...)
			_, errs, code := finish(t, env, test.args...)
			if code != test.code {
				t.Errorf("exit code %d; want %d", code, test.code)
			}
			for _, want := range test.says {
				if !strings.Contains(errs, want) {
					t.Errorf("it does not say %q:\n%s", want, errs)
				}
			}
		})
	}
}

func TestHelpNamesEveryCommandAndVariable(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"help"}, {"server", "--help"}, {"migrate", "-h"}} {
		out, errs, code := finish(t, []string{"PORT=wrong"}, args...)
		if code != 0 || errs != "" {
			t.Errorf("%v: exit code %d, and %s", args, code, errs)
		}
		for _, want := range []string{"server", "worker", "consumer", "migrate up|down|status"} {
			if !strings.Contains(out, want) {
				t.Errorf("%v: %q is missing", args, want)
			}
		}
		for _, v := range config.Variables {
			if !strings.Contains(out, v.Name) {
				t.Errorf("%v: %s is missing", args, v.Name)
			}
		}
	}
}

// finish runs the program to its end.
func finish(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append([]string{beProgram + "=1", "PATH=" + os.Getenv("PATH"), "TMPDIR=" + os.TempDir()}, env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// The README quotes what the program says; what it quotes must still be said.
func TestTheReadmeNamesEveryVariable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range config.Variables {
		if !bytes.Contains(readme, []byte("`"+v.Name+"`")) {
			t.Errorf("README.md does not name %s", v.Name)
		}
	}
}
