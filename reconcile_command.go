package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"time"

	"idempotent-orders/internal/command"
	"idempotent-orders/internal/config"
	"idempotent-orders/reconcile"
	"idempotent-orders/worker"
)

const reconcileUsage = `Compares orders, their idempotency keys, their events and the inbox of the e-mail consumer, as exact sets, in one snapshot.

Usage:
  idempotent-orders reconcile [--from T] [--to T] [--allow-dead] [--json]

  --from T      only orders placed from T on, like 2026-01-02T15:04:05Z, or 2026-01-02 for its first moment in UTC
  --to T        only orders placed before T
  --allow-dead  dead events are accounted for: exit 0 with them
  --json        the report as JSON
  --help        show this

It shows each difference with its count and its first ids:
  missing           sets that disagree: an order without an event, an event that the consumer never received, and the like
  not finished yet  events that wait in the outbox, are held back, were published in the last minute, or are with the consumer
  dead              events that the broker or the consumer gave up; an operator decides

Retention removes what is old: idempotency keys when they expire (IDEMPOTENCY_RETENTION, which has to be what the servers
have), events of days when all was finished. So only younger orders are asked for a key, and only orders placed since the
archive begins for an event; the report says how many are older.

The exit code is 0 when every order has exactly one event and its mail was sent, 1 when one has not or the database cannot be
asked, 2 when the command line is wrong. It only reads; PostgreSQL works as long as it takes to read every table once or twice.
The variables of the database are those of every command; Redis is not needed.
`

// reconcileOptions are what the command line asks for.
type reconcileOptions struct {
	from, to        time.Time // zero: open
	allowDead, json bool
}

// parseReconcile reads the options; flag.ErrHelp asks for help.
func parseReconcile(args []string) (o reconcileOptions, err error) {
	flags := command.Flags()
	flags.Func("from", "", momentInto(&o.from))
	flags.Func("to", "", momentInto(&o.to))
	flags.BoolVar(&o.allowDead, "allow-dead", false, "")
	flags.BoolVar(&o.json, "json", false, "")
	err = flags.Parse(args)
	switch {
	case err != nil:
		return o, err
	case flags.Arg(0) == "help":
		return o, flag.ErrHelp
	case flags.NArg() > 0:
		return o, fmt.Errorf("%q is not an option", flags.Arg(0))
	case !o.from.IsZero() && !o.to.IsZero() && !o.from.Before(o.to):
		return o, fmt.Errorf("--from %s is not before --to %s", o.from.Format(time.RFC3339), o.to.Format(time.RFC3339))
	}
	return o, nil
}

// momentInto returns the reader of an option that is a moment.
func momentInto(t *time.Time) func(string) error {
	return func(text string) (err error) {
		for _, layout := range []string{time.RFC3339, time.DateOnly} {
			if *t, err = time.Parse(layout, text); err == nil {
				return nil
			}
		}
		return errors.New("it must be like 2026-01-02T15:04:05Z or 2026-01-02")
	}
}

// reconcileOrders is the command that compares what there is with what there should be. args were checked.
func reconcileOrders(ctx context.Context, cfg config.Config, folder string, args []string, stdout io.Writer, log *slog.Logger) error {
	o, err := parseReconcile(args)
	if err != nil {
		return err
	}
	report, err := readReport(ctx, cfg, folder, o, log)
	if ctx.Err() != nil {
		return errors.New("reconcile: stopped before it was done")
	}
	if err != nil {
		return err
	}
	if o.json {
		out := json.NewEncoder(stdout)
		out.SetIndent("", "  ")
		err = out.Encode(report)
	} else {
		err = report.WriteText(stdout)
	}
	if err != nil {
		return fmt.Errorf("reconcile: write the report: %w", err)
	}
	if err := report.Err(o.allowDead); err != nil {
		return fmt.Errorf("reconcile: %w", err)
	}
	return nil
}

func readReport(ctx context.Context, cfg config.Config, folder string, o reconcileOptions, log *slog.Logger) (reconcile.Report, error) {
	stores, err := openDatabase(ctx, cfg, folder, log)
	if err != nil {
		return reconcile.Report{}, err
	}
	defer stores.close(ctx, log)
	return reconcile.Run(ctx, stores.pool, reconcile.Options{
		From: o.from, To: o.to, Consumer: worker.EmailConsumer, KeyRetention: cfg.IdempotencyRetention,
	})
}
