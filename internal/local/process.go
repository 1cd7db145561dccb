package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

const (
	pollInterval = 20 * time.Millisecond
	startTimeout = 60 * time.Second // for a server to answer, recovery included
	stopTimeout  = 10 * time.Second // for a server that we stop because its start failed
	maxStarts    = 20               // a start that lost a race is repeated
)

var (
	// errGone: the process that we waited for has ended.
	errGone = errors.New("the server has ended")
	// errLostRace: the start failed for a reason that passes.
	errLostRace = errors.New("another process was faster")
)

// child is a server that this process started.
type child struct {
	pid    int
	exited chan struct{} // closed when the process has ended and was reaped
	output string        // its log
	from   int64         // where in the log this run begins
}

// startChild starts a server in a process group of its own, so that Ctrl-C in the terminal is heard by us alone. As root
// it runs as owner. It writes to the log of that name.
func (f *folder) startChild(cmd *exec.Cmd, owner *account, logName string) (*child, error) {
	log, size, err := f.openLog(logName)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	owner.runs(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{pid: cmd.Process.Pid, exited: make(chan struct{}), output: log.Name(), from: size}
	go func() {
		defer close(c.exited)
		_ = cmd.Wait() // what it has to say is in its log
	}()
	return c, nil
}

func (c *child) running() bool {
	select {
	case <-c.exited:
		return false
	default:
		return true
	}
}

// said returns the end of what the child wrote to its log in this run.
func (c *child) said() string {
	file, err := os.Open(c.output)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	text, err := io.ReadAll(io.NewSectionReader(file, c.from, 1<<20))
	if err != nil {
		return err.Error()
	}
	return tail(string(text))
}

// tail returns the last lines of a text.
func tail(text string) string {
	const most = 20
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-most):], "\n")
}

// end signals the process, if it is alive, and waits until it has ended or ctx has. Shortly before ctx ends it sends the
// hard signal, if there is one. To be alive means to be the server that we mean, too, and not a stranger with its number.
func end(ctx context.Context, pid int, alive func() bool, gentle, hard os.Signal) error {
	process, err := os.FindProcess(pid) // before the look: where the kernel can, this pins the process, not the number
	if err != nil {
		return nil
	}
	defer process.Release()
	if !alive() {
		return nil
	}
	if err := process.Signal(gentle); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		return fmt.Errorf("signal process %d: %w", pid, err)
	}

	var almost <-chan time.Time
	if deadline, ok := ctx.Deadline(); ok && hard != nil {
		left := time.Until(deadline)
		almost = time.After(left - min(2*time.Second, left/4))
	}
	poll := time.NewTicker(pollInterval)
	defer poll.Stop()
	for alive() {
		select {
		case <-poll.C:
		case <-almost:
			_ = process.Signal(hard)
			almost = nil
		case <-ctx.Done():
			if hard != nil {
				_ = process.Signal(hard)
			}
			return fmt.Errorf("process %d is still ending: %w", pid, ctx.Err())
		}
	}
	return nil
}

// pause waits between two looks; it returns ctx's error when ctx has ended.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pollInterval):
		return nil
	}
}

// choosePort returns the preferred port if it is free, else any free one. Between the choice and the server's start it may
// be taken; then the start fails and is repeated.
func choosePort(preferred int) (int, error) {
	if preferred != 0 && portIsFree(preferred) {
		return preferred, nil
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

func portIsFree(port int) bool {
	l, err := net.Listen("tcp4", address(port))
	return err == nil && l.Close() == nil
}

func address(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }

// containsAny reports whether one of the phrases is in the text.
func containsAny(text string, phrases ...string) bool {
	for _, phrase := range phrases {
		if strings.Contains(text, phrase) {
			return true
		}
	}
	return false
}
