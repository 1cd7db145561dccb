package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// PostgreSQL is a running server in a private folder, in use until Stop.
type PostgreSQL struct {
	folder *folder
	pid    int
	port   int
}

// PostgreSQLOptions says where and how to start PostgreSQL.
type PostgreSQLOptions struct {
	// Dir is the folder that holds everything of this server: its data in postgres-<major>, its log in postgres.log, its
	// port, its locks and, if need be, its programs in binaries. It is created if it does not exist.
	Dir string
	// Settings are given to the server as -c name=value; with fsync=off, the data folder is not synced when it is created
	// either. They count for a server that is started, not for one that is running already.
	Settings map[string]string
	// Log hears what was chosen, and of steps that take long. Nil is silent.
	Log *slog.Logger
}

// StartPostgreSQL returns the server of the folder: the one that runs there already, else a new one. It listens on
// 127.0.0.1, on the same port as the last time if that is free, and answers when StartPostgreSQL returns. When ctx ends
// before that, nothing is left running.
//
// The programs are the newest found on the machine, of version 14 or later, where a version that wrote the data here comes
// before a newer one. When there are none they are downloaded.
func StartPostgreSQL(ctx context.Context, o PostgreSQLOptions) (*PostgreSQL, error) {
	if err := supported(); err != nil {
		return nil, err
	}
	folder, err := openFolder(ctx, o.Dir, "postgres", o.Log)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	defer folder.ready()

	p := &PostgreSQL{folder: folder}
	if err := p.start(ctx, o.Settings); err != nil {
		// Others may be using the server that we could not; only if nobody is, it ends with us.
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return nil, fmt.Errorf("start PostgreSQL: %w", errors.Join(err, p.Stop(cleanup)))
	}
	return p, nil
}

// URL returns the address of a database on the server, with user and password. It does not create the database.
func (p *PostgreSQL) URL(database string) string { return postgresURL(p.port, database) }

func postgresURL(port int, database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword("postgres", "postgres"), Host: address(port),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Pid returns the process id of the server.
func (p *PostgreSQL) Pid() int { return p.pid }

// Stop ends the use of the server. The last user of the folder shuts it down: open transactions are rolled back, clients
// disconnected, everything is written; shortly before ctx ends it is told to quit at once, which the next start makes good
// by recovery. Others leave it running. Stopping again does nothing.
func (p *PostgreSQL) Stop(ctx context.Context) error {
	err := p.folder.leave(func() error {
		running, ok := runningPostmaster(p.folder.path)
		if !ok {
			return nil
		}
		p.folder.log.Debug("Stopping PostgreSQL", "pid", running.pid)
		return end(ctx, running.pid, running.alive, syscall.SIGINT, syscall.SIGQUIT)
	})
	if err != nil {
		return fmt.Errorf("stop PostgreSQL: %w", err)
	}
	return nil
}

// start finds a running server or starts one. Both may have to be repeated: the server that was found may be shutting
// down, and a port or the data may be taken between the look and the start.
func (p *PostgreSQL) start(ctx context.Context, settings map[string]string) error {
	var programs installation
	for attempt := 1; ; attempt++ {
		if found, ok := runningPostmaster(p.folder.path); ok {
			err := p.await(ctx, found.dataDir, found.pid, found.alive)
			if err == nil {
				p.folder.log.Info("Using the PostgreSQL that is running already", "folder", p.folder.path, "port", p.port, "pid", p.pid)
			}
			if !errors.Is(err, errGone) || attempt == maxStarts {
				return err
			}
			continue
		}
		if programs.bin == "" {
			var err error
			if programs, err = p.folder.installedOrDownloaded(ctx, dataMajors(p.folder.path)); err != nil {
				return err
			}
		}
		err := p.launch(ctx, programs, settings)
		if !errors.Is(err, errLostRace) || attempt == maxStarts {
			return err
		}
		p.folder.log.Debug("Starting PostgreSQL again", "because", err)
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// launch starts a server and waits until it answers; if it does not, it ends it.
func (p *PostgreSQL) launch(ctx context.Context, programs installation, settings map[string]string) error {
	data, owner, err := p.folder.dataFolder(dataName(programs.major))
	if err != nil {
		return err
	}
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		if err := p.initialise(ctx, programs, data, owner, settings["fsync"] == "off"); err != nil {
			return err
		}
	}
	if err := p.removeStale(data); err != nil {
		return err
	}

	portFile := filepath.Join(p.folder.path, "postgres.port")
	last, _ := os.ReadFile(portFile) // #nosec G304 -- a name we give, in our folder
	preferred, _ := strconv.Atoi(strings.TrimSpace(string(last)))
	port, err := choosePort(preferred)
	if err != nil {
		return err
	}
	if err := writeFile(portFile, strconv.Itoa(port)+"\n"); err != nil {
		return err
	}

	args := []string{"-D", data, "-p", strconv.Itoa(port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="}
	for name, value := range settings {
		args = append(args, "-c", name+"="+value)
	}
	cmd := exec.Command(filepath.Join(programs.bin, "postgres"), args...) // #nosec G204 -- an installation that was found or downloaded, without a shell
	cmd.Dir = data
	server, err := p.folder.startChild(cmd, owner, "postgres.log")
	if err != nil {
		return err
	}
	p.folder.log.Info("Starting PostgreSQL", "version", programs, "folder", p.folder.path, "port", port, "pid", server.pid)

	err = p.await(ctx, data, server.pid, server.running)
	if err == nil {
		return nil
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	stopErr := end(cleanup, server.pid, server.running, syscall.SIGINT, syscall.SIGQUIT)
	said := server.said()
	if errors.Is(err, errGone) && containsAny(said, "could not bind", "could not create any TCP/IP sockets",
		"already exists", "is still in use") {
		err = errLostRace
	}
	return fmt.Errorf("%w; its log ends:\n%s", errors.Join(err, stopErr), said)
}

// initialise makes the data folder. It gets its name when it is complete.
func (p *PostgreSQL) initialise(ctx context.Context, programs installation, data string, owner *account, unsafe bool) error {
	p.folder.log.Info("Creating a database folder", "version", programs, "folder", data)
	defer sayLater(p.folder.log, "Still creating the database folder", "folder", data)()

	partial, err := newSibling(data)
	if err != nil {
		return err
	}
	defer os.RemoveAll(partial)
	password := filepath.Join(partial, "password")
	if err := os.WriteFile(password, []byte("postgres\n"), 0o600); err != nil {
		return err
	}
	if err := owner.owns(partial); err != nil {
		return err
	}

	made := filepath.Join(partial, "data")
	args := []string{"-D", made, "--username=postgres", "--pwfile=" + password, "--auth=scram-sha-256",
		"--encoding=UTF8", "--no-locale", "--data-checksums", "--no-instructions"}
	if unsafe {
		args = append(args, "--no-sync")
	}
	cmd := exec.CommandContext(ctx, filepath.Join(programs.bin, "initdb"), args...) // #nosec G204 -- as for postgres
	cmd.Dir = partial
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.WaitDelay = stopTimeout
	owner.runs(cmd)
	output, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("initdb: %w:\n%s", err, tail(string(output)))
	}
	return os.Rename(made, data)
}

// removeStale removes a postmaster.pid whose number belongs to a process that is not our server; PostgreSQL would take
// that process for another server and refuse to start. A number that belongs to nobody it handles itself. Should a part of
// the old server still be alive, it notices that by the shared memory.
func (p *PostgreSQL) removeStale(data string) error {
	m, err := readPostmaster(data)
	if errors.Is(err, os.ErrNotExist) || err == nil && (m.alive() || !exists(m.pid)) {
		return nil
	}
	p.folder.log.Info("Removing a postmaster.pid that an earlier server left behind", "folder", data, "pid", m.pid)
	if err := os.Remove(filepath.Join(data, "postmaster.pid")); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// await waits until the server with that pid, alive as long as running says so, has opened its port and lets us in.
func (p *PostgreSQL) await(ctx context.Context, data string, pid int, running func() bool) error {
	defer sayLater(p.folder.log, "Waiting for PostgreSQL to become ready; it may be recovering", "folder", data, "pid", pid)()
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("PostgreSQL was not ready after %s", startTimeout))
	defer cancel()

	var last error
	for {
		if !running() {
			return errGone
		}
		if m, err := readPostmaster(data); err == nil && m.pid == pid && m.ready {
			if last = login(ctx, m.port, data); last == nil {
				p.pid, p.port = pid, m.port
				return nil
			}
			if refused(last) {
				return last
			}
		}
		if pause(ctx) != nil {
			return errors.Join(context.Cause(ctx), last)
		}
	}
}

// errOtherServer: something else answers on the port that our server claims to have.
var errOtherServer = errors.New("the port is answered by a server with other data")

// refused reports whether trying again is useless: the server is ready and does not want us.
func refused(err error) bool {
	var answer *pgconn.PgError
	return errors.Is(err, errOtherServer) ||
		errors.As(err, &answer) && strings.HasPrefix(answer.Code, "28") // invalid authorization
}

// login logs in and makes sure that this is the server of the data folder.
func login(ctx context.Context, port int, data string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, postgresURL(port, "postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var folder string
	if err := conn.QueryRow(ctx, "SHOW data_directory").Scan(&folder); err != nil {
		return err
	}
	if folder != data {
		return fmt.Errorf("%w: %s", errOtherServer, folder)
	}
	return nil
}

// postmaster is what a server says of itself in postmaster.pid, which it leaves behind when it is killed.
type postmaster struct {
	dataDir   string
	pid, port int
	ready     bool
}

// alive reports whether the process runs and is the server of the data folder, which its command line names.
func (m postmaster) alive() bool {
	command, ok := commandLine(m.pid)
	return ok && strings.Contains(command+" ", " -D "+m.dataDir+" ")
}

// readPostmaster reads postmaster.pid: the lines are pid, data folder, start time, port, socket folder, address, shared
// memory and state.
func readPostmaster(data string) (postmaster, error) {
	m := postmaster{dataDir: data}
	content, err := os.ReadFile(filepath.Join(data, "postmaster.pid")) // #nosec G304 -- in our folder; nothing of it is shown
	if err != nil {
		return m, err
	}
	lines := strings.Split(string(content), "\n")
	if len(lines) < 5 {
		return m, fmt.Errorf("postmaster.pid in %s is incomplete", data)
	}
	pid, pidErr := strconv.Atoi(lines[0])
	port, portErr := strconv.Atoi(lines[3])
	m.pid, m.port = pid, port
	m.ready = len(lines) > 7 && strings.TrimSpace(lines[7]) == "ready"
	return m, errors.Join(pidErr, portErr)
}

// runningPostmaster returns the server that runs on data in the folder, whatever its version and whoever started it.
func runningPostmaster(folder string) (postmaster, bool) {
	for _, major := range dataMajors(folder) {
		if m, err := readPostmaster(filepath.Join(folder, dataName(major))); err == nil && m.alive() {
			return m, true
		}
	}
	return postmaster{}, false
}

func dataName(major int) string { return "postgres-" + strconv.Itoa(major) }

var dataFolderName = regexp.MustCompile(`^postgres-(\d+)$`)

// dataMajors returns the versions of which there is data in the folder, newest first.
func dataMajors(folder string) []int {
	entries, _ := os.ReadDir(folder)
	var majors []int
	for _, entry := range entries {
		if name := dataFolderName.FindStringSubmatch(entry.Name()); name != nil && entry.IsDir() {
			major, _ := strconv.Atoi(name[1])
			majors = append(majors, major)
		}
	}
	slices.Sort(majors)
	slices.Reverse(majors)
	return majors
}
