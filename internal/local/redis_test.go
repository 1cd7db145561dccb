package local

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

func dialRedis(t *testing.T, addr string) *redis.Client {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: addr, Protocol: 2, DisableIdentity: true})
	t.Cleanup(func() { client.Close() })
	return client
}

func TestRedisKeepsItsDataAndItsPort(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first := startRedis(t, RedisOptions{Dir: dir})
	client := dialRedis(t, first.Addr())
	must(t, client.Set(t.Context(), "kept", "still here", 0).Err())
	for setting, want := range map[string]string{
		"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "bind": "127.0.0.1", "protected-mode": "yes",
	} {
		if got := client.ConfigGet(t.Context(), setting).Val()[setting]; got != want {
			t.Errorf("%s is %q, not %q", setting, got, want)
		}
	}
	stopped(t, first)
	must(t, first.Stop(t.Context()))

	second := startRedis(t, RedisOptions{Dir: dir})
	if got := dialRedis(t, second.Addr()).Get(t.Context(), "kept").Val(); got != "still here" {
		t.Errorf("found %q", got)
	}
	if first.Addr() != second.Addr() {
		t.Errorf("moved from %s to %s", first.Addr(), second.Addr())
	}
	stopped(t, second)
}

func TestUsersOfAFolderShareOneRedis(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first, second := startRedis(t, RedisOptions{Dir: dir}), startRedis(t, RedisOptions{Dir: dir})
	if first.Pid() != second.Pid() {
		t.Errorf("two servers, %d and %d", first.Pid(), second.Pid())
	}
	must(t, first.Stop(t.Context()))
	must(t, dialRedis(t, second.Addr()).Ping(t.Context()).Err())
	stopped(t, second)
}

func TestAKilledRedisComesBackOnItsPort(t *testing.T) {
	t.Parallel()
	port, err := choosePort(0)
	must(t, err)
	o := RedisOptions{Dir: newFolder(t), Port: port, Args: []string{"--appendfsync", "always"}}
	first := startRedis(t, o)
	must(t, dialRedis(t, first.Addr()).Set(t.Context(), "kept", "still here", 0).Err())
	must(t, first.Kill())
	if _, ok := commandLine(first.Pid()); ok {
		t.Error("alive after Kill")
	}
	must(t, first.Stop(t.Context()))

	second := startRedis(t, o)
	if first.Addr() != second.Addr() || second.Addr() != address(port) {
		t.Errorf("asked for port %d, got %s, then %s", port, first.Addr(), second.Addr())
	}
	if got := dialRedis(t, second.Addr()).Get(t.Context(), "kept").Val(); got != "still here" {
		t.Errorf("found %q", got)
	}
	stopped(t, second)
}

func TestARedisWhosePidWasNeverWrittenIsFound(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	first := startRedis(t, RedisOptions{Dir: dir})
	must(t, first.record(0, first.port))
	second := startRedis(t, RedisOptions{Dir: dir})
	if first.Pid() != second.Pid() {
		t.Errorf("two servers on the same data, %d and %d", first.Pid(), second.Pid())
	}
	must(t, first.Stop(t.Context()))
	stopped(t, second)
}

func TestTheRedisOfAnotherFolderIsLeftAlone(t *testing.T) {
	t.Parallel()
	other := startRedis(t, RedisOptions{Dir: newFolder(t)})
	dir := newFolder(t)
	// The record of the last run names what is another server's process and port by now.
	must(t, (&Redis{folder: &folder{path: dir}}).record(other.pid, other.port))
	ours := startRedis(t, RedisOptions{Dir: dir})
	if ours.Pid() == other.Pid() {
		t.Fatal("another folder's server was used")
	}
	stopped(t, ours)

	must(t, ours.record(other.pid, other.port))
	_, err := StartRedis(t.Context(), RedisOptions{Dir: dir, Args: []string{"--no-such-setting", "1"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-setting") {
		t.Errorf("the server's log is not in the error: %v", err)
	}
	must(t, dialRedis(t, other.Addr()).Ping(t.Context()).Err())
	stopped(t, other)
}

func TestARedisPortThatIsTakenIsAnError(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	_, err = StartRedis(t.Context(), RedisOptions{Dir: newFolder(t), Port: l.Addr().(*net.TCPAddr).Port})
	if err == nil || !strings.Contains(err.Error(), "is taken") {
		t.Errorf("got %v", err)
	}
}

func TestARedisThatLosesTheRaceForThePortSaysSo(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	_, err = StartRedis(t.Context(), RedisOptions{
		Dir: newFolder(t), Args: []string{"--port", strconv.Itoa(l.Addr().(*net.TCPAddr).Port)},
	})
	if !errors.Is(err, errLostRace) {
		t.Errorf("got %v", err)
	}
}

func TestARedisStartThatIsCancelledLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := newFolder(t)
	ctx, cancel := context.WithCancel(t.Context())
	log := slog.New(hook(func(r slog.Record) {
		if r.Message == "Starting Redis" {
			cancel()
		}
	}))
	_, err := StartRedis(ctx, RedisOptions{Dir: dir, Log: log})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	last := (&Redis{folder: &folder{path: dir}}).recorded()
	if command, ok := commandLine(last.pid); ok || last.pid == 0 {
		t.Errorf("left behind: %d %s", last.pid, command)
	}
}

func TestMiniredisKeysExpire(t *testing.T) {
	t.Parallel()
	addr, stop, err := StartMiniredis()
	must(t, err)
	defer stop()
	client := dialRedis(t, addr)
	// The key is set by a script, as the program does it.
	must(t, client.Eval(t.Context(), "return redis.call('SET', KEYS[1], 'x', 'PX', 100)", []string{"key"}).Err())
	if got := client.Get(t.Context(), "key").Val(); got != "x" {
		t.Fatalf("set, found %q", got)
	}
	deadline := time.Now().Add(10 * time.Second)
	for client.Eval(t.Context(), "return redis.call('EXISTS', KEYS[1])", []string{"key"}).Val() != int64(0) {
		if time.Now().After(deadline) {
			t.Fatal("the key does not expire")
		}
	}
	stop()
	if conn, err := net.Dial("tcp", addr); err == nil {
		conn.Close()
		t.Error("it answers after stop")
	}
}

func TestFindRedisServer(t *testing.T) {
	path, err := FindRedisServer()
	must(t, err)
	if !filepath.IsAbs(path) {
		t.Errorf("found %s", path)
	}

	old := t.TempDir()
	must(t, os.WriteFile(filepath.Join(old, "redis-server"), []byte("#!/bin/sh\necho 'Redis server v=6.0.16 sha=0'\n"), 0o700))
	t.Setenv("PATH", old)
	if path, _ := FindRedisServer(); strings.HasPrefix(path, old) {
		t.Errorf("took one that is too old")
	}
}
