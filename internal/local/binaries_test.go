package local

import (
	"archive/zip"
	"bytes"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	t.Parallel()
	at := func(major, minor int) installation { return installation{bin: "x", major: major, minor: minor} }
	for _, c := range []struct {
		name  string
		found []installation
		data  []int
		want  installation
	}{
		{"the only one", []installation{at(15, 1)}, nil, at(15, 1)},
		{"the newest", []installation{at(14, 9), at(18, 0), at(17, 5)}, nil, at(18, 0)},
		{"by number, not by letter", []installation{at(100, 0), at(18, 9), at(18, 10)}, []int{18}, at(18, 10)},
		{"with data before newer", []installation{at(18, 1), at(15, 2), at(16, 1)}, []int{16, 15}, at(16, 1)},
		{"data of a version that is gone", []installation{at(18, 1), at(17, 1)}, []int{15}, at(18, 1)},
	} {
		if got := choose(c.found, c.data); got != c.want {
			t.Errorf("%s: chose %v", c.name, got)
		}
	}
}

// fakePrograms writes a folder with programs that only know their version.
func fakePrograms(t *testing.T, version string, programs ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, program := range programs {
		script := fmt.Sprintf("#!/bin/sh\necho '%s (PostgreSQL) %s'\n", program, version)
		must(t, os.WriteFile(filepath.Join(dir, program), []byte(script), 0o700))
	}
	return dir
}

func TestFindInstallations(t *testing.T) {
	t.Parallel()
	real := fakePrograms(t, "16.3 (Debian 16.3-1)", "postgres", "initdb")
	link := t.TempDir()
	must(t, os.Symlink(filepath.Join(real, "postgres"), filepath.Join(link, "postgres")))
	found := findInstallations(t.Context(), nil,
		"", ".", "/no/such/folder",
		fakePrograms(t, "17.1", "postgres"),
		fakePrograms(t, "13.9", "postgres", "initdb"),
		fakePrograms(t, "19beta1", "postgres", "initdb"),
		link, real,
	)
	real, err := filepath.EvalSymlinks(real)
	must(t, err)
	if len(found) != 2 || found[0].major != 19 || found[1] != (installation{real, 16, 3}) {
		t.Errorf("found %v", found)
	}
}

// archive is a tar.xz with bin/postgres, which says that it is version 18.3, bin/initdb and bin/pg_ctl.
const archive = `/Td6WFoAAATm1rRGAgAhARwAAAAQz1jM4Cf/ALBdADEaShsJm84iHsbLRwPoGC75j1TR0bLwgHrZQah4q5kOCk1Lotwx8u+Lx60TxBADlN2SrI
MJfX8GMrEycr4RhY60QJLhU1uIXUuXrTiUaOa1lqyoPaUlFYxaKlE7hCYGdlYLhEseoiroQagHlka15aRymOiQWwUNRj6fmaUjrAgZQtWLLUZK
jlKmHILN/9szx6ue3cZs6/M05eIChzGX0uKuTZsR25cjMevFyqDWF3AAABC1zEPg7BFEAAHMAYBQAAApu/oZscRn+wIAAAAABFla`

// TestDownload changes the package's repository, so it and its parts do not run in parallel with others that download.
func TestDownload(t *testing.T) {
	var answer http.HandlerFunc
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path)
		answer(w, r)
	}))
	defer server.Close()
	defer func(repository string) { binaryRepository = repository }(binaryRepository)
	binaryRepository = server.URL
	into := filepath.Join(newFolder(t), "binaries")
	t.Setenv("TMPDIR", t.TempDir()) // the library forgets a log there
	log := slog.New(slog.DiscardHandler)

	t.Run("FailsWithTheRemedy", func(t *testing.T) {
		answer = http.NotFound
		err := download(t.Context(), into, nil, log)
		for _, part := range []string{server.URL, "DB_HOST", "install PostgreSQL"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%q is not in %v", part, err)
			}
		}
		if entries, err := os.ReadDir(filepath.Dir(into)); err != nil || len(entries) > 0 {
			t.Errorf("left behind: %v %v", entries, err)
		}
	})

	t.Run("Unpacks", func(t *testing.T) {
		txz, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(archive, "\n", ""))
		must(t, err)
		var jar bytes.Buffer
		z := zip.NewWriter(&jar)
		file, err := z.Create("postgres-test.txz")
		must(t, err)
		_, err = file.Write(txz)
		must(t, err)
		must(t, z.Close())
		answer = func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, ".sha256") {
				http.NotFound(w, r)
				return
			}
			_, _ = w.Write(jar.Bytes())
		}
		// What a killed download leaves is removed.
		must(t, os.MkdirAll(into+".new-1/unpacked/bin", 0o700))

		asked = nil
		must(t, download(t.Context(), into, nil, log))
		found := findInstallations(t.Context(), nil, filepath.Join(into, "bin"))
		if len(found) != 1 || found[0].major != 18 || found[0].minor != 3 {
			t.Errorf("found %v", found)
		}
		if entries, err := os.ReadDir(filepath.Dir(into)); err != nil || len(entries) != 1 {
			t.Errorf("beside it: %v %v", entries, err)
		}
		if len(asked) == 0 || !strings.HasPrefix(asked[0], "/io/zonky/test/postgres/embedded-postgres-binaries-") {
			t.Errorf("asked for %v", asked)
		}
	})
}
