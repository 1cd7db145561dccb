package worker

import (
	"context"
	"crypto/tls"
	"embed"
	"errors"
	"fmt"
	htmltemplate "html/template"
	"net"
	netmail "net/mail"
	"regexp"
	"strings"
	"sync"
	"text/template"
	"time"

	"github.com/wneessen/go-mail"
)

// ErrRefused: this mail can never be sent, whenever it is tried. Any other error of a Sender means: not now.
var ErrRefused = errors.New("the mail can never be sent")

const (
	// dialTimeout bounds the wait for a connection to the SMTP server; sendTimeout and the caller bound the conversation.
	dialTimeout = 5 * time.Second
	// keptTimeout is how long a connection is kept for the next mail. Servers close idle ones too, after minutes.
	keptTimeout = 10 * time.Second
	// noopTimeout bounds the question whether a kept connection still works, and the farewell on it.
	noopTimeout = 2 * time.Second
)

//go:embed templates
var templates embed.FS

var (
	textBody = template.Must(template.ParseFS(templates, "templates/confirmation.txt"))
	htmlBody = htmltemplate.Must(htmltemplate.ParseFS(templates, "templates/confirmation.html"))
)

// SMTPConfig says how mails reach an SMTP server.
type SMTPConfig struct {
	Addr     string          // host:port
	User     string          // empty: without authentication
	Password string          // only ever sent over TLS, if TLS is required or implicit
	TLS      string          // required and opportunistic are STARTTLS, implicit is TLS from the first byte, or none
	From     netmail.Address // in ASCII
	ToDomain string          // where the user ids are mailboxes
}

// SMTPSender sends each mail through an SMTP server. It is safe for concurrent use: each conversation has a connection of its
// own, which is kept a little for the next mail: seven times as many mails with TLS, measured on one machine.
type SMTPSender struct {
	config SMTPConfig
	tls    *tls.Config

	mu   sync.Mutex
	kept []*conversation // guarded by mu; the last was used last
}

// NewSMTPSender returns a sender through the SMTP server of a configuration that was checked. It connects with the first mail.
func NewSMTPSender(config SMTPConfig) *SMTPSender {
	host, _, _ := net.SplitHostPort(config.Addr)
	return &SMTPSender{config: config, tls: &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}}
}

// Send returns nil when the server has taken responsibility for the mail. An error wraps ErrRefused when the user id is no
// mailbox, or the server refused the mail for ever. After any other error the mail shall be sent again. It was not accepted,
// unless the connection broke between the server's decision and its answer; the second mail then has the same Message-ID.
func (s *SMTPSender) Send(ctx context.Context, email Email) error {
	to, err := s.recipient(email.UserID)
	if err != nil {
		return err
	}
	return s.sendTo(ctx, to, email)
}

func (s *SMTPSender) sendTo(ctx context.Context, to string, email Email) error {
	msg, err := s.compose(to, email)
	if err != nil {
		return err
	}
	err = s.deliver(ctx, msg)
	switch {
	case err == nil:
		return nil
	case isRefusal(err):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	case ctx.Err() != nil: // err only tells what was interrupted
		return fmt.Errorf("use the SMTP server at %s (SMTP_ADDR): %w: %w", s.config.Addr, context.Cause(ctx), err)
	default:
		return fmt.Errorf("use the SMTP server at %s (SMTP_ADDR): %w", s.config.Addr, err)
	}
}

// mailboxName is what a user id must be to be the name of a mailbox: less than RFC 5321 allows. Servers are known to route by %, !
// and @ in a name to other domains, and to take a leading - for an option.
var mailboxName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_+-]*(\.[A-Za-z0-9_+-]+)*$`)

// recipient returns the address of a user: the user id, at the one domain that is configured. A user id is what a stranger
// chose, so it is never taken for a whole address: whoever may place orders could have mails sent to anybody.
func (s *SMTPSender) recipient(userID string) (string, error) {
	if len(userID) > 64 || !mailboxName.MatchString(userID) {
		return "", fmt.Errorf("%w: user id %q is not the name of a mailbox", ErrRefused, userID)
	}
	return userID + "@" + s.config.ToDomain, nil
}

// compose returns the mail. Nothing that a stranger chose stands in its headers but the recipient; in its texts the user id is
// one line.
func (s *SMTPSender) compose(to string, email Email) (*mail.Msg, error) {
	_, domain, _ := strings.Cut(s.config.From.Address, "@")
	data := struct {
		Order, User string
		Amount      int64
	}{email.OrderID.String(), oneLine(email.UserID), email.Amount}
	msg := mail.NewMsg(mail.WithNoDefaultUserAgent())
	msg.FromMailAddress(&s.config.From)
	msg.ToMailAddress(&netmail.Address{Address: to})
	msg.Subject("Your order " + data.Order)
	msg.SetMessageIDWithValue(email.EventID.String() + "@" + domain)
	msg.SetGenHeader("Auto-Submitted", "auto-generated") // RFC 3834: no out-of-office notices, please
	if err := msg.SetBodyTextTemplate(textBody, data); err != nil {
		return nil, fmt.Errorf("write the text of a mail: %w", err)
	}
	if err := msg.AddAlternativeHTMLTemplate(htmlBody, data); err != nil {
		return nil, fmt.Errorf("write the HTML of a mail: %w", err)
	}
	return msg, nil
}

// deliver hands the mail to the server, over a connection that was kept if one still works.
func (s *SMTPSender) deliver(ctx context.Context, msg *mail.Msg) error {
	for c := s.take(); c != nil; c = s.take() {
		if err := c.send(ctx, msg); !isStale(err) {
			return s.keep(c, err)
		}
	}
	c, err := s.dial(ctx)
	if err != nil {
		return err
	}
	return s.keep(c, c.send(ctx, msg))
}

// isStale tells whether a conversation failed before the server was asked anything about the mail, as when the connection was
// closed, or enough mails were sent over it.
func isStale(err error) bool {
	var failed *mail.SendError
	return errors.As(err, &failed) && (failed.Reason == mail.ErrConnCheck || failed.Reason == mail.ErrSMTPMailFrom)
}

// isRefusal tells whether the server refused a mail for its recipient or its text, and for ever. What it refuses for a policy
// (5.7.x: no relaying, no authentication, a blocked sender) is a matter of configuration, here or there, and concerns every
// mail alike; so does a sender that is refused.
func isRefusal(err error) bool {
	var failed *mail.SendError
	if !errors.As(err, &failed) || failed.ErrorCode() < 500 {
		return false
	}
	if failed.ErrorCode() == 530 || strings.HasPrefix(failed.EnhancedStatusCode(), "5.7.") {
		return false
	}
	return failed.Reason == mail.ErrSMTPRcptTo || failed.Reason == mail.ErrSMTPData || failed.Reason == mail.ErrSMTPDataClose
}

// take returns a connection that was kept, now the caller's, or nil. The last is the likeliest to work, and the others may expire.
func (s *SMTPSender) take() *conversation {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.kept) > 0 {
		last := len(s.kept) - 1
		c := s.kept[last]
		s.kept = s.kept[:last]
		if c.expiry.Stop() {
			return c
		}
	}
	return nil
}

// keep keeps a connection for the next mail, unless sending failed with err, which it returns.
func (s *SMTPSender) keep(c *conversation, err error) error {
	if err != nil {
		return err
	}
	c.expiry = time.AfterFunc(keptTimeout, c.quit)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = append(s.kept, c)
	return nil
}

// startTLS says what STARTTLS is to go-mail. A certificate is always checked: opportunistic only forgives that there is no TLS.
var startTLS = map[string]mail.TLSPolicy{
	"required": mail.TLSMandatory, "opportunistic": mail.TLSOpportunistic, "implicit": mail.NoTLS, "none": mail.NoTLS,
}

// conversation is a connection to the SMTP server, in the hands of one goroutine at a time.
type conversation struct {
	raw    net.Conn     // under TLS, if any
	client *mail.Client // of its own: concurrent sends of one client take each other's connections
	expiry *time.Timer  // ends the conversation while it is kept
}

// dial connects to the server, starts TLS and authenticates.
func (s *SMTPSender) dial(ctx context.Context) (*conversation, error) {
	raw, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", s.config.Addr)
	if err != nil {
		return nil, err
	}
	c := &conversation{raw: raw}
	conn := raw
	if s.config.TLS == "implicit" {
		conn = tls.Client(raw, s.tls)
	}
	options := []mail.Option{
		mail.WithDialContextFunc(func(context.Context, string, string) (net.Conn, error) { return conn, nil }),
		mail.WithTLSConfig(s.tls), mail.WithTLSPolicy(startTLS[s.config.TLS]),
		mail.WithTimeout(sendTimeout),
		mail.WithoutRset(),     // not after a mail that was accepted: a failure would look like the mail's
		mail.WithoutSMTPUTF8(), // nothing needs it, and the next server may not have it
	}
	if s.config.User != "" {
		options = append(options, mail.WithUsername(s.config.User), mail.WithPassword(s.config.Password),
			mail.WithOpportunisticSMTPAuth(mail.SMTPAuthPlain, mail.SMTPAuthLogin))
	}
	err = c.say(ctx, func() (err error) {
		if c.client, err = mail.NewClient(s.tls.ServerName, options...); err != nil {
			return err
		}
		return c.client.DialWithContext(ctx)
	})
	if err != nil {
		return nil, fmt.Errorf("greet it with SMTP_TLS=%s; check that, SMTP_USER and SMTP_PASSWORD: %w", s.config.TLS, err)
	}
	return c, nil
}

// send hands a mail to the server.
func (c *conversation) send(ctx context.Context, msg *mail.Msg) error {
	return c.say(ctx, func() error {
		_ = c.raw.SetDeadline(time.Now().Add(noopTimeout)) // go-mail begins with a NOOP, and then puts the deadline off
		return c.client.Send(msg)
	})
}

// say does a part of the conversation, and ends the conversation with ctx, which go-mail does not watch, and after an error:
// go-mail's QUIT would complete a mail that was cut off in the middle of its text.
func (c *conversation) say(ctx context.Context, part func() error) error {
	defer context.AfterFunc(ctx, func() { _ = c.raw.Close() })()
	err := part()
	if err != nil {
		_ = c.raw.Close()
	}
	return err
}

// quit says farewell to the server, which may not listen any more.
func (c *conversation) quit() {
	_ = c.raw.SetDeadline(time.Now().Add(noopTimeout))
	_ = c.client.Close()
	_ = c.raw.Close()
}
