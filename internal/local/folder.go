package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/gofrs/flock"
)

// Folder returns the folder in which local servers keep their data from one run to the next: idempotent-orders in
// $XDG_DATA_HOME if that is an absolute path, else in /var/lib for root, else in the place where the system keeps the
// data of applications below $HOME. It creates nothing.
func Folder(getenv func(string) string) (string, error) {
	const name = "idempotent-orders"
	if data := getenv("XDG_DATA_HOME"); filepath.IsAbs(data) {
		return filepath.Join(data, name), nil
	}
	if os.Geteuid() == 0 {
		return filepath.Join("/var/lib", name), nil
	}
	home := getenv("HOME")
	if !filepath.IsAbs(home) {
		return "", errors.New("no folder for local servers: set HOME or XDG_DATA_HOME to an absolute path")
	}
	if runtime.GOOS == "darwin" {
		return filepath.Join(home, "Library", "Application Support", name), nil
	}
	return filepath.Join(home, ".local", "share", name), nil
}

// folder is the private folder of one server, as seen by one of its users.
type folder struct {
	path string // absolute, without symbolic links: servers report their folder in this form
	log  *slog.Logger

	starting *flock.Flock // exclusive, from openFolder to ready

	mu    sync.Mutex
	users *flock.Flock // shared, from openFolder to leave
	left  bool         // guarded by mu
}

// inUse keeps the folders in use reachable. A lock lives as long as its open file; without this the garbage collector
// would close the file of a caller that kept the address of a server and dropped the handle.
var inUse sync.Map

// openFolder creates the folder if need be and enters it as a user of the server called name. It returns holding both
// locks; the caller calls ready when the server is.
func openFolder(ctx context.Context, path, name string, log *slog.Logger) (*folder, error) {
	if path == "" {
		return nil, errors.New("no folder given")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	path, err := createFolder(path)
	if err != nil {
		return nil, err
	}
	f := &folder{
		path:     path,
		log:      log,
		starting: flock.New(filepath.Join(path, name+"-start.lock")),
		users:    flock.New(filepath.Join(path, name+"-users.lock")),
	}

	defer sayLater(log, "Waiting for another process to start or stop the server", "server", name, "folder", path)()
	if _, err := f.starting.TryLockContext(ctx, pollInterval); err != nil {
		return nil, fmt.Errorf("lock %s: %w", f.starting.Path(), err)
	}
	if _, err := f.users.TryRLockContext(ctx, pollInterval); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.users.Path(), err), f.starting.Unlock())
	}
	inUse.Store(f, nil)
	return f, nil
}

// createFolder returns the folder's real path. What it creates for root can be entered by everyone, for the servers run
// as somebody else; the data inside is protected by its own folder's mode.
func createFolder(path string) (string, error) {
	mode := os.FileMode(0o700)
	if os.Geteuid() == 0 {
		mode = 0o755
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(path, mode); err != nil {
		return "", fmt.Errorf("create the folder for local servers: %w", err)
	}
	return filepath.EvalSymlinks(path)
}

// ready lets the next process look for the server.
func (f *folder) ready() { _ = f.starting.Unlock() }

// leave ends the use of the folder; the last user runs stop. It does nothing after it has succeeded, and can be repeated
// after it has failed.
func (f *folder) leave(stop func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left {
		return nil
	}
	if err := f.users.Unlock(); err != nil {
		return err
	}
	last, err := f.users.TryLock()
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.users.Path(), err)
	}
	if last {
		if err := errors.Join(stop(), f.users.Unlock()); err != nil {
			return err
		}
	}
	f.left = true
	inUse.Delete(f)
	return nil
}

// dataFolder returns the path of the data folder called name and the account that owns it, or shall own it, after making
// sure that it can get there. The account is nil when the servers run as we do.
func (f *folder) dataFolder(name string) (path string, owner *account, err error) {
	path = filepath.Join(f.path, name)
	owner, err = serverAccount(path)
	if err != nil || owner == nil {
		return path, nil, err
	}
	return path, owner, f.letIn(owner)
}

// letIn makes sure that the account can enter the folder. The folder itself is ours to open up; those above are not.
func (f *folder) letIn(owner *account) error {
	if owner == nil {
		return nil
	}
	info, err := os.Stat(f.path)
	if err != nil {
		return err
	}
	if !owner.canEnter(info) {
		if err := os.Chmod(f.path, info.Mode().Perm()|0o011); err != nil {
			return err
		}
	}
	if closed := owner.barrier(f.path); closed != "" {
		return fmt.Errorf("local servers do not run as root but as user %s, who cannot enter %s: "+
			"set XDG_DATA_HOME (TMPDIR for tests) to a folder that %s can enter", owner.name, closed, owner.name)
	}
	return nil
}

// openLog opens a server's log for appending and returns its size, where the news of the next start begins. A log that
// has grown large is put aside first.
func (f *folder) openLog(name string) (*os.File, int64, error) {
	const large = 16 << 20
	path := filepath.Join(f.path, name)
	if info, err := os.Stat(path); err == nil && info.Size() > large {
		if err := os.Rename(path, path+".old"); err != nil {
			return nil, 0, err
		}
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600) // #nosec G304 -- of names we give, in our folder
	if err != nil {
		return nil, 0, err
	}
	info, err := file.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, file.Close())
	}
	return file, info.Size(), nil
}

// writeFile replaces a file in one step: a reader finds the old content or the new, never half of it.
func writeFile(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// sayLater logs the message if the returned function is not called within three seconds.
func sayLater(log *slog.Logger, message string, args ...any) (done func()) {
	timer := time.AfterFunc(3*time.Second, func() { log.Info(message, args...) })
	return func() { timer.Stop() }
}
