package main

import (
	"bufio"
	"io"
	"log"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/emersion/go-smtp"
	"github.com/google/uuid"
)

// mail is a mail that the sink accepted.
type mail struct {
	event, order uuid.UUID // from the Message-ID and the subject; zero when they are none
	to           string
	at           time.Duration // from the start of the storm
}

// sink is an SMTP server that accepts every mail and remembers it.
type sink struct {
	addr   string
	server *smtp.Server
	since  func() time.Duration

	mu    sync.Mutex
	mails []mail // guarded by mu
}

func openSink(since func() time.Duration) (*sink, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &sink{addr: listener.Addr().String(), since: since}
	s.server = smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return &sinkSession{sink: s}, nil }))
	s.server.Domain, s.server.ErrorLog = "mail.example.com", log.New(io.Discard, "", 0)
	go func() { _ = s.server.Serve(listener) }()
	return s, nil
}

func (s *sink) close() { _ = s.server.Close() }

func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.mails)
}

func (s *sink) taken() []mail {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mails
}

type sinkSession struct {
	sink *sink
	to   string
}

func (s *sinkSession) Mail(string, *smtp.MailOptions) error      { return nil }
func (s *sinkSession) Rcpt(to string, _ *smtp.RcptOptions) error { s.to = to; return nil }
func (s *sinkSession) Reset()                                    {}
func (s *sinkSession) Logout() error                             { return nil }

// Data reads a mail to its end: one that was cut off is not accepted.
func (s *sinkSession) Data(r io.Reader) error {
	m := mail{to: s.to}
	text := bufio.NewReader(r)
	for {
		header, err := text.ReadString('\n')
		if err != nil {
			return err
		}
		header = strings.TrimSpace(header)
		if header == "" {
			break
		}
		name, value, _ := strings.Cut(header, ":")
		switch strings.ToLower(name) {
		case "message-id":
			id, _, _ := strings.Cut(strings.Trim(strings.TrimSpace(value), "<>"), "@")
			m.event, _ = uuid.Parse(id)
		case "subject":
			m.order, _ = uuid.Parse(strings.TrimPrefix(strings.TrimSpace(value), "Your order "))
		}
	}
	if _, err := io.Copy(io.Discard, text); err != nil {
		return err
	}
	s.sink.mu.Lock()
	defer s.sink.mu.Unlock()
	m.at = s.sink.since()
	s.sink.mails = append(s.sink.mails, m)
	return nil
}
