package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"idempotent-orders/internal/testbed"
)

// guardArg makes the program the guard of another run of itself.
const guardArg = "guard-of-a-storm"

// guard is a process that kills what the storm started and removes its folder when the storm ends without doing so: by a
// panic, in whatever goroutine, or by SIGKILL. It learns of the end when its standard input does.
type guard struct {
	mu  sync.Mutex
	out io.WriteCloser
	cmd *exec.Cmd
}

func startGuard(dir string) (*guard, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, guardArg, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is the storm's business
	out, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	return &guard{out: out, cmd: cmd}, nil
}

// watch has the process killed, and its children, should the storm end; forget no longer.
func (g *guard) watch(pid int)  { g.say("+" + strconv.Itoa(pid)) }
func (g *guard) forget(pid int) { g.say("-" + strconv.Itoa(pid)) }

func (g *guard) say(text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, _ = io.WriteString(g.out, text+"\n")
}

// dismiss ends the guard after everything was cleared away.
func (g *guard) dismiss() {
	g.say("done")
	_ = g.out.Close()
	_ = g.cmd.Wait()
}

// standGuard is the guard's life.
func standGuard(dir string, in io.Reader) {
	watched := map[int]bool{}
	for lines := bufio.NewScanner(in); lines.Scan(); {
		text := lines.Text()
		if text == "done" {
			return
		}
		pid, err := strconv.Atoi(strings.TrimLeft(text, "+-"))
		if err != nil {
			continue
		}
		if watched[pid] = true; text[0] == '-' {
			delete(watched, pid)
		}
	}
	for pid := range watched {
		for child := range testbed.Children(pid) {
			_ = syscall.Kill(child, syscall.SIGKILL)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = os.RemoveAll(dir) // #nosec G703 -- the folder that the storm made, and named to its guard
}
