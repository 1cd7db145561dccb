package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// Redis is a running redis-server in a private folder, in use until Stop or Kill.
type Redis struct {
	folder *folder
	data   string
	pid    int
	port   int
}

// RedisOptions says where and how to start Redis.
type RedisOptions struct {
	// Dir is the folder that holds everything of this server: its append-only file in redis, its log in redis.log, its
	// process id and port in redis.pid, its locks. It is created if it does not exist.
	Dir string
	// Port 0 means the port of the last time if it is free, else any that is. Another number is that port or an error,
	// except that a server which is running in the folder already keeps its own.
	Port int
	// Args are further arguments for redis-server. They count for a server that is started, not for one that is running.
	Args []string
	// Log hears what was chosen, and of steps that take long. Nil is silent.
	Log *slog.Logger
}

// FindRedisServer returns the redis-server on the PATH or in the places where Debian and Homebrew put it. It has to be
// version 6.2 or later: older ones lack commands that the program uses.
func FindRedisServer() (path string, err error) {
	candidates := []string{"redis-server", "/usr/bin/redis-server", "/usr/local/bin/redis-server",
		"/opt/homebrew/bin/redis-server", "/opt/homebrew/opt/redis/bin/redis-server", "/usr/local/opt/redis/bin/redis-server"}
	err = errors.New("no redis-server found: install Redis, or set REDIS_ADDR")
	for _, candidate := range candidates {
		path, lookErr := exec.LookPath(candidate)
		if lookErr != nil {
			continue
		}
		if major, minor, ok := redisVersion(path); ok && (major > 6 || major == 6 && minor >= 2) {
			return path, nil
		}
		err = fmt.Errorf("%s is older than Redis 6.2 or does not run: install a newer one, or set REDIS_ADDR", path)
	}
	return "", err
}

var redisVersionPattern = regexp.MustCompile(`v=(\d+)\.(\d+)`)

func redisVersion(path string) (major, minor int, ok bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	text, err := exec.CommandContext(ctx, path, "--version").Output()
	version := redisVersionPattern.FindSubmatch(text)
	if err != nil || version == nil {
		return 0, 0, false
	}
	major, _ = strconv.Atoi(string(version[1]))
	minor, _ = strconv.Atoi(string(version[2]))
	return major, minor, true
}

// StartRedis returns the server of the folder: the one that runs there already, else a new one. It listens on 127.0.0.1,
// keeps an append-only file that is synced once a second, never evicts, and answers when StartRedis returns. When ctx ends
// before that, nothing is left running.
func StartRedis(ctx context.Context, o RedisOptions) (*Redis, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	folder, err := openFolder(ctx, o.Dir, "redis", o.Log)
	if err != nil {
		return nil, fmt.Errorf("start Redis: %w", err)
	}
	defer folder.ready()

	r := &Redis{folder: folder, data: filepath.Join(folder.path, "redis")}
	if err := r.start(ctx, o); err != nil {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return nil, fmt.Errorf("start Redis: %w", errors.Join(err, r.Stop(cleanup)))
	}
	return r, nil
}

// Addr returns the server's address, 127.0.0.1:port.
func (r *Redis) Addr() string { return address(r.port) }

// Pid returns the process id of the server.
func (r *Redis) Pid() int { return r.pid }

// Stop ends the use of the server. The last user of the folder shuts it down, and it writes everything before it ends;
// others leave it running. Stopping again does nothing.
func (r *Redis) Stop(ctx context.Context) error {
	err := r.folder.leave(func() error {
		recorded := r.recorded()
		if !r.verified(ctx, recorded) {
			return nil
		}
		r.folder.log.Debug("Stopping Redis", "pid", recorded.pid)
		return end(ctx, recorded.pid, recorded.alive, syscall.SIGTERM, nil)
	})
	if err != nil {
		return fmt.Errorf("stop Redis: %w", err)
	}
	return nil
}

// Kill ends the server with SIGKILL, whoever else uses it, waits until it is gone, and ends our use of the folder. It is
// meant for tests: up to a second of writes is lost.
func (r *Redis) Kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := end(ctx, r.pid, redisRecord{r.pid, r.port}.alive, syscall.SIGKILL, nil); err != nil {
		return fmt.Errorf("kill Redis: %w", err)
	}
	return r.Stop(ctx)
}

// start finds a running server or starts one, and repeats that when it loses a race for the port.
func (r *Redis) start(ctx context.Context, o RedisOptions) error {
	for attempt := 1; ; attempt++ {
		found, err := r.adopt(ctx)
		if found || err != nil {
			return err
		}
		err = r.launch(ctx, o)
		if !errors.Is(err, errLostRace) || attempt == maxStarts {
			return err
		}
		r.folder.log.Debug("Starting Redis again", "because", err)
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// adopt uses the server that runs on our data already, if there is one. Redis does not protect its files from a second
// server, so this must not overlook one: not one that is busy, and not one whose starter died before it wrote down the pid.
func (r *Redis) adopt(ctx context.Context) (bool, error) {
	recorded := r.recorded()
	if recorded.port == 0 {
		return false, nil
	}
	err := r.await(ctx, recorded.port, 0, recorded.alive)
	switch {
	case errors.Is(err, errGone), errors.Is(err, errOtherServer):
		return false, nil
	case err != nil:
		return false, err
	}
	r.folder.log.Info("Using the Redis that is running already", "folder", r.folder.path, "port", r.port, "pid", r.pid)
	return true, r.record(r.pid, r.port)
}

// launch starts a server and waits until it answers; if it does not, it ends it.
func (r *Redis) launch(ctx context.Context, o RedisOptions) error {
	program, err := FindRedisServer()
	if err != nil {
		return err
	}
	_, owner, err := r.folder.dataFolder("redis")
	if err != nil && !errors.Is(err, errNoAccount) { // unlike PostgreSQL, Redis does run as root
		return err
	}
	if err := os.MkdirAll(r.data, 0o700); err != nil {
		return err
	}
	if err := owner.owns(r.data); err != nil {
		return err
	}

	port := o.Port
	if port == 0 {
		if port, err = choosePort(r.recorded().port); err != nil {
			return err
		}
	} else if !portIsFree(port) {
		return fmt.Errorf("%w: port %d is taken", errLostRace, port)
	}
	if err := r.record(0, port); err != nil { // the port first: by it adopt finds a server whose pid was never written
		return err
	}
	args := append([]string{"--dir", r.data, "--port", strconv.Itoa(port), "--bind", "127.0.0.1", "--protected-mode", "yes",
		"--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction"}, o.Args...)
	cmd := exec.Command(program, args...) // #nosec G204 -- the redis-server that was found, without a shell
	cmd.Dir = r.data
	server, err := r.folder.startChild(cmd, owner, "redis.log")
	if err != nil {
		return err
	}
	r.folder.log.Info("Starting Redis", "program", program, "folder", r.folder.path, "port", port, "pid", server.pid)

	if err = r.record(server.pid, port); err == nil {
		err = r.await(ctx, port, server.pid, server.running)
	}
	if err == nil {
		return nil
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	stopErr := end(cleanup, server.pid, server.running, syscall.SIGTERM, syscall.SIGKILL)
	said := server.said()
	if errors.Is(err, errGone) && containsAny(said, "Address already in use", "Failed listening on port") {
		err = errLostRace
	}
	return fmt.Errorf("%w; its log ends:\n%s", errors.Join(err, stopErr), said)
}

// await waits until the server on the port has loaded its data and says that it is the one on our folder, with that pid if
// pid is not 0. While running says that the server lives, silence means that it is busy.
func (r *Redis) await(ctx context.Context, port, pid int, running func() bool) error {
	defer sayLater(r.folder.log, "Waiting for Redis to become ready; it may be loading its data", "folder", r.folder.path)()
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("Redis was not ready after %s", startTimeout))
	defer cancel()

	for {
		alive := running() // asked first: what ends during the question is noticed in the next round
		seen, err := identify(ctx, port)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && !alive:
			return errGone
		case err == nil && seen.dir != r.data, err == nil && pid != 0 && seen.pid != pid:
			if pid == 0 {
				return fmt.Errorf("%w: %s", errOtherServer, seen.dir)
			}
			// Our child has lost the port and is about to end.
		case err == nil && !seen.loading:
			r.pid, r.port = seen.pid, port
			return nil
		}
		if pid != 0 && !alive {
			return errGone
		}
		if pause(ctx) != nil {
			return context.Cause(ctx)
		}
	}
}

// verified reports whether the recorded process is the server of our folder: we have seen it before, or it says so now.
func (r *Redis) verified(ctx context.Context, recorded redisRecord) bool {
	if recorded.pid == r.pid {
		return true
	}
	seen, err := identify(ctx, recorded.port)
	return err == nil && seen.dir == r.data && seen.pid == recorded.pid
}

// identity is what a Redis server says of itself.
type identity struct {
	dir     string
	pid     int
	loading bool
}

var infoLine = regexp.MustCompile(`(?m)^(process_id|loading):(\d+)`)

// identify asks the server on the port, once, and does not wait long.
func identify(ctx context.Context, port int) (identity, error) {
	probe, err := net.DialTimeout("tcp4", address(port), time.Second) // the client would log every refusal
	if err != nil {
		return identity{}, err
	}
	_ = probe.Close()
	client := redis.NewClient(&redis.Options{
		Addr: address(port), Protocol: 2, DisableIdentity: true, MaxRetries: -1,
		DialTimeout: time.Second, DialerRetries: 1, ReadTimeout: time.Second, ContextTimeoutEnabled: true,
	})
	defer client.Close()
	config, err := client.ConfigGet(ctx, "dir").Result()
	if err != nil {
		return identity{}, err
	}
	info, err := client.Info(ctx).Result()
	if err != nil {
		return identity{}, err
	}
	seen := identity{dir: config["dir"]}
	for _, line := range infoLine.FindAllStringSubmatch(info, -1) {
		value, _ := strconv.Atoi(line[2])
		switch line[1] {
		case "process_id":
			seen.pid = value
		case "loading":
			seen.loading = value != 0
		}
	}
	return seen, nil
}

// redisRecord is what redis.pid remembers of the last server: its port, and its pid or 0.
type redisRecord struct{ pid, port int }

// alive reports whether the process runs and is, by its command line, a Redis on that port. Redis replaces the command line
// that it was started with by one that names little more than the port.
func (r redisRecord) alive() bool {
	command, ok := commandLine(r.pid)
	port := strconv.Itoa(r.port)
	return ok && strings.Contains(command, "redis-server") && containsAny(command+" ", ":"+port+" ", " --port "+port+" ")
}

func (r *Redis) recorded() (last redisRecord) {
	content, _ := os.ReadFile(filepath.Join(r.folder.path, "redis.pid"))
	_, _ = fmt.Sscan(string(content), &last.pid, &last.port)
	return last
}

func (r *Redis) record(pid, port int) error {
	return writeFile(filepath.Join(r.folder.path, "redis.pid"), fmt.Sprintln(pid, port))
}
