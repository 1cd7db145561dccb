// Idempotent-orders is an order service that never does it twice and never forgets to say so: see README.md.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"idempotent-orders/broker"
	"idempotent-orders/idempotency"
	"idempotent-orders/internal/config"
	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/local"
	"idempotent-orders/internal/ops"
	"idempotent-orders/order"
	"idempotent-orders/server"
	"idempotent-orders/worker"
)

//go:generate env CGO_ENABLED=0 go tool -modfile=tools/go.mod oapi-codegen -config oapi-codegen.yaml openapi.yaml
//go:generate env CGO_ENABLED=0 go tool -modfile=tools/go.mod sqlc generate

//go:embed openapi.yaml
var contract []byte

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // the heap is small: collecting it less often is a tenth more orders for 50 MB
		if os.Getenv("GOMEMLIMIT") == "" {
			debug.SetMemoryLimit(softMemory)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	err := run(ctx, os.Args[1:], getenv, os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "idempotent-orders:", err)
		os.Exit(1)
	}
}

// getenv reads a variable. An empty one counts as not set, but for OPS_ADDR, which is off then.
func getenv(name string) string {
	value, set := os.LookupEnv(name)
	if name == "OPS_ADDR" && set && value == "" {
		return "off"
	}
	return value
}

// softMemory is where the heap is collected as often as it takes not to grow: thousands of connections need some, and five times as
// much is not theirs.
const softMemory = 384 << 20

// errUsage: the command line was wrong, and the user was told.
var errUsage = errors.New("wrong usage")

// parts are the parts of the program that a command runs.
type parts struct {
	server, worker, consumer bool
	migrate                  bool // bring the database up to date first
}

// run is the program: it does what the command line says, until it is done or ctx is.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	command, args, err := parse(args, stdout, stderr)
	if err != nil || command == "help" {
		return err
	}
	cfg, err := config.Read(getenv)
	if err != nil {
		return fmt.Errorf("the configuration is wrong:\n%w\nsee --help", err)
	}
	log := newLog(cfg, stderr)
	connect.LogRedis(log)
	folder, err := local.Folder(getenv)
	if err != nil {
		return err
	}
	switch command {
	case "":
		return serve(ctx, cfg, folder, parts{server: true, worker: true, consumer: true, migrate: true}, log)
	case "server":
		return serve(ctx, cfg, folder, parts{server: true}, log)
	case "worker":
		return serve(ctx, cfg, folder, parts{worker: true}, log)
	case "consumer":
		return serve(ctx, cfg, folder, parts{consumer: true}, log)
	case "events":
		return events(ctx, cfg, folder, args, os.Stdin, stdout, stderr, log)
	case "reconcile":
		return reconcileOrders(ctx, cfg, folder, args, stdout, log)
	default:
		return migrate(ctx, cfg, folder, args[0], stdout, log)
	}
}

// serve runs parts of the program until ctx is done, and stops them: first nothing new is accepted, then what is held is
// finished, then what was started is stopped.
func serve(ctx context.Context, cfg config.Config, folder string, which parts, log *slog.Logger) (err error) {
	log.InfoContext(ctx, "Starting", "config", cfg)
	var listener net.Listener
	if which.server {
		if listener, err = listen(cfg); err != nil {
			return err
		}
		defer listener.Close()
	}
	operators, err := ops.Listen(cfg, log)
	if err != nil {
		return fmt.Errorf("listen on OPS_ADDR %s (set it to another address, or to off): %w", cfg.OpsAddr, err)
	}
	stores, err := open(ctx, cfg, folder, which, log)
	if ctx.Err() != nil && err != nil {
		log.InfoContext(ctx, "Stopped while starting", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	defer stores.close(ctx, log)

	publisher, subscription, err := eventBroker(ctx, cfg, stores, which.consumer, log)
	if err != nil {
		return err
	}
	relay := worker.NewRelay(stores.pool, publisher, log)
	consumer := worker.NewConsumer(stores.pool, subscription, newSender(cfg, log), worker.AbandonedAfter, log)
	hint := broker.NewHint(stores.redis)
	committed := hint.Give
	if which.worker {
		committed = relay.Nudge
	}

	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	var loops sync.WaitGroup
	defer within(loopsTimeout, loops.Wait)
	defer stop()
	loops.Go(func() { ops.Serve(running, operators, cfg.OpsToken, log) })
	if which.worker {
		log.InfoContext(ctx, "Outbox worker started")
		loops.Go(func() { relay.Run(running) })
		loops.Go(func() { broker.OnHint(running, stores.redis, relay.Nudge) })
		trimmer, _ := publisher.(worker.Trimmer) // a broker that keeps nothing is none
		loops.Go(func() { worker.NewSweeper(stores.pool, trimmer, cfg.OutboxRetention, log).Run(running) })
	}
	if which.consumer {
		log.InfoContext(ctx, "Email consumer started")
		loops.Go(func() { consumer.Run(running) })
	}
	if which.server {
		admission := server.NewAdmission(stores.pool, cfg.OutboxMaxAge, log)
		loops.Go(func() { hint.Run(running) })
		loops.Go(func() { admission.Run(running) })
		err = newServer(cfg, stores, admission, committed, log, listener).Serve(ctx, listener)
	} else {
		<-ctx.Done()
	}

	log.InfoContext(ctx, "Stopping")
	stop()
	within(loopsTimeout, loops.Wait)
	switch {
	case cfg.EventBroker == "redis-pubsub" && which.consumer:
		if err := drain(ctx, consumer); err != nil { // what is still in the outbox is safe there
			log.WarnContext(ctx, "Some events that were received may not be mailed, and are not delivered again", "error", err)
		}
	case stores.servers.InProcessRedis:
		err = errors.Join(err, drain(ctx, relay, consumer))
	}
	return err
}

const (
	// loopsTimeout bounds the wait for the relay and the consumer, which give themselves less. What they held when a store
	// is silent is safe: uncommitted in the outbox, or unacknowledged in the stream.
	loopsTimeout = 2500 * time.Millisecond
	// drainTimeout bounds the emptying of what is lost with the process.
	drainTimeout = time.Second
)

func newServer(cfg config.Config, stores *stores, admission *server.Admission, committed func(), log *slog.Logger, listener net.Listener) *server.Server {
	log.Info("Server starting on port " + strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
	return server.New(server.Config{
		Orders:    order.NewStore(stores.pool, cfg.IdempotencyRetention, committed),
		Guard:     idempotency.NewGuard(stores.redis, cfg.IdempotencyRetention, log),
		Admission: admission,
		Callers:   callers(cfg),
		Rates:     server.NewRates(stores.redis, cfg.RateRequests, cfg.RatePeriod, log),
		Pool:      stores.pool,
		Redis:     stores.redis,
		Contract:  contract,
		Log:       log,
	})
}

func callers(cfg config.Config) []server.Caller {
	var callers []server.Caller
	for _, key := range cfg.APIKeys {
		callers = append(callers, server.Caller(key))
	}
	return callers
}

// eventBroker returns the two ends of the broker that EVENT_BROKER names: where the relay publishes, and where the consumer
// receives, if there is to be one.
func eventBroker(ctx context.Context, cfg config.Config, stores *stores, consumer bool, log *slog.Logger) (broker.Publisher, broker.Subscription, error) {
	if cfg.EventBroker == "redis-pubsub" {
		pubSub := broker.NewRedisPubSub(stores.redis, log)
		if !consumer {
			return pubSub, nil, nil // who listens for nobody would count as somebody
		}
		subscription, err := pubSub.Subscribe(context.WithoutCancel(ctx))
		return pubSub, subscription, err
	}
	name, err := os.Hostname()
	if err != nil {
		name = "unknown"
	}
	streams := broker.NewRedisStreams(stores.redis)
	return streams, streams.Subscribe(worker.EmailConsumer, name, worker.AbandonedAfter), nil
}

func newSender(cfg config.Config, log *slog.Logger) worker.Sender {
	switch cfg.EmailSender {
	case "smtp":
		return worker.NewSMTPSender(worker.SMTPConfig(cfg.SMTP))
	case "discard":
		return worker.DiscardSender{}
	default:
		return worker.NewLogSender(log)
	}
}

// drain empties, one after the other, what parts have in front of them: the outbox and the stream before a Redis inside this
// process is lost, and what this process has received when the broker does not keep it.
func drain(ctx context.Context, parts ...interface{ Drain(context.Context) error }) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	var errs []error
	for _, part := range parts {
		errs = append(errs, part.Drain(ctx))
	}
	return errors.Join(errs...)
}

func listen(cfg config.Config) (net.Listener, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort("", strconv.Itoa(cfg.Port)))
	if err != nil {
		return nil, fmt.Errorf("listen on PORT %d (set PORT to use another, 0 for any): %w", cfg.Port, err)
	}
	return listener, nil
}

func newLog(cfg config.Config, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
