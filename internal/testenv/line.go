package testenv

import (
	"bytes"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
)

// Cut is where a line to the database is cut.
type Cut int

const (
	// BeforeCommit does not pass on the statement that commits.
	BeforeCommit Cut = iota
	// AfterCommit passes it on, and PostgreSQL executes it; its reply is not passed on.
	AfterCommit
	// AfterCommitForGood does likewise, and nobody can connect any more.
	AfterCommitForGood
)

// CutLine returns the address of a proxy before a database, which cuts the first line over which an order is placed.
func CutLine(t testing.TB, address string, where Cut) string {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	p := &proxy{listener: listener, backend: u.Host, where: where}
	go p.serve()
	u.Host = listener.Addr().String()
	return u.String()
}

type proxy struct {
	listener net.Listener
	backend  string
	where    Cut
	once     sync.Once
}

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.backend)
		if err != nil {
			_ = client.Close()
			return
		}
		var cutting atomic.Bool // from the next reply on: what it replies to is executed
		go pass(server, client, func(said []byte) bool {
			if !bytes.Contains(said, []byte("order.created.v1")) { // an argument
				return false
			}
			p.once.Do(func() { cutting.Store(true) })
			if cutting.Load() && p.where == AfterCommitForGood {
				_ = p.listener.Close()
			}
			return cutting.Load() && p.where == BeforeCommit
		})
		go pass(client, server, func([]byte) bool { return cutting.Load() })
	}
}

// pass passes on what is said until one side ends, or the line is cut before something that is said.
func pass(to, from net.Conn, cut func(said []byte) bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil || cut(buf[:n]) {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
