package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// process is a part of the program, started again whenever it ends until it is to stop.
type process struct {
	name    string
	program string
	args    []string
	env     []string
	log     string // the file that has what all its runs said
	guard   *guard

	mu       sync.Mutex
	cmd      *exec.Cmd
	exited   chan struct{} // closed when the run of cmd has ended
	killed   bool          // this run was killed by the storm, which starts the next
	stopping bool
	exits    []string // runs that ended though nobody had killed them
}

// startAgainAfter is how long the supervisor waits before it starts a process again that ended by itself.
const startAgainAfter = 200 * time.Millisecond

func (p *process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.startLocked()
}

func (p *process) startLocked() error {
	if p.stopping {
		return nil
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd, exited := exec.Command(p.program, p.args...), make(chan struct{})
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is the storm's business
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.guard.watch(cmd.Process.Pid)
	p.cmd, p.exited, p.killed = cmd, exited, false
	go p.await(cmd, exited)
	return nil
}

// await waits for the end of a run, and starts the next if nobody had the end in hand.
func (p *process) await(cmd *exec.Cmd, exited chan struct{}) {
	_ = cmd.Wait()
	p.guard.forget(cmd.Process.Pid)
	p.mu.Lock()
	defer p.mu.Unlock()
	close(exited)
	if p.killed || p.stopping {
		return
	}
	p.exits = append(p.exits, cmd.ProcessState.String())
	time.AfterFunc(startAgainAfter, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.cmd == cmd {
			_ = p.startLocked()
		}
	})
}

// kill kills the run there is; the next is started by start.
func (p *process) kill() {
	p.mu.Lock()
	p.killed = true
	cmd, exited := p.cmd, p.exited
	p.mu.Unlock()
	_ = cmd.Process.Kill()
	<-exited
}

func (p *process) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.cmd.Process.Signal(s)
}

// stop ends the process for good: with SIGTERM, and with SIGKILL when that takes longer than the program promises.
func (p *process) stop(patience time.Duration) (clean bool) {
	p.mu.Lock()
	p.stopping = true
	cmd, exited := p.cmd, p.exited
	p.mu.Unlock()
	if cmd == nil {
		return true
	}
	_ = cmd.Process.Signal(syscall.SIGCONT)
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-exited:
		return true
	case <-time.After(patience):
		_ = cmd.Process.Kill()
		<-exited
		return false
	}
}

// cries returns what no run of the program may ever say.
func (p *process) cries() (cries []string) {
	said, _ := os.ReadFile(p.log)
	for _, cry := range []string{"panic:", "fatal error:", "WARNING: DATA RACE", "msg=\"An answer was cut off\"", "panicked"} {
		if n := bytes.Count(said, []byte(cry)); n > 0 {
			at := bytes.Index(said, []byte(cry))
			cries = append(cries, fmt.Sprintf("%s said %q %d times, first: %s", p.name, cry, n,
				oneLine(string(said[at:min(len(said), at+600)]))))
		}
	}
	return cries
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
