package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
)

// lineProxy is a line between two parties, a proxy of Toxiproxy in this process.
type lineProxy struct {
	name   string
	proxy  *toxiproxy.Proxy
	commit *commitCut // of a line to PostgreSQL
}

// toxicTimeout bounds a change of a line. Toxiproxy waits for each connection to pass on what it holds, which one whose
// receiver is frozen does not.
const toxicTimeout = 2 * time.Second

var proxyServer = toxiproxy.NewServer(toxiproxy.NewMetricsContainer(prometheus.NewRegistry()), zerolog.Nop())

// openLine opens a line to an address.
func openLine(name, upstream string) (*lineProxy, error) {
	port, err := stablePort()
	if err != nil {
		return nil, err
	}
	l := &lineProxy{name: name, proxy: toxiproxy.NewProxy(proxyServer, name, "127.0.0.1:"+port, upstream)}
	if isLineTo(name, postgres) {
		l.commit = &commitCut{}
		commitCuts.Store(name, l.commit)
		for _, direction := range []string{"upstream", "downstream"} {
			if err := l.add("commits", commitToxicName, direction, map[string]any{"line": name}); err != nil {
				return nil, err
			}
		}
	}
	if err := l.proxy.Start(); err != nil {
		return nil, fmt.Errorf("open the line %s: %w", name, err)
	}
	return l, nil
}

func (l *lineProxy) addr() string { return l.proxy.Listen }

// retarget sends the line's connections to another address from now on.
func (l *lineProxy) retarget(upstream string) error {
	l.proxy.Lock()
	same := l.proxy.Upstream == upstream
	l.proxy.Unlock()
	if same {
		return nil
	}
	return l.proxy.Update(&toxiproxy.Proxy{Listen: l.proxy.Listen, Upstream: upstream, Enabled: true})
}

func (l *lineProxy) cut() { l.proxy.Stop() }

// mend opens the line again. Its port lies outside the range from which the system takes ports, so it is still free.
func (l *lineProxy) mend() error {
	if err := l.proxy.Start(); err != nil && err != toxiproxy.ErrProxyAlreadyStarted {
		return fmt.Errorf("mend the line %s: %w", l.name, err)
	}
	return nil
}

func (l *lineProxy) add(name, kind, direction string, attributes map[string]any) error {
	spec, err := json.Marshal(map[string]any{"name": name + "_" + direction, "type": kind, "stream": direction, "attributes": attributes})
	if err != nil {
		return err
	}
	return l.change(func() error {
		_, err := l.proxy.Toxics.AddToxicJson(strings.NewReader(string(spec)))
		return err
	})
}

func (l *lineProxy) remove(name, direction string) error {
	return l.change(func() error { return l.proxy.Toxics.RemoveToxic(context.Background(), name+"_"+direction) })
}

// change changes the toxics of the line. When that hangs at a connection, all of them are cut, which lets it go on.
func (l *lineProxy) change(do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	for range 3 {
		select {
		case err := <-done:
			return err
		case <-time.After(toxicTimeout):
			l.cut()
			if err := l.mend(); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("the line %s could not be changed", l.name)
}

// stablePort returns a free port below those that the system gives to outgoing connections: one that is closed for a while is
// not taken by another's connection.
func stablePort() (string, error) {
	for range 1000 {
		port := fmt.Sprint(20000 + portsTaken.Add(1)%12000)
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err == nil {
			return port, l.Close()
		}
	}
	return "", fmt.Errorf("no free port between 20000 and 32000")
}

var portsTaken atomic.Int64

func init() {
	portsTaken.Store(time.Now().UnixNano() % 12000) // beside another storm
	toxics.Register(commitToxicName, &commitToxic{})
}

const commitToxicName = "cut_after_commit"

// commitCut cuts a line to PostgreSQL exactly after a statement that commits was sent. Then the server commits, and who asked
// does not hear of it.
type commitCut struct {
	armed    atomic.Bool
	dropping atomic.Bool // replies are dropped, those of the line's other connections too
	struck   chan struct{}
	mu       sync.Mutex
}

// arm returns a channel that is closed when the line was cut.
func (c *commitCut) arm() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.struck = make(chan struct{})
	c.armed.Store(true)
	return c.struck
}

func (c *commitCut) disarm() { c.armed.Store(false) }

// commitCuts are the states that commitToxics share, by the name of their line: Toxiproxy makes a toxic from JSON.
var commitCuts sync.Map

// replyTime is how long replies are dropped after a commit was sent: as long as PostgreSQL may take to commit.
const replyTime = 30 * time.Millisecond

// commitToxic stands on every line to PostgreSQL, in both directions, from the first byte of each connection: it has to
// follow the messages.
type commitToxic struct {
	Line string `json:"line"`
}

// NewState makes the state of one connection in one direction.
func (t *commitToxic) NewState() any { return &frontend{placing: map[string]bool{}} }

// Pipe passes on what comes. The direction shows in the first bytes: a reply never begins with the zero of a start-up message.
func (t *commitToxic) Pipe(stub *toxics.ToxicStub) {
	shared, _ := commitCuts.Load(t.Line)
	cut := shared.(*commitCut)
	conn := stub.State.(*frontend)
	for {
		select {
		case <-stub.Interrupt:
			return
		case chunk := <-stub.Input:
			if chunk == nil {
				stub.Close()
				return
			}
			if cut.dropping.Load() { // a reply, or what comes after the commit on another connection
				stub.Close()
				return
			}
			commits := conn.read(chunk.Data)
			if commits < 0 || !cut.armed.CompareAndSwap(true, false) {
				stub.Output <- chunk
				continue
			}
			cut.dropping.Store(true)
			stub.Output <- &stream.StreamChunk{Data: chunk.Data[:commits], Timestamp: chunk.Timestamp}
			time.Sleep(replyTime) // a part of the fault: the reply is on its way meanwhile
			stub.Close()
			cut.dropping.Store(false)
			close(cut.struck)
			return
		}
	}
}

// frontend follows what one client says to PostgreSQL, or would if it were the client.
type frontend struct {
	begun   bool
	ignore  bool            // these are replies, or not what this understands
	rest    []byte          // an incomplete message
	placing map[string]bool // prepared statements that place orders, which commit by themselves
	bound   bool            // one of them is to be executed with the next Sync
}

// read takes the next bytes, and returns where in them a message ends that commits, or a negative number.
func (f *frontend) read(data []byte) int {
	if f.ignore || len(data) == 0 {
		return -1
	}
	if !f.begun && len(f.rest) == 0 && data[0] != 0 {
		f.ignore = true
		return -1
	}
	before := len(f.rest)
	buffer := append(f.rest, data...)
	at, commits := 0, -1
	for {
		header := 5
		if !f.begun {
			header = 4 // a start-up message has no type
		}
		if len(buffer)-at < header {
			break
		}
		size := int(binary.BigEndian.Uint32(buffer[at+header-4:])) + header - 4
		if size < header {
			f.ignore = true
			return -1
		}
		if len(buffer)-at < size {
			break
		}
		if f.begun && f.commits(buffer[at], buffer[at+header:at+size]) && commits < 0 {
			commits = at + size - before
		}
		f.begun = true
		at += size
	}
	f.rest = append([]byte(nil), buffer[at:]...)
	return commits
}

// commits tells whether PostgreSQL will commit on this message.
func (f *frontend) commits(kind byte, body []byte) bool {
	switch kind {
	case 'P':
		var parse pgproto3.Parse
		if parse.Decode(body) == nil {
			f.placing[parse.Name] = strings.Contains(parse.Query, "INSERT INTO orders")
		}
	case 'B':
		var bind pgproto3.Bind
		if bind.Decode(body) == nil && f.placing[bind.PreparedStatement] {
			f.bound = true
		}
	case 'S':
		bound := f.bound
		f.bound = false
		return bound
	case 'Q':
		var query pgproto3.Query
		return query.Decode(body) == nil && strings.EqualFold(strings.TrimSpace(query.String), "commit")
	}
	return false
}
