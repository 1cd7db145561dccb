package main

import (
	"context"
	"fmt"
	"time"
)

// sample is one taking of a measurement.
type sample struct {
	rate     float64 // in the measurement's unit
	p50, p99 float64 // microseconds; 0: not measured
	failed   int     // requests that were answered wrongly or not at all
	used     usage
	load     float64 // cores that the load generator used
	note     string
}

// measurement is one line of the report. Its name stands for it everywhere.
type measurement struct {
	group    string // what --only names
	name     string
	unit     string
	settings string
	long     bool // only with --long
	once     bool // in the first round only
	ours     bool // the project is what is measured
	take     func(ctx context.Context) (sample, error)
}

const (
	clientsMany = 256
	clientsSome = 64
	drained     = 200_000
	drainedLong = 1_000_000
	fullOrders  = 5_000_000
	statement   = 128 // rows in a statement, scripts in a pipeline
	idleFor     = 20 * time.Second
)

// Names that the goals ask for.
const (
	nameOfCaller     = "intake with API keys, 64 connections"
	nameRedis        = "Redis, reserve script pipelined"
	nameReplay       = "replay of one key"
	nameMismatch     = "mismatch"
	nameConflict     = "conflict"
	nameOpen         = "open loop, the server at half of its peak"
	nameOpenNaive    = "open loop, naive at the same rate, or at its own peak if that is lower"
	nameOpenOwn      = "open loop, naive at half of its own peak"
	nameNoSweep      = "open loop at 1,000/s beside a worker with nothing to sweep"
	nameSweep        = "open loop at 1,000/s beside a worker that sweeps everything"
	nameAlone        = "open loop at 200/s of one caller, alone"
	nameAtPeak       = "open loop, the server at its peak"
	nameOverload     = "overload, 4,000 connections"
	nameOverloadOpen = "overload, open loop"
	nameRedrive      = "mailed after Redis forgot 100,000 events"
	nameEndToEnd     = "end to end"
	nameIdle         = "idle"
	nameFull         = "intake into 5,000,000 orders, 256 connections"
	unitOrders       = "orders/s"
	unitAnswers      = "answers/s"
	unitEvents       = "events/s"
	unitSeconds      = "s"
	unitPercentage   = "% of a core"
)

func nameOf(contender string, connections int) string {
	what := map[string]string{
		server: "intake", naiveServer: "naive server",
		emptyServer: "empty handler", readingServer: "handler that reads", waitingServer: "handler that reads and waits twice",
	}[contender]
	return what + ", " + plural(connections, "connection")
}

func namePgbench(mode string, clients int) string {
	return fmt.Sprintf("pgbench, one transaction an order, %s, %s", mode, plural(clients, "client"))
}

func namePgbenchMany(clients int) string {
	return fmt.Sprintf("pgbench, %d orders a statement, %s", statement, plural(clients, "client"))
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func nameDrain(events int, held bool) string {
	if held {
		return nameDrain(events, false) + " under a held snapshot"
	}
	return fmt.Sprintf("relay drain of %s events", pretty(float64(events)))
}

// measurements returns everything there is to measure, in the order in which a round takes it: contenders that are
// compared stand near each other.
func (l *lab) measurements() []measurement {
	var all []measurement
	closed := func(group, contender string, connections int) {
		unit := unitOrders
		if bare[contender] != nil {
			unit = unitAnswers
		}
		all = append(all, measurement{group: group, name: nameOf(contender, connections), unit: unit, ours: contender == server,
			settings: l.loadSettings(connections) + ", fresh keys",
			take: func(ctx context.Context) (sample, error) {
				return l.intake(ctx, contender, l.pool, load{Connections: connections})
			}})
	}
	sameKey := func(name, settings string, take func(context.Context) (sample, error)) {
		all = append(all, measurement{group: "same-key", name: name, unit: unitAnswers, ours: true,
			settings: l.loadSettings(clientsSome) + ", " + settings, take: take})
	}
	open := func(name string, take func(context.Context) (sample, error)) {
		all = append(all, measurement{group: "open", name: name, unit: unitOrders, ours: name == nameOpen,
			settings: fmt.Sprintf("vegeta, fixed rate, at most 1024 under way, %d s after 1 s of warm-up, fresh keys", l.seconds), take: take})
	}
	drain := func(events int, held bool) {
		all = append(all, measurement{group: "drain", name: nameDrain(events, held), unit: unitEvents, ours: true, long: events > drained,
			settings: "one `worker`; from the first batch in the stream to the last",
			take:     func(ctx context.Context) (sample, error) { return l.drain(ctx, events, held) }})
	}

	closed("empty", emptyServer, clientsSome)
	closed("empty", emptyServer, clientsMany)
	closed("empty", readingServer, clientsSome)
	closed("empty", waitingServer, clientsMany)
	for _, clients := range []int{16, 64} {
		for _, mode := range []string{"prepared", "simple"} {
			all = append(all, l.pgbenchOne(mode, clients))
		}
	}
	for _, clients := range []int{1, 2, 4} {
		all = append(all, l.pgbenchMany(clients))
	}
	all = append(all, measurement{group: "redis", name: nameRedis, unit: "scripts/s", take: l.scripts,
		settings: fmt.Sprintf("lua/reserve.lua, EVALSHA, fresh keys, %d a pipeline, 2 connections, %d s", statement, l.seconds)})
	for _, connections := range []int{1, clientsSome, clientsMany} {
		closed("naive", naiveServer, connections)
	}
	for _, connections := range []int{1, 16, clientsSome, clientsMany} {
		closed("intake", server, connections)
		if connections == clientsSome {
			all = append(all, measurement{group: "intake", name: nameOfCaller, unit: unitOrders, ours: true, take: l.intakeOfCaller,
				settings: l.loadSettings(connections) + ", fresh keys, one of 3 callers"})
		}
	}
	all = append(all, measurement{group: "full", name: nameFull, unit: unitOrders, ours: true, long: true,
		settings: l.loadSettings(clientsMany) + ", fresh keys; only the outbox is emptied", take: l.intakeIntoFull})
	sameKey(nameReplay, "one committed key, all 200 and replayed", l.replay)
	sameKey(nameMismatch, "one committed key, another amount, all 422", l.mismatch)
	sameKey(nameConflict, "one key that another holds in Redis, all 409", l.conflict)
	open(nameOpen, func(ctx context.Context) (sample, error) { return l.openLoop(ctx, server, l.peak(server)/2) })
	open(nameOpenNaive, func(ctx context.Context) (sample, error) {
		return l.openLoop(ctx, naiveServer, min(l.peak(server)/2, l.peak(naiveServer)))
	})
	open(nameOpenOwn, func(ctx context.Context) (sample, error) { return l.openLoop(ctx, naiveServer, l.peak(naiveServer)/2) })
	for _, old := range []bool{false, true} {
		all = append(all, measurement{group: "sweep", name: map[bool]string{false: nameNoSweep, true: nameSweep}[old], unit: unitOrders, ours: true, long: true,
			settings: fmt.Sprintf("vegeta, fixed rate, %d s after 1 s of warm-up, fresh keys; in the tables %d days of %d published events, as many that left the archive, and %d keys",
				sweepSeconds, sweptDays, sweptEvents, sweptKeys),
			take: func(ctx context.Context) (sample, error) { return l.besideSweep(ctx, old) }})
	}
	all = append(all,
		measurement{group: "overload", name: nameAtPeak, unit: unitOrders, once: true,
			take:     func(ctx context.Context) (sample, error) { return l.overload(ctx, 1, clientsMany, atPeakSeconds) },
			settings: fmt.Sprintf("vegeta, as much as the peak, at most %d under way, %d s after 1 s of warm-up, fresh keys%s", clientsMany, atPeakSeconds, l.apartSettings())},
		measurement{group: "overload", name: nameOverloadOpen, unit: unitOrders, once: true,
			take: func(ctx context.Context) (sample, error) {
				return l.overload(ctx, overloadFactor, overloadWorkers, overloadSeconds)
			},
			settings: fmt.Sprintf("vegeta, %d times the peak, at most %d under way, %d s after 1 s of warm-up, fresh keys%s", overloadFactor, overloadWorkers, overloadSeconds, l.apartSettings())},
		measurement{group: "overload", name: nameOverload, unit: unitOrders, once: true,
			take: l.overloadClosed, settings: fmt.Sprintf("%d connections for %d s, each sends again at once, fresh keys", overloadMany, overloadSeconds)},
		measurement{group: "overload", name: "intake beside 10,000 idle connections", unit: unitOrders, once: true,
			take:     func(ctx context.Context) (sample, error) { return l.besideMany(ctx, askOnce) },
			settings: l.loadSettings(clientsSome) + ", fresh keys"},
		measurement{group: "overload", name: "intake beside 10,000 clients whose body does not come", unit: unitOrders, once: true,
			take:     func(ctx context.Context) (sample, error) { return l.besideMany(ctx, sendHalf) },
			settings: l.loadSettings(clientsSome) + ", fresh keys"})
	beside := func(name, settings string, rate int, other *load) {
		all = append(all, measurement{group: "flood", name: name, unit: unitOrders, ours: true,
			settings: fmt.Sprintf("vegeta, fixed rate, %d s after 1 s of warm-up, fresh keys, RATE_LIMIT=%d/s%s", behavedSeconds, rate, settings),
			take:     func(ctx context.Context) (sample, error) { return l.beside(ctx, rate, other) }})
	}
	beside(nameAlone, "", callerRate, nil)
	for _, rate := range []int{callerRate, callerRateMost} {
		beside(nameBehaves(rate), "; the other: vegeta, fixed rate", rate, &load{Rate: rate})
		beside(nameFlooded(rate), fmt.Sprintf("; the flood: %d connections, each sends again at once", floodConns), rate, &load{Connections: floodConns})
	}
	for _, events := range []int{drained, drainedLong} {
		drain(events, false)
		drain(events, true)
	}
	for _, rate := range []int{deliveryRate, deliveryRateMost} {
		all = append(all, measurement{group: "delivery", name: nameDelay(rate), unit: unitOrders, ours: true,
			settings: fmt.Sprintf("vegeta, fixed rate, %d s after 1 s of warm-up, fresh keys; `server` and `worker`; p50 and p99 are from commit to stream", l.seconds),
			take:     func(ctx context.Context) (sample, error) { return l.delay(ctx, rate) }})
	}
	all = append(all, measurement{group: "delivery", name: nameRedrive, unit: unitSeconds, ours: true, take: l.redrive,
		settings: fmt.Sprintf("`worker` and `consumer`; Redis is killed with as many published and not mailed, and started again empty %s later; from when it answers until the last inbox row is `sent`", redisAway)})
	all = append(all, measurement{group: "end-to-end", name: nameEndToEnd, unit: unitOrders, ours: true, take: l.endToEnd,
		settings: l.loadSettings(clientsMany) + ", fresh keys; server, worker and consumer in one process, until the last inbox row is `sent`"})
	return append(all, measurement{group: "idle", name: nameIdle, unit: unitPercentage, ours: true, once: true, take: l.idle,
		settings: fmt.Sprintf("server, worker and consumer in one process, nothing to do, %s", idleFor)})
}

func nameBehaves(rate int) string {
	return fmt.Sprintf("open loop at 200/s of one caller, beside another that sends what it may, %s/s", pretty(float64(rate)))
}

func nameFlooded(rate int) string {
	return fmt.Sprintf("open loop at 200/s of one caller, beside another that may send %s/s, and floods", pretty(float64(rate)))
}

func nameDelay(rate int) string {
	return fmt.Sprintf("from commit to stream at %s/s", pretty(float64(rate)))
}

// apartSettings names who has which processors.
func (l *lab) apartSettings() string {
	if !l.canBeApart() {
		return "; the generator takes from the processors of what it measures (no taskset, or only one)"
	}
	return "; the generator has half of the processors for itself, and what it measures the other half"
}

// loadSettings names the generator of a closed loop and its settings.
func (l *lab) loadSettings(connections int) string {
	if l.wrk == "" {
		return fmt.Sprintf("vegeta, closed loop, %s, %d s", plural(connections, "connection"), l.seconds)
	}
	return fmt.Sprintf("wrk -t1 -c%d -d%ds", connections, l.seconds)
}
