package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"idempotent-orders/internal/testbed"
)

const (
	overloadFactor  = 10
	overloadSeconds = 60
	atPeakSeconds   = 20
	overloadWorkers = 8000 // requests under way from the generator
	overloadMany    = 4000 // connections that send again at once
	manyConns       = 10_000
	floodConns      = 256
	callerRate      = 250  // requests a second that each caller may send,
	callerRateMost  = 1000 // or as many
	behavedRate     = 200  // and that one sends who behaves
	behavedSeconds  = 20
	newcomerEvery   = 50 * time.Millisecond
	recoveryLimit   = 30 * time.Second
)

// overload offers a multiple of the peak, open loop, and then asks how soon it is over. The generator has processors of its own: it
// would take more from what it overloads than what that has to refuse.
func (l *lab) overload(ctx context.Context, factor float64, underWay, seconds int) (sample, error) {
	peak := l.peak(server)
	if peak < 1 {
		return sample{}, errors.New("the rate follows from the peak; measure it in the same run: --only intake,overload")
	}
	o := load{Rate: int(factor * peak), Workers: underWay, Seconds: seconds, OwnProcessors: true}
	s, err := l.overloaded(ctx, l.open, o, fmt.Sprintf("asked for %d/s", o.Rate))
	if own := l.taken[nameAtPeak]; len(own) > 0 {
		s.note += fmt.Sprintf("; %.2f of what this generator gets with %d under way", s.rate/own[0].rate, clientsMany)
	}
	return s, err
}

// overloadClosed has many connections send, and again at once when they are refused: that offers more than an open loop can on
// the same machine.
func (l *lab) overloadClosed(ctx context.Context) (sample, error) {
	return l.overloaded(ctx, l.closed, load{Connections: overloadMany, Seconds: overloadSeconds}, "latencies with those of refusals")
}

func (l *lab) overloaded(ctx context.Context, send func(context.Context, load) (answers, error), o load, note string) (sample, error) {
	if err := l.reset(ctx); err != nil {
		return sample{}, err
	}
	p, err := l.start(ctx, server, database)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	normal, err := l.closed(ctx, load{Addr: p.addr, Connections: 1, Seconds: 1, Body: body})
	if err != nil {
		return sample{}, err
	}
	o.Addr, o.Body = p.addr, body
	if o.OwnProcessors {
		together, err := l.apart(p)
		defer together()
		if err != nil {
			return sample{}, err
		}
	}
	watched, refused := l.watch(p), comeAnew(ctx, p.addr)
	a, err := send(ctx, o)
	newcomers := refused()
	if err != nil {
		return sample{}, err
	}
	s := sampleOf(a)
	s.used, s.failed = watched(), a.Broken // to refuse is what is wanted
	recovered, err := l.recovers(ctx, p, normal.P99)
	if err != nil {
		return s, err
	}
	seconds := a.Micros / 1e6
	s.note = fmt.Sprintf("%s, sent %.0f/s; refused %.0f/s", note, float64(a.Requests+a.Broken)/seconds, float64(a.Refused)/seconds)
	if a.Apart {
		s.note += fmt.Sprintf(" with a p99 of %.0f ms", a.Refusal/1000)
	}
	if n := len(newcomers); n > 0 {
		slices.Sort(newcomers)
		s.note += fmt.Sprintf(", %d over a new connection with one of %.1f ms", n, newcomers[n*99/100]/1000)
	}
	if peak := l.peak(server); peak > 0 {
		s.note += fmt.Sprintf("; %.2f of the peak", s.rate/peak)
	}
	s.note += fmt.Sprintf("; normal again after %.1f s", recovered.Seconds())
	return s, nil
}

// apart keeps a contender and the stores on the first half of the processors, where load with OwnProcessors is not made. The returned
// function gives them all back.
func (l *lab) apart(p *process) (together func(), err error) {
	if !l.canBeApart() {
		return func() {}, nil
	}
	keep := func(first, last int) error {
		where := fmt.Sprintf("%d-%d", first, last)
		for _, pid := range []int{l.postgres.Pid(), l.redis.Pid(), p.cmd.Process.Pid} {
			if said, err := exec.Command(l.taskset, "-apc", where, strconv.Itoa(pid)).CombinedOutput(); err != nil {
				return fmt.Errorf("give a process processors of its own: %w: %s", err, said)
			}
			for child := range testbed.Children(pid) {
				_ = exec.Command(l.taskset, "-apc", where, strconv.Itoa(child)).Run() // it may have ended
			}
		}
		return nil
	}
	return func() { _ = keep(0, runtime.NumCPU()-1) }, keep(0, runtime.NumCPU()/2-1)
}

// canBeApart tells whether the generator and what it measures can have processors of their own.
func (l *lab) canBeApart() bool { return l.taskset != "" && runtime.NumCPU() > 1 }

// comeAnew has somebody come anew every 50 ms, and place an order over a connection of its own. The returned function ends that, and
// returns for those who were refused how long it took from the connect to the answer, in microseconds.
func comeAnew(ctx context.Context, addr string) func() []float64 {
	ctx, stop := context.WithCancel(ctx)
	all := make(chan []float64, 1)
	go func() {
		var refused []float64
		key, ticker := freshKeys(), time.NewTicker(newcomerEvery)
		defer ticker.Stop()
		for n := uint64(0); ; n++ {
			select {
			case <-ctx.Done():
				all <- refused
				return
			case <-ticker.C:
			}
			if took, status := comesAnew(addr, key(n)); status >= 400 {
				refused = append(refused, micros(took))
			}
		}
	}()
	return func() []float64 { stop(); return <-all }
}

// comesAnew connects, places an order, and returns how long that took; the status is 0 when there was no answer.
func comesAnew(addr, key string) (took time.Duration, status int) {
	start := time.Now()
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return 0, 0
	}
	defer conn.Close()
	_ = conn.SetDeadline(start.Add(5 * time.Second))
	status, _ = exchange(conn, bufio.NewReader(conn), rawRequest(load{Addr: addr, Body: body}, key))
	return time.Since(start), status
}

// recovers returns how long it takes until ten orders in a row are placed in no more than the time that was normal.
func (l *lab) recovers(ctx context.Context, p *process, normal float64) (time.Duration, error) {
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	reader, key := bufio.NewReader(conn), freshKeys()
	start, row := time.Now(), 0
	for n := uint64(0); row < 10; n++ {
		sent := time.Now()
		if sent.Sub(start) > recoveryLimit || ctx.Err() != nil {
			return 0, fmt.Errorf("%s after the load it is not back to normal, %.1f ms", recoveryLimit, normal/1000)
		}
		_ = conn.SetDeadline(sent.Add(5 * time.Second))
		status, err := exchange(conn, reader, rawRequest(load{Addr: p.addr, Body: body}, key(n)))
		if err != nil {
			return 0, err
		}
		if row++; status != 200 || micros(time.Since(sent)) > normal {
			row = 0
		}
	}
	return time.Since(start), nil
}

// beside has one caller send 200 orders a second while another sends a load, if it is given one. Both may send so many a second.
func (l *lab) beside(ctx context.Context, rate int, other *load) (sample, error) {
	if err := l.reset(ctx); err != nil {
		return sample{}, err
	}
	p, err := l.start(ctx, server, database, "API_KEYS="+apiKey("behaves")+","+apiKey("other"), fmt.Sprintf("RATE_LIMIT=%d/s", rate))
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	var others answers
	group, _ := errgroup.WithContext(ctx)
	if other != nil {
		o := *other
		o.Addr, o.Seconds, o.Body, o.Token = p.addr, behavedSeconds+2, body, tokenOf("other")
		send := l.closed
		if o.Rate > 0 {
			send = l.open
		}
		group.Go(func() (err error) {
			others, err = send(ctx, o)
			return err
		})
	}
	watched := l.watch(p)
	a, err := l.open(ctx, load{Addr: p.addr, Rate: behavedRate, Seconds: behavedSeconds, Body: body, Token: tokenOf("behaves")})
	if err := errors.Join(err, group.Wait()); err != nil {
		return sample{}, err
	}
	s := sampleOf(a)
	s.used = watched()
	if other != nil {
		seconds := others.Micros / 1e6
		s.note = fmt.Sprintf("the other got %.0f orders/s and %.0f refusals/s", float64(others.Requests-others.Refused)/seconds, float64(others.Refused)/seconds)
	}
	return s, nil
}

// besideMany opens many connections, has each do something once, and then places orders over others while they stay open.
func (l *lab) besideMany(ctx context.Context, use func(conn net.Conn, addr string) error) (sample, error) {
	if err := l.reset(ctx); err != nil {
		return sample{}, err
	}
	p, err := l.start(ctx, server, database)
	if err != nil {
		return sample{}, err
	}
	defer p.stop()
	conns := make([]net.Conn, manyConns)
	defer func() {
		for _, conn := range conns {
			if conn != nil {
				_ = conn.Close()
			}
		}
	}()
	group, _ := errgroup.WithContext(ctx)
	group.SetLimit(clientsSome)
	for i := range conns {
		group.Go(func() (err error) {
			if conns[i], err = net.Dial("tcp", p.addr); err != nil {
				return err
			}
			_ = conns[i].SetDeadline(time.Now().Add(time.Minute))
			return use(conns[i], p.addr)
		})
	}
	if err := group.Wait(); err != nil {
		return sample{}, fmt.Errorf("open %d connections (they need as many files, ulimit -n, here and in the server): %w", manyConns, err)
	}
	before := peakMemory(p.cmd.Process.Pid)
	s, _, _, err := l.measureClosed(ctx, p, load{Connections: clientsSome, Body: body})
	s.note = fmt.Sprintf("%d MB before the load", before/1_000_000)
	return s, err
}

// askOnce places an order, after which the connection is idle.
func askOnce(conn net.Conn, addr string) error {
	_, err := exchange(conn, bufio.NewReaderSize(conn, 512), rawRequest(load{Addr: addr, Body: body}, oneKey))
	return err
}

// sendHalf sends an order but for the end of its body, which the server waits for up to ten seconds.
func sendHalf(conn net.Conn, addr string) error {
	request := rawRequest(load{Addr: addr, Body: body}, oneKey)
	_, err := io.WriteString(conn, request[:len(request)-1])
	return err
}
