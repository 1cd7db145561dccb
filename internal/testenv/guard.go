package testenv

import (
	"fmt"
	"io"
	"os/exec"
	"strconv"
	"sync"
)

// guard starts a shell that kills a server and removes its folder when this process ends without having done so: by a panic in some
// goroutine, as after -timeout, or by SIGKILL. It learns of the end when its standard input does, and is dismissed by a line.
// PostgreSQL's other processes end when they see that their postmaster has; the folder waits for that.
func guard(pid int, dir string) (dismiss func(), err error) {
	const script = `trap '' HUP INT TERM; read -r line || { kill -KILL "$0"; sleep 1; rm -rf "$1"; }`
	cmd := exec.Command("sh", "-c", script, strconv.Itoa(pid), dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the guard of a test's server: %w", err)
	}
	return sync.OnceFunc(func() {
		_, _ = io.WriteString(in, "\n")
		_ = cmd.Wait()
	}), nil
}
