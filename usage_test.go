package main

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
)

// Whatever the command line: it is a command, or it is refused with a reason, or the help is shown.
func FuzzCommandLine(f *testing.F) {
	for _, line := range []string{
		"", "server", "migrate up", "migrate", "server now", "--help", "events dead list --limit 3", "events replay --from 2026-01-02T15:04:05Z",
		"reconcile --from 1h --json", "events requeue --id x", "events dead show --help", "reconcile --to",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		var args []string
		if line != "" {
			args = strings.Split(line, " ")
		}
		var stdout, stderr bytes.Buffer
		command, _, err := parse(args, &stdout, &stderr)
		switch {
		case err != nil:
			if !errors.Is(err, errUsage) || stderr.Len() == 0 || stdout.Len() > 0 || command != "" {
				t.Fatalf("%q: %q, %v, %q, %q", args, command, err, &stdout, &stderr)
			}
		case command == "help":
			if stdout.Len() == 0 || stderr.Len() > 0 {
				t.Fatalf("%q: the help is %q, %q", args, &stdout, &stderr)
			}
		default:
			known := []string{"", "server", "worker", "consumer", "migrate", "events", "reconcile"}
			if !slices.Contains(known, command) || stdout.Len()+stderr.Len() > 0 || len(args) > 0 && args[0] != command {
				t.Fatalf("%q: %q, %q, %q", args, command, &stdout, &stderr)
			}
		}
	})
}
