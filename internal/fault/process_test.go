package fault_test

import (
	"bufio"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is the program, built with -tags=faults for this run.
var program struct {
	once sync.Once
	dir  string // removed by TestMain: it outlives the test that builds
	path string
	err  error
}

// build returns the path of the program with its faults.
func build(t *testing.T) string {
	t.Helper()
	program.once.Do(func() {
		if program.dir, program.err = os.MkdirTemp("", "idempotent-orders-test-"); program.err != nil {
			return
		}
		program.path = filepath.Join(program.dir, "idempotent-orders")
		output, err := exec.CommandContext(t.Context(), "go", "build", "-tags=faults", "-o", program.path, "idempotent-orders").CombinedOutput()
		if err != nil {
			program.err = errors.New(err.Error() + ": " + string(output))
		}
	})
	if program.err != nil {
		t.Fatal(program.err)
	}
	return program.path
}

// process is a process of the program.
type process struct {
	t    testing.TB
	part string // "server", "worker", "consumer", or empty for everything
	cmd  *exec.Cmd
	dead chan struct{} // closed when it is dead, and everything it said is read

	mu      sync.Mutex
	lines   []string
	url     string
	serving chan struct{} // closed when it serves
}

var serves = regexp.MustCompile(`Server starting on port (\d+)`)

// start starts a process.
func start(t testing.TB, env []string, part string) *process {
	t.Helper()
	p := &process{t: t, part: part, cmd: exec.Command(program.path), dead: make(chan struct{}), serving: make(chan struct{})}
	if part != "" {
		p.cmd.Args = append(p.cmd.Args, part)
	}
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir(), "PORT=0"}, env...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.listen(stderr)
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.dead
		if t.Failed() {
			t.Logf("%q said:\n%s", part, p.said())
		}
	})
	return p
}

func (p *process) listen(stderr io.Reader) {
	defer close(p.dead)
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		p.mu.Lock()
		p.lines = append(p.lines, lines.Text())
		if port := serves.FindStringSubmatch(lines.Text()); port != nil {
			p.url = "http://127.0.0.1:" + port[1]
			close(p.serving)
		}
		p.mu.Unlock()
	}
	_ = p.cmd.Wait()
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// ready waits until a server serves, or until it is dead.
func (p *process) ready() *process {
	p.t.Helper()
	select {
	case <-p.serving:
	case <-p.dead:
	case <-time.After(patience):
		p.t.Fatalf("%q does not serve", p.part)
	}
	return p
}

// stop has the process end as an operator does, and checks that it ends well.
func (p *process) stop() {
	p.t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.dead:
	case <-time.After(patience):
		p.t.Fatalf("%q does not stop", p.part)
	}
	if status := p.cmd.ProcessState; !status.Success() {
		p.t.Errorf("%q ended with %s", p.part, status)
	}
}

// died waits until the process has died at the point, and of nothing else.
func (p *process) died(at string) {
	p.t.Helper()
	select {
	case <-p.dead:
	case <-time.After(patience):
		p.t.Fatalf("%q never came to %s", p.part, at)
	}
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL {
		p.t.Fatalf("%q ended with %s; want SIGKILL", p.part, p.cmd.ProcessState)
	}
	if !strings.Contains(p.said(), "CRASH_AT "+at) {
		p.t.Fatalf("%q was killed, and not at %s", p.part, at)
	}
}

// alive tells whether the process is.
func (p *process) alive() bool {
	select {
	case <-p.dead:
		return false
	default:
		return true
	}
}

var mailed = regexp.MustCompile(`\[EMAIL\] Sending confirmation email for Order ([0-9a-f-]{36})`)

// mails returns how often the process has mailed each order.
func (p *process) mails() map[string]int {
	mails := map[string]int{}
	for _, match := range mailed.FindAllStringSubmatch(p.said(), -1) {
		mails[match[1]]++
	}
	return mails
}

// answer is what a send was answered.
type answer struct {
	status   int
	body     string
	expires  string
	location string
	replayed bool
}

var client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// place sends an order; an error means that there is no answer.
func (p *process) place(key, body string) (answer, error) {
	r, err := http.NewRequest(http.MethodPost, p.url+"/orders", strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	r.Header.Set("Prefer", "wait=10")
	w, err := client.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer w.Body.Close()
	text, err := io.ReadAll(w.Body)
	return answer{
		w.StatusCode, string(text), w.Header.Get("Idempotency-Expires"), w.Header.Get("Location"),
		w.Header.Get("Idempotency-Replayed") == "true",
	}, err
}

// run runs a command of the program to its end and returns what it said.
func run(t testing.TB, env []string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program.path, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir()}, env...)
	output, err := cmd.CombinedOutput()
	return string(output), err
}
