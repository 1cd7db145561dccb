//go:build unix

package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// As root alone does the program give files away, and as root alone can a test.
func TestWhatAnAccountPutsIntoItsFolderDoesNotGiveItRootsFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root gives files away")
	}
	t.Parallel()
	a, dir := &account{uid: 65534, gid: 65534}, t.TempDir()
	folder, roots, rootsFolder := filepath.Join(dir, "data"), filepath.Join(dir, "roots"), filepath.Join(dir, "folder")
	must(t, os.MkdirAll(filepath.Join(folder, "a", "b"), 0o700))
	must(t, os.Mkdir(rootsFolder, 0o700))
	for _, file := range []string{filepath.Join(folder, "a", "file"), filepath.Join(rootsFolder, "file"), roots} {
		must(t, os.WriteFile(file, nil, 0o600))
	}
	must(t, os.Symlink(rootsFolder, filepath.Join(folder, "a", "link")))
	ownerOf := func(path string) uint32 {
		info, err := os.Lstat(path)
		must(t, err)
		return info.Sys().(*syscall.Stat_t).Uid
	}
	must(t, a.owns(folder))
	for _, given := range []string{"", "a", "a/b", "a/file", "a/link"} {
		if ownerOf(filepath.Join(folder, given)) != a.uid {
			t.Errorf("%q is not given to the account", given)
		}
	}

	must(t, os.Link(roots, filepath.Join(folder, "a", "hard"))) // as the account could, now that it has the folder
	must(t, a.owns(folder))
	for _, kept := range []string{roots, rootsFolder, filepath.Join(rootsFolder, "file")} {
		if ownerOf(kept) != 0 {
			t.Errorf("%s is given to the account", kept)
		}
	}
	moved := filepath.Join(t.TempDir(), "data") // root has put the data elsewhere
	must(t, os.Symlink(folder, moved))
	must(t, a.owns(moved))
	if err := a.owns(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is not there: %v", err)
	}
}

func TestRootAsksNoProgramOfAnAccountAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root runs programs as somebody else")
	}
	t.Parallel()
	a, bin := &account{uid: 65534, gid: 65534}, newFolder(t)
	must(t, os.Chmod(bin, 0o755))
	for _, program := range []string{"postgres", "initdb"} {
		must(t, os.WriteFile(filepath.Join(bin, program), []byte("#!/bin/sh\necho \"postgres (PostgreSQL) 18.$(id -u)\"\n"), 0o755))
	}
	if found := findInstallations(t.Context(), a, bin); len(found) != 1 || found[0].minor != 65534 {
		t.Errorf("found %v; want one, of which the minor version is whom it ran as", found)
	}
}

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
