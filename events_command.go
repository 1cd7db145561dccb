package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/user"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"

	"idempotent-orders/broker"
	"idempotent-orders/internal/command"
	"idempotent-orders/internal/config"
	"idempotent-orders/operate"
)

const (
	// defaultShown is how many dead events, or parked orders, are listed, unless --limit says otherwise.
	defaultShown = 50
	// reasonShown is how much of a reason a line of the list has.
	reasonShown = 100
	// Progress is shown so often on a terminal, and so often elsewhere.
	progressOnTerminal, progressElsewhere = time.Second, 10 * time.Second
)

const eventsUsageText = `What operators do to events. Who did what, when, and to how many events stands in the table operations.

Usage:
  idempotent-orders events dead list     [--id ID] [--order ID] [--type T] [--older-than D] [--limit N] [--json]
  idempotent-orders events dead show     [--id ID] [--order ID] [--type T] [--older-than D] [--limit N]
  idempotent-orders events dead requeue  [--id ID] [--order ID] [--type T] [--older-than D] [--rate N] [--dry-run] [--yes]
  idempotent-orders events dead drop     [--id ID] [--order ID] [--type T] [--older-than D] [--rate N] [--dry-run] [--yes]
  idempotent-orders events replay        --from T --to T [--order ID] [--type T] [--force-consumers] [--after N]
                                         [--rate N] [--dry-run] [--yes]
  idempotent-orders events park|unpark   --order ID [--dry-run] [--yes]
  idempotent-orders events parked        [--limit N] [--json]

  dead list     the events that were refused for good: by the publisher's broker, or by a consumer
  dead show     whole dead events, as JSON
  dead requeue  have dead events tried again: those of the publisher go to the end of the outbox, those of a consumer are
                published again from the archive. 'events requeue' is the same
  dead drop     give dead events up: those of the publisher are deleted; those of a consumer stay in its inbox, so that they are
                never taken for new ones, but are not listed any more ('events replay --force-consumers' still reaches them)
  replay        publish events again from the archive, oldest first, under the ids they have. Consumers that finished an event
                do nothing; with --force-consumers they do everything again: a second mail goes out
  park          hold back the events of an order, until unpark
  unpark        let them go on
  parked        the orders whose events are held back, and how many wait

  --id ID            the event; may be repeated
  --order ID         the order
  --type T           the type of the event, like order.created.v1
  --older-than D     dead for at least so long, like 90m or 48h
  --limit N          list at most so many (default %[1]d)
  --json             list one JSON object a line
  --from T, --to T   published from T on, and before T; like 2026-01-02T15:04:05Z, or 2026-01-02 for its first moment in UTC
  --after N          of those that were published at --from itself, only those behind outbox id N: where a replay stopped
  --force-consumers  have consumers handle events again that they have finished
  --rate N           at most so many events a second (default %[2]d)
  --dry-run          only count
  --yes              do not ask
  --help             show this

Everything that acts counts first and asks. It can be interrupted with Ctrl-C, and run again for the rest; of a replay it says
how. The exit code is 0 when everything was done, or nothing was to do; 1 when it was not, 2 when the command line is wrong. The
variables are those of every command; Redis is needed by requeue and replay only.
`

func eventsUsage() string { return fmt.Sprintf(eventsUsageText, defaultShown, operate.DefaultRate) }

// eventsOptions are what the command line asks for.
type eventsOptions struct {
	action      string // as in optionsOf
	filter      operate.Filter
	span        operate.Range
	limit, rate int
	json, force bool
	dryRun, yes bool
}

// eventsOptionsOf names the options of each action; those it needs come first, up to the "|".
var eventsOptionsOf = map[string]string{
	"dead list":    "| id order type older-than limit json",
	"dead show":    "| id order type older-than limit",
	"dead requeue": "| id order type older-than rate dry-run yes",
	"dead drop":    "| id order type older-than rate dry-run yes",
	"replay":       "from to | order type force-consumers after rate dry-run yes",
	"park":         "order | dry-run yes",
	"unpark":       "order | dry-run yes",
	"parked":       "| limit json",
}

// parseEvents reads the options; flag.ErrHelp asks for help.
func parseEvents(args []string) (o eventsOptions, err error) {
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		o.action, args = strings.TrimSpace(o.action+" "+args[0]), args[1:]
	}
	if o.action == "requeue" {
		o.action = "dead requeue"
	}
	options, known := eventsOptionsOf[o.action]
	flags := command.Flags()
	flags.Func("id", "", func(text string) error {
		var id uuid.UUID
		err := idInto(&id)(text)
		o.filter.IDs = append(o.filter.IDs, id)
		return err
	})
	flags.Func("order", "", idInto(&o.filter.Order))
	flags.StringVar(&o.filter.Type, "type", "", "")
	flags.DurationVar(&o.filter.OlderThan, "older-than", 0, "")
	flags.Func("from", "", momentInto(&o.span.From))
	flags.Func("to", "", momentInto(&o.span.To))
	flags.Int64Var(&o.span.After, "after", 0, "")
	flags.IntVar(&o.limit, "limit", defaultShown, "")
	flags.IntVar(&o.rate, "rate", operate.DefaultRate, "")
	flags.BoolVar(&o.json, "json", false, "")
	flags.BoolVar(&o.force, "force-consumers", false, "")
	flags.BoolVar(&o.dryRun, "dry-run", false, "")
	flags.BoolVar(&o.yes, "yes", false, "")
	err = flags.Parse(args)
	switch {
	case err == nil && (o.action == "help" || strings.HasSuffix(o.action, " help") || flags.Arg(0) == "help"):
		return o, flag.ErrHelp
	case err != nil:
		return o, err
	case o.action == "" || o.action == "dead":
		return o, errors.New("say what to do: dead list, dead show, dead requeue, dead drop, replay, park, unpark or parked")
	case !known:
		return o, fmt.Errorf("%q is not something to do: dead list, dead show, dead requeue, dead drop, replay, park, unpark or parked", o.action)
	case flags.NArg() > 0:
		return o, fmt.Errorf("%q is not an option", flags.Arg(0))
	}
	o.span.Order, o.span.Type = o.filter.Order, o.filter.Type
	return o, o.check(options, command.Given(flags))
}

// check says what is wrong with the options, of which these were given.
func (o eventsOptions) check(options string, given []string) error {
	needed, allowed, _ := strings.Cut(options, "|")
	for _, name := range given {
		if !slices.Contains(strings.Fields(needed+allowed), name) {
			return fmt.Errorf("--%s is not an option of %s", name, o.action)
		}
	}
	for _, name := range strings.Fields(needed) {
		if !slices.Contains(given, name) {
			return fmt.Errorf("%s needs --%s", o.action, name)
		}
	}
	switch {
	case slices.Contains(given, "from") && !o.span.From.Before(o.span.To):
		return fmt.Errorf("--from %s is not before --to %s", o.span.From.Format(time.RFC3339), o.span.To.Format(time.RFC3339))
	case o.span.After < 0:
		return fmt.Errorf("--after is %d; it must be the outbox id of an event", o.span.After)
	case o.limit < 1:
		return fmt.Errorf("--limit is %d; it must be at least 1", o.limit)
	case o.rate < 1 || o.rate > operate.MaxRate:
		return fmt.Errorf("--rate is %d; it must be from 1 to %d per second", o.rate, operate.MaxRate)
	case o.filter.OlderThan < 0:
		return fmt.Errorf("--older-than is %s; it must not be negative", o.filter.OlderThan)
	}
	return nil
}

// idInto returns the reader of an option that is an id.
func idInto(id *uuid.UUID) func(string) error {
	return func(text string) (err error) {
		if *id, err = uuid.Parse(text); err != nil || *id == uuid.Nil {
			return errors.New("it must be a UUID, like 01a208ee-053e-7a6b-8de6-ca958541f473")
		}
		return nil
	}
}

// events is the command that does what operators do to events. args were checked.
func events(ctx context.Context, cfg config.Config, folder string, args []string, stdin io.Reader, stdout, stderr io.Writer, log *slog.Logger) error {
	o, err := parseEvents(args)
	if err != nil {
		return err
	}
	if cfg.LogLevel == slog.LevelInfo {
		cfg.LogLevel = slog.LevelWarn // of the servers only what an operator has to know
		log = newLog(cfg, stderr)
	}
	desk := &operatorsDesk{eventsOptions: o, stdin: stdin, stdout: stdout, stderr: stderr, asks: command.IsTerminal(stdin)}
	closeStores, err := desk.open(ctx, cfg, folder, log)
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	defer closeStores()
	desk.operator.Who, desk.operator.What = who(), commandLine(args)
	desk.operator.Rate = o.rate
	if o.action != "park" && o.action != "unpark" {
		desk.operator.Progress = desk.progress
	}
	if err := desk.do(ctx); err != nil {
		return fmt.Errorf("events %s: %w", o.action, err)
	}
	return nil
}

// operatorsDesk is where one command is carried out.
type operatorsDesk struct {
	eventsOptions
	operator       operate.Operator
	where          string // the database
	stdin          io.Reader
	stdout, stderr io.Writer
	asks           bool // somebody may answer at stdin

	total int64     // how many events there are to do
	shown time.Time // when the progress was shown last
}

// open opens the stores: Redis only where something is published.
func (d *operatorsDesk) open(ctx context.Context, cfg config.Config, folder string, log *slog.Logger) (closeStores func(), err error) {
	var stores *stores
	publishes := !d.dryRun && (d.action == "dead requeue" || d.action == "replay")
	if publishes {
		stores, err = open(ctx, onlyWhatIs(cfg, folder), folder, parts{}, log)
	} else {
		stores, err = openDatabase(ctx, cfg, folder, log)
	}
	if err != nil {
		return nil, err
	}
	if publishes {
		if d.operator.Publisher, _, err = eventBroker(ctx, cfg, stores, false, log); err != nil {
			stores.close(ctx, log)
			return nil, err
		}
	}
	d.operator.Pool = stores.pool
	c := stores.pool.Config().ConnConfig
	d.where = fmt.Sprintf("database %s at %s:%d", c.Database, c.Host, c.Port)
	return func() { stores.close(ctx, log) }, nil
}

func (d *operatorsDesk) do(ctx context.Context) error {
	switch d.action {
	case "dead list":
		return d.list(ctx)
	case "dead show":
		return d.show(ctx)
	case "dead requeue", "dead drop":
		return d.settle(ctx)
	case "replay":
		return d.replay(ctx)
	case "parked":
		return d.parked(ctx)
	default:
		return d.park(ctx)
	}
}

// shownDead is a dead event as JSON.
type shownDead struct {
	Where    string     `json:"where"` // "publisher", or "consumer" and its name
	EventID  uuid.UUID  `json:"event_id"`
	OrderID  *uuid.UUID `json:"order_id"` // null when the archive does not have the event any more
	Type     string     `json:"type"`
	Attempts *int       `json:"attempts"` // null when a consumer refused it
	Reason   string     `json:"reason"`
	DiedAt   time.Time  `json:"died_at"`
	Event    any        `json:"event,omitempty"`
}

func shownOf(d operate.Dead) shownDead {
	s := shownDead{Where: "publisher", EventID: d.EventID, OrderID: &d.OrderID, Type: d.Type, Attempts: &d.Attempts, Reason: d.Reason, DiedAt: d.DiedAt.UTC()}
	if d.Consumer != "" {
		s.Where, s.Attempts = "consumer "+d.Consumer, nil
	}
	if d.Lost() {
		s.OrderID = nil
	}
	return s
}

func (d *operatorsDesk) list(ctx context.Context) error {
	dead, err := d.operator.FindDead(ctx, d.filter, int64(d.limit)+1)
	if err != nil {
		return err
	}
	if len(dead) > d.limit {
		defer fmt.Fprintf(d.stderr, "There are more than %s; see more with --limit.\n", plural(int64(d.limit)))
	}
	return listed(d, dead, "No event is dead.", "WHERE\tEVENT\tORDER\tTYPE\tAGE\tATTEMPTS\tREASON", func(e operate.Dead) (any, string) {
		s := shownOf(e)
		order, eventType, attempts := "not in the archive", cmp.Or(e.Type, "-"), "-"
		if s.OrderID != nil {
			order = s.OrderID.String()
		}
		if s.Attempts != nil {
			attempts = fmt.Sprint(*s.Attempts)
		}
		return s, fmt.Sprintf("%s\t%s\t%s\t%s\t%s\t%s\t%s", s.Where, s.EventID, order, eventType, age(e.DiedAt), attempts, oneLine(e.Reason))
	})
}

// shownParked is a parked order as JSON.
type shownParked struct {
	OrderID  uuid.UUID `json:"order_id"`
	ParkedAt time.Time `json:"parked_at"`
	Events   int       `json:"events"`
}

func (d *operatorsDesk) parked(ctx context.Context) error {
	parked, err := d.operator.FindParked(ctx, int64(d.limit)+1)
	if err != nil {
		return err
	}
	if len(parked) > d.limit {
		defer fmt.Fprintf(d.stderr, "More orders are parked than these %d; see more with --limit.\n", d.limit)
	}
	return listed(d, parked, "No order is parked.", "ORDER\tAGE\tEVENTS", func(p operate.Parked) (any, string) {
		return shownParked{p.Order, p.Since.UTC(), p.Events}, fmt.Sprintf("%s\t%s\t%d", p.Order, age(p.Since), p.Events)
	})
}

// listed lists what was found, up to the limit. shown returns one of it as it is in JSON, and as it is in the table.
func listed[T any](d *operatorsDesk, found []T, none, header string, shown func(T) (any, string)) error {
	found = found[:min(len(found), d.limit)]
	if len(found) == 0 && !d.json {
		_, err := fmt.Fprintln(d.stdout, none)
		return err
	}
	out, table := json.NewEncoder(d.stdout), tabwriter.NewWriter(d.stdout, 0, 0, 2, ' ', 0)
	if !d.json {
		fmt.Fprintln(table, header)
	}
	for _, one := range found {
		object, row := shown(one)
		if !d.json {
			fmt.Fprintln(table, row)
		} else if err := out.Encode(object); err != nil {
			return err
		}
	}
	return table.Flush()
}

func age(since time.Time) time.Duration { return time.Since(since).Round(time.Second) }

// oneLine is the beginning of a text, without what would disturb a table or a terminal.
func oneLine(text string) string {
	clean := []rune(strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }), " "))
	if len(clean) > reasonShown {
		return string(clean[:reasonShown-1]) + "…"
	}
	return string(clean)
}

func (d *operatorsDesk) show(ctx context.Context) error {
	dead, err := d.operator.FindDead(ctx, d.filter, int64(d.limit)+1)
	if err != nil {
		return err
	}
	if len(dead) == 0 {
		return operate.ErrNotFound
	}
	if len(dead) > d.limit {
		dead = dead[:d.limit]
		defer fmt.Fprintf(d.stderr, "There are more than %s; see more with --limit.\n", plural(int64(d.limit)))
	}
	out := json.NewEncoder(d.stdout)
	out.SetIndent("", "  ")
	for _, e := range dead {
		s := shownOf(e)
		event, err := d.operator.Event(ctx, e)
		switch {
		case err == nil:
			s.Event = cloudEvent(event)
		case !errors.Is(err, operate.ErrNotFound):
			return err
		}
		if err := out.Encode(s); err != nil {
			return err
		}
	}
	return nil
}

// cloudEvent is an event in the JSON format of CloudEvents.
func cloudEvent(e broker.Event) any {
	return struct {
		SpecVersion string          `json:"specversion"`
		ID          uuid.UUID       `json:"id"`
		Source      string          `json:"source"`
		Type        string          `json:"type"`
		Subject     string          `json:"subject"`
		Time        time.Time       `json:"time"`
		ContentType string          `json:"datacontenttype"`
		Traceparent string          `json:"traceparent,omitempty"`
		Data        json.RawMessage `json:"data"`
	}{"1.0", e.ID, e.Source, e.Type, e.Subject, e.Time.UTC(), "application/json", e.Traceparent, e.Data}
}

// settle requeues dead events, or drops them.
func (d *operatorsDesk) settle(ctx context.Context) error {
	dead, err := d.operator.FindDead(ctx, d.filter, operate.Everything)
	if err != nil {
		return err
	}
	do, done := d.operator.Drop, "dropped"
	if d.action == "dead requeue" {
		do, done = d.operator.Requeue, "requeued"
		found := len(dead)
		dead = slices.DeleteFunc(dead, operate.Dead.Lost)
		if lost := found - len(dead); lost > 0 {
			fmt.Fprintf(d.stderr, "%s not in the archive any more, and cannot be requeued.\n", counted(lost, "is", "are"))
		}
	}
	if goOn, err := d.confirmed(ctx, int64(len(dead)), done); !goOn {
		return err
	}
	outcome, err := do(ctx, dead)
	return d.report(outcome, done, err)
}

func (d *operatorsDesk) replay(ctx context.Context) error {
	count, err := d.operator.CountPublished(ctx, d.span)
	if err != nil {
		return err
	}
	doing, mark := "replayed", broker.Replayed
	if d.force {
		doing, mark = "replayed, and handled again by every consumer,", broker.Forced
	}
	if goOn, err := d.confirmed(ctx, count, doing); !goOn {
		return err
	}
	outcome, left, err := d.operator.Replay(ctx, d.span, mark)
	if err != nil {
		err = fmt.Errorf("%w; go on with --from %s --after %d", err, left.From.UTC().Format(time.RFC3339Nano), left.After)
	}
	return d.report(outcome, "replayed", err)
}

func (d *operatorsDesk) park(ctx context.Context) error {
	order := d.filter.Order
	now, err := d.operator.Waiting(ctx, order)
	if err != nil {
		return err
	}
	if now.Parked == (d.action == "park") {
		state := map[bool]string{true: "parked already", false: "not parked"}[now.Parked]
		fmt.Fprintf(d.stdout, "Order %s is %s, with %s waiting. Nothing is to do.\n", order, state, plural(int64(now.Events)))
		return nil
	}
	fmt.Fprintf(d.stdout, "Order %s would be %sed, with %s waiting, in %s.\n", order, d.action, plural(int64(now.Events)), d.where)
	if goOn, err := d.agreed(ctx); !goOn {
		return err
	}
	do := d.operator.Park
	if d.action == "unpark" {
		do = d.operator.Unpark
	}
	if now, err = do(ctx, order); err != nil {
		return err
	}
	fmt.Fprintf(d.stdout, "Order %s is %sed, with %s waiting.\n", order, d.action, plural(int64(now.Events)))
	return nil
}

// confirmed shows how many events there are to do, and tells whether to go on with them.
func (d *operatorsDesk) confirmed(ctx context.Context, count int64, doing string) (bool, error) {
	d.total = count
	fmt.Fprintf(d.stdout, "%s would be %s in %s.\n", plural(count), doing, d.where)
	if count == 0 {
		return false, nil
	}
	return d.agreed(ctx)
}

// agreed asks whether to go on, unless the command line says.
func (d *operatorsDesk) agreed(ctx context.Context) (bool, error) {
	switch {
	case d.dryRun:
		return false, nil
	case d.yes:
		return true, nil
	case !d.asks:
		return false, errNobodyToAsk
	}
	fmt.Fprint(d.stderr, "Go on? [y/N] ")
	answers := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(d.stdin).ReadString('\n')
		answers <- line
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(d.stderr)
		return false, errors.New("interrupted; nothing was done")
	case answer := <-answers:
		switch strings.ToLower(strings.TrimSpace(answer)) {
		case "y", "yes":
			return true, nil
		}
		if answer == "" { // the end of the input: not even an empty line
			return false, errNobodyToAsk
		}
		fmt.Fprintln(d.stdout, "Nothing was done.")
		return false, nil
	}
}

// errNobodyToAsk: nobody answers at standard input.
var errNobodyToAsk = errors.New("nothing was done: there is no terminal to ask on; say --yes to go on without asking, or --dry-run to only count")

// report shows what was done, and returns what was not as an error.
func (d *operatorsDesk) report(outcome operate.Outcome, done string, err error) error {
	if command.IsTerminal(d.stderr) && !d.shown.IsZero() {
		fmt.Fprint(d.stderr, "\r\033[K")
	}
	fmt.Fprintf(d.stdout, "%s %s.\n", counted(outcome.Done, "was", "were"), done)
	for _, refused := range outcome.Refused {
		fmt.Fprintln(d.stderr, oneLine(refused.Error()))
	}
	switch {
	case err != nil:
		return fmt.Errorf("%d of %s were %s: %w", outcome.Done, plural(d.total), done, err)
	case len(outcome.Refused) > 0:
		return fmt.Errorf("the broker refused %s", plural(int64(len(outcome.Refused))))
	}
	if others := d.total - int64(outcome.Done); others > 0 {
		fmt.Fprintf(d.stdout, "Others were at the rest, %s, meanwhile.\n", plural(others))
	}
	return nil
}

// progress shows how many events are done: in a line that is rewritten on a terminal, and in a new one now and then elsewhere.
func (d *operatorsDesk) progress(done int) {
	every, line := progressElsewhere, "%d of %d\n"
	if command.IsTerminal(d.stderr) {
		every, line = progressOnTerminal, "\r\033[K%d of %d"
	}
	if d.shown.IsZero() || time.Since(d.shown) >= every {
		d.shown = time.Now()
		fmt.Fprintf(d.stderr, line, done, d.total)
	}
}

func plural(events int64) string {
	if events == 1 {
		return "1 event"
	}
	return fmt.Sprintf("%d events", events)
}

// counted is a number of events, with its verb.
func counted(events int, one, many string) string {
	if events == 1 {
		return "1 event " + one
	}
	return plural(int64(events)) + " " + many
}

// who is the operator, as far as the machine knows.
func who() string {
	name, host := fmt.Sprintf("uid %d", os.Getuid()), "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name + "@" + host
}

// commandLine is what the operator typed. It has no secrets: those are in the environment.
func commandLine(args []string) string {
	words := []string{"events"}
	for _, arg := range args {
		if strings.ContainsAny(arg, " \t\n\"'\\") || arg == "" {
			arg = fmt.Sprintf("%q", arg)
		}
		words = append(words, arg)
	}
	return strings.Join(words, " ")
}
