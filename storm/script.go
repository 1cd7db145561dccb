package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"
)

// fault is one strike of the script: what is done to whom, when, and how long it lasts.
type fault struct {
	At     time.Duration `json:"at"` // from the start of the storm
	Kind   string        `json:"kind"`
	Target string        `json:"target,omitempty"` // a process or a link; empty when the kind has only one
	For    time.Duration `json:"for,omitempty"`    // until the end of the fault; for a kill, until the process is started again
	Detail string        `json:"detail,omitempty"` // the kind's own choice
}

func (f fault) String() string {
	text := fmt.Sprintf("%8s  %-20s", clock(f.At), f.Kind)
	if f.Target != "" {
		text += " " + f.Target
	}
	if f.Detail != "" {
		text += " (" + f.Detail + ")"
	}
	if f.For > 0 {
		text += " for " + f.For.String()
	}
	return text
}

// clock writes a time from the start of the storm, to a tenth of a second.
func clock(t time.Duration) string {
	return fmt.Sprintf("%02d:%04.1f", int(t.Minutes()), (t % time.Minute).Seconds())
}

// The processes of the program under the storm, and the lines between all parties. A line has its client first.
var (
	serverNames   = []string{"server-1", "server-2"}
	workerNames   = []string{"worker-1", "worker-2"}
	consumerNames = []string{"consumer-1", "consumer-2"}
	processNames  = slices.Concat(serverNames, workerNames, consumerNames)
)

const (
	postgres = "postgres"
	redisDB  = "redis"
	smtpSink = "smtp"
	clients  = "clients"
)

func line(from, to string) string { return from + ">" + to }

// lines returns the names of all lines.
func lines() []string {
	var all []string
	for _, process := range processNames {
		all = append(all, line(process, postgres), line(process, redisDB))
	}
	for _, consumer := range consumerNames {
		all = append(all, line(consumer, smtpSink))
	}
	for _, server := range serverNames {
		all = append(all, line(clients, server))
	}
	return all
}

func linesTo(target string) []string {
	return slices.DeleteFunc(lines(), func(name string) bool { return !isLineTo(name, target) })
}

// span is a range from which a duration is drawn.
type span struct{ least, most time.Duration }

func (s span) draw(r *rand.Rand) time.Duration {
	if s.most == 0 {
		return 0
	}
	return (s.least + time.Duration(r.Int64N(int64(s.most-s.least)+1))).Round(10 * time.Millisecond)
}

// kind is a kind of fault.
type kind struct {
	name    string
	targets []string // one is drawn
	details []string // one is drawn
	lasts   span
	meaning string
}

// The kinds of faults. A span starts at nothing where that is a case of its own: a process that is started again at once.
var kinds = []kind{
	{"kill", processNames, nil, span{0, time.Second}, "SIGKILL; the process is started again when the fault ends"},
	{"freeze", processNames, nil, span{200 * time.Millisecond, 3 * time.Second}, "SIGSTOP, then SIGCONT"},
	{"cut", lines(), nil, span{0, 2 * time.Second}, "the line's connections are closed, new ones are refused"},
	{"slow", lines(), []string{"100ms", "300ms", "800ms"}, span{500 * time.Millisecond, 2 * time.Second}, "each reply on the line is late by so much"},
	{"reset", lines(), nil, span{100 * time.Millisecond, time.Second}, "the line's connections, and new ones, end with TCP RST"},
	{"silent", lines(), nil, span{200 * time.Millisecond, 2 * time.Second}, "the line stays open and passes nothing; what was under way is lost with its connection"},
	{"cut-after-commit", linesTo(postgres), []string{"once", "and stays cut"}, span{time.Second, 3 * time.Second},
		"the line is cut when a statement that commits was sent, and its reply is dropped"},
	{"postgres-terminate", nil, []string{"one", "half", "all"}, span{}, "backends of the program are terminated"},
	{"postgres-crash", nil, nil, span{}, "a backend is killed with SIGKILL: PostgreSQL ends every session, and recovers"},
	{"postgres-stop", nil, nil, span{0, 1500 * time.Millisecond}, "stopped with SIGQUIT (immediate), and started again when the fault ends"},
	{"postgres-freeze", nil, nil, span{200 * time.Millisecond, 3 * time.Second}, "SIGSTOP of every process of PostgreSQL"},
	{"redis-kill", nil, nil, span{0, time.Second}, "SIGKILL; started again with what it had written"},
	{"redis-empty", nil, nil, span{0, time.Second}, "SIGKILL; started again with nothing"},
	{"redis-flush", nil, nil, span{}, "FLUSHALL"},
	{"redis-stall", nil, nil, span{200 * time.Millisecond, 3 * time.Second}, "SIGSTOP, then SIGCONT"},
	{"redis-fill", nil, []string{"allkeys-lru", "allkeys-random", "volatile-ttl", "noeviction"}, span{500 * time.Millisecond, 2 * time.Second},
		"filled to maxmemory, under a policy"},
	{"redis-script-flush", nil, nil, span{}, "SCRIPT FLUSH"},
}

// draw draws the whole script from a seed, before anything starts: the same seed, duration and interval give the same script,
// whatever happens in the storm. Kinds come as cards from a shuffled deck, so that each strikes before one strikes again.
func draw(seed uint64, duration, every time.Duration) []fault {
	r := rand.New(rand.NewPCG(seed, 1))
	var script []fault
	var deck []kind
	for at := every; ; {
		jitter := time.Duration(r.Int64N(int64(every)/4+1)) - every/8
		f := fault{At: (at + jitter).Round(10 * time.Millisecond)}
		if f.At >= duration {
			return script
		}
		if len(deck) == 0 {
			deck = slices.Clone(kinds)
			r.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		k := deck[0]
		deck = deck[1:]
		f.Kind, f.Target, f.Detail = k.name, pick(r, k.targets), pick(r, k.details)
		f.For = min(k.lasts.draw(r), every*3/4)
		script = append(script, f)
		at += every
	}
}

func pick(r *rand.Rand, from []string) string {
	if len(from) == 0 {
		return ""
	}
	return from[r.IntN(len(from))]
}

func printScript(w io.Writer, seed uint64, script []fault) {
	fmt.Fprintf(w, "seed %d: %d faults\n", seed, len(script))
	for _, f := range script {
		fmt.Fprintln(w, f)
	}
}
