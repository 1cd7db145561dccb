package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"

	"idempotent-orders/internal/config"
)

const usage = `An order service that never does it twice and never forgets to say so.

Usage:
  idempotent-orders                         run everything; brings the schema up to date first
  idempotent-orders server                  run only the HTTP server
  idempotent-orders worker                  run only the outbox worker
  idempotent-orders consumer                run only the e-mail consumer
  idempotent-orders migrate up|down|status  move the schema, or show where it stands
  idempotent-orders events dead list|show|requeue|drop, replay, park, unpark
                                            what operators do to events; see events --help
  idempotent-orders reconcile [--from T] [--to T] [--allow-dead] [--json]
                                            prove that every order was announced and mailed, or show which was not
  idempotent-orders help                    show this; so does --help with any command

Each part may run in any number of processes. SIGTERM or Ctrl-C stops them cleanly, within ten seconds.

Without DB_* or DATABASE_URL, and with nothing usable at the default address, a PostgreSQL is started from the binaries
found on this machine (or downloaded), with its data in a private folder; so is a Redis, without REDIS_*.

Variables:
`

// parse reads the command line: it returns the command and its arguments, or "help" when the help was shown.
func parse(args []string, stdout, stderr io.Writer) (command string, rest []string, err error) {
	if len(args) > 0 && args[0] == "events" {
		_, err := parseEvents(args[1:])
		return checked("events", args[1:], err, eventsUsage(), stdout, stderr)
	}
	if len(args) > 0 && args[0] == "reconcile" {
		_, err := parseReconcile(args[1:])
		return checked("reconcile", args[1:], err, reconcileUsage, stdout, stderr)
	}
	for _, arg := range args {
		if slices.Contains([]string{"help", "-h", "-help", "--help"}, arg) {
			help(stdout)
			return "help", nil, nil
		}
	}
	if len(args) == 0 {
		return "", nil, nil
	}
	command, rest = args[0], args[1:]
	switch {
	case slices.Contains([]string{"server", "worker", "consumer"}, command) && len(rest) == 0:
		return command, rest, nil
	case command == "migrate" && len(rest) == 1 && slices.Contains([]string{"up", "down", "status"}, rest[0]):
		return command, rest, nil
	case command == "migrate":
		fmt.Fprintln(stderr, "idempotent-orders: migrate takes up, down or status; see --help")
	default:
		fmt.Fprintf(stderr, "idempotent-orders: %q is not a command with these arguments; see --help\n", args)
	}
	return "", nil, errUsage
}

// checked tells what is wrong with the command line of a command that has its own help, or shows that.
func checked(command string, args []string, err error, help string, stdout, stderr io.Writer) (string, []string, error) {
	switch {
	case err == nil:
		return command, args, nil
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, help)
		return "help", nil, nil
	default:
		fmt.Fprintf(stderr, "idempotent-orders: %[1]s: %[2]v; see %[1]s --help\n", command, err)
		return "", nil, errUsage
	}
}

func help(w io.Writer) {
	fmt.Fprint(w, usage)
	for _, v := range config.Variables {
		fmt.Fprintf(w, "  %-22s %s", v.Name, v.Meaning)
		if v.Default != "" {
			fmt.Fprintf(w, " (default %s)", v.Default)
		}
		fmt.Fprintln(w)
	}
}
