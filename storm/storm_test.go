package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"idempotent-orders/internal/command"
)

// The test binary is the guard of the storm that it runs.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == guardArg {
		standGuard(os.Args[2], os.Stdin)
		return
	}
	os.Exit(m.Run())
}

// A fault of every kind within half a minute: it is not a proof, and it finds what is plainly broken. With this seed no consumer
// is killed, whose mails would be waited for for half a minute.
func TestEveryClaimHoldsInAShortStorm(t *testing.T) {
	dir := t.TempDir()
	report, numbers := filepath.Join(dir, "storm.html"), filepath.Join(dir, "storm.json")
	var out, errs bytes.Buffer
	err := tool.Run(t.Context(), []string{"--seed", "4", "--duration", "22s", "--every", "1150ms", "--rate", "300", "--clients", "16", "--race",
		"--report", report, "--json", numbers}, &out, &errs)
	text, unread := os.ReadFile(numbers)
	if unread != nil {
		t.Fatalf("%v, %v\n%s", err, unread, errs.String())
	}
	var r result
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	// How long recovery takes depends on what else the machine does, which here are other tests: a longer storm judges that.
	if broken := r.Verdict.broken(); err != nil && !slices.Equal(broken, []string{claimRecovery}) {
		t.Fatalf("%v\n%s\n%s", err, errs.String(), out.String())
	}
	seen := map[string]bool{}
	for _, s := range r.Strikes {
		seen[s.Kind] = true
		if s.Error != "" {
			t.Errorf("%s: %s", s.fault, s.Error)
		}
	}
	for _, k := range kinds {
		if !seen[k.name] {
			t.Errorf("no fault of the kind %s struck", k.name)
		}
	}
	if r.Orders < 100 || r.Outcomes["replayed"] < 100 || r.Outcomes["422"] == 0 || r.Outcomes["unclear"] == 0 {
		t.Errorf("so little happened that nothing is proved:\n%s", out.String())
	}
	page, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(page, []byte("redis-flush")) || bytes.Contains(page, []byte("http://")) || bytes.Contains(page, []byte("https://")) {
		t.Error("the page misses a fault, or names another site")
	}
}

func TestWrongUsageIsNamed(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"--duration 0s": "--duration", "--every 1ms": "--every", "--clients 0": "--clients", "--rate -1": "--rate",
		"--env nothing": "NAME=value", "now": "now", "--seed x": "seed",
	} {
		var out, errs bytes.Buffer
		if err := tool.Run(t.Context(), strings.Fields(args), &out, &errs); !errors.Is(err, command.ErrUsage) || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: %v, %q", args, err, errs.String())
		}
	}
}

func TestHelpNamesEveryOption(t *testing.T) {
	t.Parallel()
	var out, errs bytes.Buffer
	if err := tool.Run(t.Context(), []string{"--help"}, &out, &errs); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"--seed", "--duration", "--every", "--clients", "--rate", "--report", "--json", "--script", "--tags", "--env", "--race", "--keep"} {
		if !strings.Contains(out.String(), name) {
			t.Errorf("%s is missing", name)
		}
	}
}
