package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

const (
	oldestPostgreSQL = 14
	downloadTimeout  = 5 * time.Minute
	downloadVersion  = embeddedpostgres.V18
)

// binaryRepository is where PostgreSQL is downloaded from, a Maven repository.
var binaryRepository = "https://repo1.maven.org/maven2"

// installation is a folder with the programs of one PostgreSQL.
type installation struct {
	bin          string
	major, minor int
}

func (i installation) String() string { return fmt.Sprintf("%d.%d in %s", i.major, i.minor, i.bin) }

// places are the folders where systems put PostgreSQL, besides those on the PATH.
var places = []string{
	"/usr/lib/postgresql/*/bin", // Debian, Ubuntu
	"/usr/pgsql-*/bin",          // PGDG on Red Hat
	"/usr/libexec/postgresql*",  // Alpine
	"/opt/homebrew/opt/postgresql*/bin",
	"/usr/local/opt/postgresql*/bin",
	"/opt/homebrew/bin",
	"/usr/local/pgsql/bin", // built from source
	"/Applications/Postgres.app/Contents/Versions/*/bin",
}

// installedIn returns the folders in which PostgreSQL may be installed.
func installedIn() []string {
	folders := filepath.SplitList(os.Getenv("PATH"))
	for _, pattern := range places {
		matches, _ := filepath.Glob(pattern)
		folders = append(folders, matches...)
	}
	return folders
}

// findInstallations returns the installations in the folders that the account can use, each once.
func findInstallations(ctx context.Context, owner *account, folders ...string) []installation {
	var found []installation
	seen := map[string]bool{}
	for _, folder := range folders {
		postgres, err := filepath.EvalSymlinks(filepath.Join(folder, "postgres"))
		bin := filepath.Dir(postgres)
		if err != nil || !filepath.IsAbs(bin) || seen[bin] {
			continue
		}
		seen[bin] = true
		if i, ok := inspect(ctx, bin, owner); ok {
			found = append(found, i)
		}
	}
	return found
}

var postgresVersion = regexp.MustCompile(`\(PostgreSQL\) (\d+)(?:\.(\d+))?`)

// inspect asks the programs in a folder for their version. Only what they say counts; folders are named in many ways. They run as the
// account even for that: those that were downloaded are its own, and it may have put anything in their place.
func inspect(ctx context.Context, bin string, owner *account) (installation, bool) {
	if _, err := exec.LookPath(filepath.Join(bin, "initdb")); err != nil {
		return installation{}, false
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version") // #nosec G204 -- from the PATH of who runs us, where systems put it, or downloaded
	cmd.Dir = bin
	owner.runs(cmd)
	text, err := cmd.Output()
	version := postgresVersion.FindSubmatch(text)
	if err != nil || version == nil {
		return installation{}, false
	}
	major, _ := strconv.Atoi(string(version[1]))
	minor, _ := strconv.Atoi(string(version[2])) // none for a beta
	return installation{bin: bin, major: major, minor: minor}, major >= oldestPostgreSQL
}

// choose returns the newest installation; one for which there is data comes before a newer one for which there is none.
func choose(found []installation, dataMajors []int) installation {
	return slices.MaxFunc(found, func(a, b installation) int {
		hasData := func(i installation) int {
			if slices.Contains(dataMajors, i.major) {
				return 1
			}
			return 0
		}
		return cmp.Or(hasData(a)-hasData(b), a.major-b.major, a.minor-b.minor)
	})
}

// installedOrDownloaded returns the installation to use in this folder, for which there may be data already.
func (f *folder) installedOrDownloaded(ctx context.Context, dataMajors []int) (installation, error) {
	owner, err := serverAccount("")
	if err != nil {
		return installation{}, err
	}
	if err := f.letIn(owner); err != nil {
		return installation{}, err
	}
	downloaded := filepath.Join(f.path, "binaries")
	found := findInstallations(ctx, owner, append(installedIn(), filepath.Join(downloaded, "bin"))...)
	found = slices.DeleteFunc(found, func(i installation) bool { return owner.barrier(i.bin) != "" })
	if len(found) == 0 {
		if err := download(ctx, downloaded, owner, f.log); err != nil {
			return installation{}, err
		}
		if found = findInstallations(ctx, owner, filepath.Join(downloaded, "bin")); len(found) == 0 {
			return installation{}, fmt.Errorf("the PostgreSQL downloaded to %s does not run here: "+
				"install PostgreSQL %d or newer, or set DB_HOST", downloaded, oldestPostgreSQL)
		}
	}
	chosen := choose(found, dataMajors)
	if len(dataMajors) > 0 && !slices.Contains(dataMajors, chosen.major) {
		f.log.Warn("The data here was written by another version of PostgreSQL, which is no longer installed: starting empty",
			"data", dataMajors, "using", chosen)
	}
	return chosen, nil
}

// download fetches PostgreSQL into the folder, whole or not at all.
//
// The library has no call that only fetches. Its Start fetches, unpacks, and then fails at once to make a database, because
// the database's folder would have to lie below a file; so no server of its making is ever left behind.
func download(ctx context.Context, into string, owner *account, log *slog.Logger) error {
	log.Info("No PostgreSQL found on this machine: downloading it (about 30 MB; to avoid this, install PostgreSQL or set DB_HOST)",
		"version", string(downloadVersion), "from", binaryRepository, "to", into)
	defer sayLater(log, "Still downloading PostgreSQL", "limit", downloadTimeout)()

	partial, err := newSibling(into)
	if err != nil {
		return err
	}
	file := filepath.Join(partial, "no-database-here")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return err
	}
	port, err := choosePort(0) // never used, but it has to be free
	if err != nil {
		return err
	}
	unpacked := filepath.Join(partial, "unpacked")
	library := embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(downloadVersion).
		BinaryRepositoryURL(binaryRepository).
		CachePath(filepath.Join(partial, "archive")).
		RuntimePath(filepath.Join(partial, "runtime")).
		BinariesPath(unpacked).
		DataPath(filepath.Join(file, "data")).
		Port(uint32(port)). // #nosec G115 -- a port
		Logger(io.Discard))

	result := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil { // the library panics when it cannot tidy up
				result <- fmt.Errorf("unpack: %v", r)
			}
		}()
		result <- library.Start()
	}()
	ctx, cancel := context.WithTimeout(ctx, downloadTimeout)
	defer cancel()
	select {
	case err = <-result: // an error, but which?
	case <-ctx.Done():
		// The library cannot be interrupted; what it still writes is removed by the next download.
		return downloadError(context.Cause(ctx))
	}
	if _, statErr := os.Stat(filepath.Join(unpacked, "bin", "postgres")); statErr != nil {
		return downloadError(errors.Join(err, os.RemoveAll(partial)))
	}
	if err := owner.owns(unpacked); err != nil {
		return err
	}
	if err := os.RemoveAll(into); err != nil {
		return err
	}
	if err := os.Rename(unpacked, into); err != nil {
		return err
	}
	return os.RemoveAll(partial)
}

func downloadError(cause error) error {
	return fmt.Errorf("download PostgreSQL %s from %s (install PostgreSQL %d or newer, or set DB_HOST to a server, "+
		"and no download is needed): %w", downloadVersion, binaryRepository, oldestPostgreSQL, cause)
}

// newSibling creates an empty folder beside path, in which its content can be made before it gets its name, and removes
// what is left of earlier ones. The name is new each time: a program that outlived its parent and still writes into an
// earlier one must not meet ours.
func newSibling(path string) (string, error) {
	const infix = ".new-"
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), filepath.Base(path)+infix) {
			_ = os.RemoveAll(filepath.Join(filepath.Dir(path), entry.Name())) // if that program is still at it, next time
		}
	}
	return os.MkdirTemp(filepath.Dir(path), filepath.Base(path)+infix)
}
