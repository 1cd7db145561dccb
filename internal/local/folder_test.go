package local

import (
	"os"
	"runtime"
	"testing"
)

func TestFolder(t *testing.T) {
	t.Parallel()
	getenv := func(env map[string]string) func(string) string { return func(name string) string { return env[name] } }
	home := "/home/a/.local/share/idempotent-orders"
	switch {
	case os.Geteuid() == 0:
		home = "/var/lib/idempotent-orders"
	case runtime.GOOS == "darwin":
		home = "/home/a/Library/Application Support/idempotent-orders"
	case runtime.GOOS == "windows":
		t.Skip("no local servers on Windows")
	}
	for _, c := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{"XDG_DATA_HOME": "/data", "HOME": "/home/a"}, "/data/idempotent-orders"},
		{map[string]string{"XDG_DATA_HOME": "relative", "HOME": "/home/a"}, home},
		{map[string]string{"HOME": "/home/a"}, home},
	} {
		if got, err := Folder(getenv(c.env)); err != nil || got != c.want {
			t.Errorf("%v: %s, %v", c.env, got, err)
		}
	}
	if got, err := Folder(getenv(nil)); os.Geteuid() != 0 && err == nil {
		t.Errorf("without HOME: %s", got)
	}
}
