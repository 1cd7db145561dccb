// Package testbed is what bench and storm set up before they begin, and what they ask the system about processes.
package testbed

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"idempotent-orders/internal/local"
)

// Folder makes a temporary folder, which PostgreSQL may enter though it may have to run as somebody else.
func Folder(name string) (string, error) {
	if _, err := local.FindRedisServer(); err != nil {
		return "", errors.New("no redis-server 6.2 or newer found: install it (apt-get install redis-server, brew install redis)")
	}
	dir, err := os.MkdirTemp("", "idempotent-orders-"+name+"-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755) // #nosec G302 -- a folder
}

// Build builds the program in a folder, with flags for go build, and returns where it is. It finds the project from anywhere in it.
func Build(ctx context.Context, dir string, flags ...string) (program string, err error) {
	output, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	root := strings.TrimSpace(string(output))
	if err != nil || root == "" {
		return "", errors.New("the project is not here; run this in its root")
	}
	program = filepath.Join(dir, "program")
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-C", root, "-buildvcs=false", "-o", program}, append(flags, ".")...)...)
	cmd.Stderr = os.Stderr // where the compiler says what is wrong
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build the program: %w", err)
	}
	return program, nil
}

// Env is an environment with these variables and without the caller's, DB_HOST or GOGC.
func Env(variables ...string) []string {
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "SYSTEMROOT"} {
		if value, ok := os.LookupEnv(name); ok {
			variables = append(variables, name+"="+value)
		}
	}
	return variables
}

// Stat is a part of /proc/<pid>/stat.
type Stat struct {
	Parent               int
	Ticks, EndedChildren int64 // processor time, user and system
}

// ReadStat returns nothing where the system does not tell.
func ReadStat(pid int) (Stat, bool) {
	if runtime.GOOS != "linux" {
		return Stat{}, false
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Stat{}, false
	}
	return parseStat(string(text))
}

func parseStat(text string) (s Stat, ok bool) {
	end := strings.LastIndexByte(text, ')') // the name, in parentheses, may hold anything
	fields := strings.Fields(text[end+1:])
	if end < 0 || len(fields) < 15 {
		return s, false
	}
	var numbers [15]int64
	for i, field := range fields[:15] {
		numbers[i], _ = strconv.ParseInt(field, 10, 64) // the state is a letter
	}
	return Stat{Parent: int(numbers[1]), Ticks: numbers[11] + numbers[12], EndedChildren: numbers[13] + numbers[14]}, true
}

// Children returns the living children of a process, by their ids.
func Children(pid int) map[int]Stat {
	children := map[int]Stat{}
	paths, _ := filepath.Glob("/proc/[0-9]*")
	for _, path := range paths {
		child, _ := strconv.Atoi(filepath.Base(path))
		if s, ok := ReadStat(child); ok && s.Parent == pid {
			children[child] = s
		}
	}
	return children
}
