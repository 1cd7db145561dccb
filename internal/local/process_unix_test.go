//go:build unix

package local

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"
)

func TestStopIsBoundedAndCanBeRepeated(t *testing.T) {
	t.Parallel()
	p := startPostgreSQL(t, newFolder(t))
	postmaster, err := os.FindProcess(p.Pid())
	must(t, err)
	must(t, postmaster.Signal(syscall.SIGSTOP))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	must(t, postmaster.Signal(syscall.SIGCONT))
	stopped(t, p)
}
