//go:build unix

package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// supported reports whether servers can be started as processes here.
func supported() error { return nil }

// account is the user that servers run as when we are root, because PostgreSQL refuses root. A nil account stands for
// ourselves.
type account struct {
	name     string
	uid, gid uint32
}

// errNoAccount: we are root and know nobody to run a server as.
var errNoAccount = errors.New("PostgreSQL does not run as root and there is no user postgres or nobody: " +
	"create one (useradd --system postgres), start the program as another user, or set DB_HOST")

// serverAccount returns the account for a server with that data: nil unless we are root; else the owner of the data if
// there is data, else postgres, else nobody. Servers cannot change owners by themselves, so data keeps its first one.
func serverAccount(data string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if info, err := os.Stat(data); err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 {
			return &account{name: userName(stat.Uid), uid: stat.Uid, gid: stat.Gid}, nil
		}
	}
	for _, name := range []string{"postgres", "_postgres", "nobody"} {
		found, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, uidErr := strconv.ParseUint(found.Uid, 10, 32)
		gid, gidErr := strconv.ParseUint(found.Gid, 10, 32)
		if uidErr == nil && gidErr == nil && uid != 0 {
			return &account{name: name, uid: uint32(uid), gid: uint32(gid)}, nil
		}
	}
	return nil, errNoAccount
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if found, err := user.LookupId(id); err == nil {
		return found.Username
	}
	return id
}

// runs makes cmd run as the account, in a process group of its own. When the command's context ends, the whole group does.
func (a *account) runs(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	if cmd.Cancel != nil {
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	}
}

// owns gives a file or folder of root's, with all that is in it, to the account. What is in a folder goes first: as soon as the
// account has the folder it can put links there, and would be given what they lead to. For the same reason a folder that is the
// account's already is left alone, also one that a link of root's leads to.
func (a *account) owns(path string) error {
	if a == nil {
		return nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid == a.uid {
		return nil
	}
	root, err := os.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer root.Close()
	var all []string
	err = fs.WalkDir(root.FS(), filepath.Base(path), func(name string, _ fs.DirEntry, err error) error {
		all = append(all, name)
		return err
	})
	if err != nil {
		return err
	}
	for _, name := range slices.Backward(all) { // the folder last: while it is root's, the next start does what is left
		if err := root.Lchown(name, int(a.uid), int(a.gid)); err != nil {
			return err
		}
	}
	return nil
}

// barrier returns the first folder on the way to path that the account cannot enter, or "".
func (a *account) barrier(path string) string {
	if a == nil {
		return ""
	}
	folder := string(filepath.Separator)
	for _, part := range append([]string{""}, strings.Split(path, folder)...) {
		folder = filepath.Join(folder, part)
		if info, err := os.Stat(folder); err != nil || info.IsDir() && !a.canEnter(info) {
			return folder
		}
	}
	return ""
}

// canEnter goes by the mode alone, as the servers are started without further groups.
func (a *account) canEnter(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !ok:
		return true
	case stat.Uid == a.uid:
		return info.Mode()&0o100 != 0
	case stat.Gid == a.gid:
		return info.Mode()&0o010 != 0
	}
	return info.Mode()&0o001 != 0
}

// commandLine returns the command line of a running process, its arguments joined by spaces. A zombie has none.
func commandLine(pid int) (line string, ok bool) {
	if pid <= 0 {
		return "", false
	}
	if runtime.GOOS == "linux" {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		line = strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))
		return line, err == nil && line != ""
	}
	text, err := exec.Command("ps", "-ww", "-o", "stat=", "-o", "command=", "-p", strconv.Itoa(pid)).Output() // #nosec G204 -- a number
	state, line, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	line = strings.TrimSpace(line)
	return line, err == nil && line != "" && !strings.HasPrefix(state, "Z")
}

// exists reports whether there is a process with this id, anyone's.
func exists(pid int) bool { return pid > 0 && syscall.Kill(pid, 0) != syscall.ESRCH }
