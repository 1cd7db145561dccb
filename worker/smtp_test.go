package worker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"mime"
	"mime/multipart"
	"net"
	netmail "net/mail"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/emersion/go-sasl"
	"github.com/emersion/go-smtp"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"

	"idempotent-orders/broker"
	"idempotent-orders/idempotency"
	"idempotent-orders/order"
)

// smtpServer is a real SMTP server that keeps what it accepts, and fails on demand.
type smtpServer struct {
	t    testing.TB
	addr string
	left chan struct{} // tells that a connection has ended

	mu          sync.Mutex
	fail        func(step string) error // before MAIL, RCPT or the end of DATA is answered; nil: never
	connections []*smtp.Conn
	accepted    []accepted
}

// accepted is a mail that the server took.
type accepted struct {
	from, to string
	data     []byte

	tls, authenticated bool
}

// serveSMTP starts a server without TLS.
func serveSMTP(t testing.TB) *smtpServer {
	t.Helper()
	return serveTLS(t, "", nil)
}

// serveTLS starts a server that offers "STARTTLS", speaks TLS from the first byte ("implicit"), or neither.
func serveTLS(t testing.TB, offers string, config *tls.Config) *smtpServer {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &smtpServer{t: t, addr: listener.Addr().String(), left: make(chan struct{}, 1)}
	server := smtp.NewServer(smtp.BackendFunc(func(c *smtp.Conn) (smtp.Session, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.connections = append(s.connections, c)
		return &smtpSession{server: s, conn: c}, nil
	}))
	server.Domain, server.ErrorLog = "mail.example.com", log.New(io.Discard, "", 0)
	switch offers {
	case "STARTTLS":
		server.TLSConfig = config
	case "implicit":
		listener = tls.NewListener(listener, config)
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(listener) }()
	t.Cleanup(func() {
		s.failWith(nil)
		_ = server.Close()
		_ = listener.Close() // the server does only if it had begun to serve
		<-served
	})
	return s
}

func (s *smtpServer) failWith(fail func(step string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = fail
}

func (s *smtpServer) mails() []accepted {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.accepted)
}

func (s *smtpServer) conns() []*smtp.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.connections)
}

// mail returns the one mail that the server accepted.
func (s *smtpServer) mail() accepted {
	s.t.Helper()
	mails := s.mails()
	if len(mails) != 1 {
		s.t.Fatalf("the server accepted %d mails; want 1", len(mails))
	}
	return mails[0]
}

// sender returns a sender to the server, without TLS.
func (s *smtpServer) sender() *SMTPSender { return NewSMTPSender(smtpConfig(s.addr)) }

func smtpConfig(addr string) SMTPConfig {
	return SMTPConfig{
		Addr: addr, TLS: "none", From: netmail.Address{Name: "The Shop", Address: "orders@shop.example"}, ToDomain: "people.example",
	}
}

type smtpSession struct {
	server *smtpServer
	conn   *smtp.Conn
	mail   accepted

	authenticated bool
}

func (s *smtpSession) step(name string) error {
	s.server.mu.Lock()
	fail := s.server.fail
	s.server.mu.Unlock()
	if fail == nil {
		return nil
	}
	return fail(name)
}

func (s *smtpSession) Mail(from string, _ *smtp.MailOptions) error {
	_, secure := s.conn.TLSConnectionState()
	s.mail = accepted{from: from, tls: secure, authenticated: s.authenticated}
	return s.step("MAIL")
}

func (s *smtpSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.mail.to += to
	return s.step("RCPT")
}

func (s *smtpSession) Data(r io.Reader) (err error) {
	if s.mail.data, err = io.ReadAll(r); err != nil {
		return err
	}
	if err := s.step("DATA"); err != nil {
		return err
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	s.server.accepted = append(s.server.accepted, s.mail)
	return nil
}

func (s *smtpSession) Reset() {}

func (s *smtpSession) Logout() error {
	select {
	case s.server.left <- struct{}{}:
	default: // nobody will ask for so many
	}
	return nil
}

func (*smtpSession) AuthMechanisms() []string { return []string{sasl.Plain} }

func (s *smtpSession) Auth(string) (sasl.Server, error) {
	return sasl.NewPlainServer(func(_, user, password string) error {
		if user != "shop" || password != "right" {
			return smtp.ErrAuthFailed
		}
		s.authenticated = true
		return nil
	}), nil
}

func anEmail() Email {
	return Email{EventID: uuid.New(), OrderID: uuid.New(), UserID: "user-456", Amount: 1000}
}

// letter is a mail as its reader sees it.
type letter struct {
	header     netmail.Header
	text, html string
}

func read(t testing.TB, data []byte) letter {
	t.Helper()
	msg, err := netmail.ReadMessage(bytes.NewReader(data))
	if err != nil {
		t.Fatalf("%v:\n%s", err, data)
	}
	l := letter{header: msg.Header}
	kind, params, err := mime.ParseMediaType(msg.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/alternative" {
		t.Fatalf("the mail is %s, %v", kind, err)
	}
	for parts := multipart.NewReader(msg.Body, params["boundary"]); ; {
		part, err := parts.NextPart()
		if errors.Is(err, io.EOF) {
			return l
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(part)
		if err != nil {
			t.Fatal(err)
		}
		switch kind := part.Header.Get("Content-Type"); kind {
		case "text/plain; charset=UTF-8":
			l.text += strings.ReplaceAll(string(body), "\r\n", "\n")
		case "text/html; charset=UTF-8":
			l.html += strings.ReplaceAll(string(body), "\r\n", "\n")
		default:
			t.Errorf("a part is %s", kind)
		}
	}
}

// headers checks that a mail has the headers it should, once each, and no other.
func (l letter) headers(t testing.TB, email Email, to string) {
	t.Helper()
	want := map[string]string{
		"From": `"The Shop" <orders@shop.example>`, "To": "<" + to + ">", "Subject": "Your order " + email.OrderID.String(),
		"Message-Id": "<" + email.EventID.String() + "@shop.example>", "Auto-Submitted": "auto-generated", "Mime-Version": "1.0",
		"Date": l.header.Get("Date"), "Content-Type": l.header.Get("Content-Type"),
	}
	got := maps.Clone(l.header)
	for name, value := range want {
		if !slices.Equal(got[name], []string{value}) || value == "" {
			t.Errorf("%s is %q; want %q, once", name, got[name], value)
		}
		delete(got, name)
	}
	if len(got) != 0 {
		t.Errorf("the mail has other headers too: %v", got)
	}
}

func TestSMTPAMailHasTextAndHTMLAndGoesToTheUserAtTheOneDomain(t *testing.T) {
	t.Parallel()
	server, email := serveSMTP(t), anEmail()
	if err := server.sender().Send(t.Context(), email); err != nil {
		t.Fatal(err)
	}
	mail := server.mail()
	if mail.from != "orders@shop.example" || mail.to != "user-456@people.example" {
		t.Errorf("the mail went from %s to %s", mail.from, mail.to)
	}
	l := read(t, mail.data)
	l.headers(t, email, "user-456@people.example")
	wantText := fmt.Sprintf("\nOrder:  %s\nUser:   user-456\nAmount: 1000\n", email.OrderID)
	wantHTML := fmt.Sprintf("<tr><td>Order</td><td>%s</td></tr>\n<tr><td>User</td><td>user-456</td></tr>\n<tr><td>Amount</td><td>1000</td></tr>", email.OrderID)
	if !strings.Contains(l.text, wantText) || !strings.Contains(l.html, wantHTML) {
		t.Errorf("the text is\n%s\nand the HTML\n%s", l.text, l.html)
	}
}

func TestSMTPAMailThatIsSentAgainHasTheSameMessageID(t *testing.T) {
	t.Parallel()
	server, email := serveSMTP(t), anEmail()
	for range 2 { // by two processes
		if err := server.sender().Send(t.Context(), email); err != nil {
			t.Fatal(err)
		}
	}
	mails := server.mails()
	if len(mails) != 2 {
		t.Fatalf("%d mails", len(mails))
	}
	first, second := read(t, mails[0].data).header.Get("Message-Id"), read(t, mails[1].data).header.Get("Message-Id")
	if first != second || first != "<"+email.EventID.String()+"@shop.example>" {
		t.Errorf("the Message-IDs are %s and %s", first, second)
	}
}

func TestSMTPAUserIDThatIsNoMailboxIsRefusedBeforeTheServerIsAsked(t *testing.T) {
	t.Parallel()
	server := serveSMTP(t)
	sender := server.sender()
	for _, userID := range []string{
		"", "ann@elsewhere.example", "ann@people.example", "ann@elsewhere.example@", "ann%elsewhere.example", "elsewhere.example!ann",
		"<ann>", "ann>", "ann> NOTIFY=NEVER", "a b", "a,b", "a;b", "a:b", `"ann"`, `a\b`, "(ann)", "|ann", "/dev/null", "-oQ", ".ann", "ann.",
		"a..b", "ä", "用户", "\u202eann", "a\u200bb", "\r\n.\r\nMAIL FROM:<x@y>", "a\r\nBcc: evil@x", "a\n", "\n", "ann\x00", "ann\xff",
		strings.Repeat("a", 65),
	} {
		email := anEmail()
		email.UserID = userID
		if err := sender.Send(t.Context(), email); !errors.Is(err, ErrRefused) {
			t.Errorf("%q: %v", userID, err)
		}
	}
	if n := len(server.conns()); n != 0 {
		t.Errorf("%d connections were made", n)
	}
	for _, userID := range []string{"a", "9", "ann", "Ann.B", "ann+x", "user-456", "a_b", strings.Repeat("a", 64)} {
		if to, err := sender.recipient(userID); err != nil || to != userID+"@people.example" {
			t.Errorf("%q goes to %s, %v", userID, to, err)
		}
	}
}

// hostile are user ids that try to be more than a user id.
var hostile = []string{
	"\r\n.\r\nMAIL FROM:<x@y>", "a\r\nBcc: evil@x\r\n\r\n", "\n.\n", ".", "..", ".\r\n", "a\rAmount: 1", "a\vAmount: 1", "a\u2028Amount: 1",
	"a\u0085Amount: 1", "\u202eevil", "a\u200bb", "--boundary--", "<script>alert(1)</script>", "</td></tr><a href=x>", "{{.Order}}", "=0D=0A",
	"=?utf-8?q?x?=", "ä用户", "\xff", "\x1b[2J", strings.Repeat("x", 2000), "&lt;",
}

func TestSMTPAHostileUserIDIsHarmlessTextInAMail(t *testing.T) {
	t.Parallel()
	server := serveSMTP(t)
	sender := server.sender()
	for i, userID := range hostile {
		email := anEmail()
		email.UserID = userID
		if err := sender.sendTo(t.Context(), "user@people.example", email); err != nil { // as if it were a mailbox
			t.Fatalf("%q: %v", userID, err)
		}
		mails := server.mails()
		if len(mails) != i+1 {
			t.Fatalf("%q: the server has %d mails; want %d", userID, len(mails), i+1)
		}
		harmless(t, mails[i].data, email)
		if mails[i].from != "orders@shop.example" || mails[i].to != "user@people.example" {
			t.Errorf("%q: the mail went from %s to %s", userID, mails[i].from, mails[i].to)
		}
	}
}

// harmless checks that the user id of a mail stands where it should, on its line, and changed nothing else.
func harmless(t testing.TB, data []byte, email Email) {
	t.Helper()
	l := read(t, data)
	l.headers(t, email, "user@people.example")
	lines := strings.FieldsFunc(l.text, func(r rune) bool { return strings.ContainsRune("\n\r\v\f\u0085\u2028\u2029", r) })
	want := []string{
		"Thank you for your order.", "Order:  " + email.OrderID.String(), "User:   " + oneLine(email.UserID), fmt.Sprintf("Amount: %d", email.Amount),
		"This message was sent by a program; nobody reads answers to it.",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("%q: the text has the lines %q; want %q", email.UserID, lines, want)
	}
	if n := strings.Count(l.html, "<"); n != strings.Count(htmlOf(t, "user"), "<") {
		t.Errorf("%q: the HTML has %d tags:\n%s", email.UserID, n, l.html)
	}
}

func htmlOf(t testing.TB, userID string) string {
	t.Helper()
	var out strings.Builder
	if err := htmlBody.Execute(&out, struct{ Order, User, Amount string }{User: userID}); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func FuzzSMTPNoUserIDLeavesItsLine(f *testing.F) {
	for _, userID := range hostile {
		f.Add(userID)
	}
	sender := NewSMTPSender(smtpConfig("127.0.0.1:1"))
	f.Fuzz(func(t *testing.T, userID string) {
		if to, err := sender.recipient(userID); err == nil {
			if addr, err := netmail.ParseAddress(to); err != nil || addr.Address != to || addr.Name != "" || !strings.HasSuffix(to, "@people.example") {
				t.Errorf("%q: the recipient %q is %v, %v", userID, to, addr, err)
			}
		}
		email := anEmail()
		email.UserID = userID
		msg, err := sender.compose("user@people.example", email)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if _, err := msg.WriteTo(&out); err != nil {
			t.Fatal(err)
		}
		harmless(t, out.Bytes(), email)
	})
}

func TestSMTPAnErrorTellsWhetherTheMailCanEverBeSent(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		step     string
		code     int
		enhanced smtp.EnhancedCode
		refused  bool
	}{
		{"MAIL", 421, smtp.EnhancedCode{4, 3, 2}, false},
		{"MAIL", 451, smtp.EnhancedCode{4, 3, 0}, false},
		{"MAIL", 550, smtp.EnhancedCode{5, 1, 8}, false}, // EMAIL_FROM is refused, not this mail
		{"RCPT", 450, smtp.EnhancedCode{4, 2, 0}, false},
		{"RCPT", 452, smtp.EnhancedCode{4, 2, 2}, false},
		{"RCPT", 550, smtp.EnhancedCode{5, 1, 1}, true},
		{"RCPT", 550, smtp.NoEnhancedCode, true},
		{"RCPT", 554, smtp.EnhancedCode{5, 7, 1}, false}, // relay access denied
		{"RCPT", 530, smtp.NoEnhancedCode, false},        // authentication required
		{"DATA", 421, smtp.EnhancedCode{4, 3, 2}, false},
		{"DATA", 451, smtp.EnhancedCode{4, 3, 0}, false},
		{"DATA", 554, smtp.EnhancedCode{5, 6, 0}, true},
		{"DATA", 552, smtp.EnhancedCode{5, 2, 3}, true},
		{"DATA", 550, smtp.EnhancedCode{5, 7, 26}, false}, // the sender's domain is not authenticated
	} {
		t.Run(fmt.Sprintf("%s %d %v", test.step, test.code, test.enhanced), func(t *testing.T) {
			t.Parallel()
			server, email := serveSMTP(t), anEmail()
			sender := server.sender()
			server.failWith(func(step string) error {
				if step != test.step {
					return nil
				}
				return &smtp.SMTPError{Code: test.code, EnhancedCode: test.enhanced, Message: "for a reason"}
			})
			err := sender.Send(t.Context(), email)
			if err == nil || errors.Is(err, ErrRefused) != test.refused || !strings.Contains(err.Error(), "for a reason") || strings.Contains(err.Error(), "\n") {
				t.Errorf("refused for ever should be %t: %v", test.refused, err)
			}
			if n := len(server.mails()); n != 0 {
				t.Fatalf("%d mails were accepted", n)
			}
			server.failWith(nil)
			if err := sender.Send(t.Context(), email); err != nil {
				t.Fatalf("the server is well again, and: %v", err)
			}
			read(t, server.mail().data).headers(t, email, "user-456@people.example")
		})
	}
}

func TestSMTPTheNextMailGoesOverTheKeptConnection(t *testing.T) {
	t.Parallel()
	server := serveSMTP(t)
	sender := server.sender()
	for range 3 {
		if err := sender.Send(t.Context(), anEmail()); err != nil {
			t.Fatal(err)
		}
	}
	if mails, conns := len(server.mails()), len(server.conns()); mails != 3 || conns != 1 {
		t.Errorf("%d mails went over %d connections; want 3 over 1", mails, conns)
	}
}

func TestSMTPAStaleConnectionNeitherLosesNorDoublesAMail(t *testing.T) {
	t.Parallel()
	for name, makeStale := range map[string]func(*smtpServer, *SMTPSender){
		"the server closed it":         func(server *smtpServer, _ *SMTPSender) { server.conns()[0].Close(); <-server.left },
		"it is closed here":            func(_ *smtpServer, sender *SMTPSender) { sender.kept[0].raw.Close() },
		"it expired":                   func(server *smtpServer, sender *SMTPSender) { sender.kept[0].expiry.Reset(0); <-server.left },
		"the server has enough of it":  func(server *smtpServer, _ *SMTPSender) { server.failWith(once("MAIL", 421)) },
		"the server forgot what it is": func(server *smtpServer, _ *SMTPSender) { server.failWith(once("MAIL", 503)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, email := serveSMTP(t), anEmail()
			sender := server.sender()
			if err := sender.Send(t.Context(), anEmail()); err != nil {
				t.Fatal(err)
			}
			makeStale(server, sender)
			if err := sender.Send(t.Context(), email); err != nil {
				t.Fatal(err)
			}
			mails := server.mails()
			if len(mails) != 2 || len(server.conns()) != 2 {
				t.Fatalf("%d mails were accepted over %d connections; want 2 over 2", len(mails), len(server.conns()))
			}
			read(t, mails[1].data).headers(t, email, "user-456@people.example")
		})
	}
}

// once returns a failure of the first time that the server comes to a step.
func once(step string, code int) func(string) error {
	var first sync.Once
	return func(at string) (err error) {
		if at == step {
			first.Do(func() {
				err = &smtp.SMTPError{Code: code, EnhancedCode: smtp.EnhancedCode{code / 100, 3, 2}, Message: "not now"}
			})
		}
		return err
	}
}

func TestSMTPAServerThatHangsIsLeftWhenTheTimeIsUp(t *testing.T) {
	t.Parallel()
	for _, hangAt := range []string{"MAIL", "RCPT", "DATA"} {
		t.Run(hangAt, func(t *testing.T) {
			t.Parallel()
			server := serveSMTP(t)
			hung, release := make(chan struct{}), make(chan struct{})
			t.Cleanup(func() { close(release) })
			server.failWith(func(step string) error {
				if step == hangAt {
					close(hung)
					<-release
				}
				return nil
			})
			leaves(t, server.sender(), hung)
		})
	}
	t.Run("the greeting", func(t *testing.T) {
		t.Parallel()
		for _, kind := range []string{"none", "implicit"} {
			listener, hung := mute(t)
			config := smtpConfig(listener)
			config.TLS = kind
			leaves(t, NewSMTPSender(config), hung)
		}
	})
}

// mute returns the address of a server that accepts one connection, and says nothing.
func mute(t *testing.T) (addr string, connected <-chan struct{}) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	accepted := make(chan struct{})
	go func() {
		if conn, err := listener.Accept(); err == nil {
			t.Cleanup(func() { conn.Close() })
			close(accepted)
		}
	}()
	return listener.Addr().String(), accepted
}

// leaves checks that a sender gives up as soon as its context does, when the server hangs.
func leaves(t *testing.T, sender *SMTPSender, hung <-chan struct{}) {
	t.Helper()
	why := errors.New("the time is up")
	ctx, giveUp := context.WithCancelCause(t.Context())
	sent := make(chan error, 1)
	go func() { sent <- sender.Send(ctx, anEmail()) }()
	<-hung
	giveUp(why)
	if err := <-sent; !errors.Is(err, why) || errors.Is(err, ErrRefused) || strings.Contains(err.Error(), "i/o timeout") {
		t.Errorf("it says %v; want nothing of its own timeout", err)
	}
	if len(sender.kept) != 0 {
		t.Error("the connection is kept")
	}
}

func TestSMTPAServerThatGoesAwayBeforeItAnswersHasNotRefused(t *testing.T) {
	t.Parallel()
	for _, goesAt := range []string{"MAIL", "RCPT", "DATA"} {
		t.Run(goesAt, func(t *testing.T) {
			t.Parallel()
			server := serveSMTP(t)
			sender := server.sender()
			server.failWith(func(step string) error {
				if step == goesAt {
					_ = server.conns()[0].Conn().Close()
				}
				return nil
			})
			err := sender.Send(t.Context(), anEmail())
			if err == nil || errors.Is(err, ErrRefused) || len(sender.kept) != 0 {
				t.Errorf("it says %v, and keeps %d connections", err, len(sender.kept))
			}
		})
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	addr := listener.Addr().String()
	if err := NewSMTPSender(smtpConfig(addr)).Send(t.Context(), anEmail()); err == nil || errors.Is(err, ErrRefused) ||
		!strings.Contains(err.Error(), addr+" (SMTP_ADDR)") {
		t.Errorf("no server: %v", err)
	}
}

// certificate returns a certificate for 127.0.0.1 that signed itself, and a pool that trusts it.
func certificate(t *testing.T) (*tls.Config, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "mail"}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, pool
}

func TestSMTPMailsAreEncryptedAsTheSettingSays(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		setting, offered string
		trusted          bool
		encrypted        bool
		says             string // empty: the mail is accepted
	}{
		{setting: "required", offered: "STARTTLS", trusted: true, encrypted: true},
		{setting: "required", offered: "STARTTLS", says: "certificate"},
		{setting: "required", says: "does not support STARTTLS"},
		{setting: "opportunistic", offered: "STARTTLS", trusted: true, encrypted: true},
		{setting: "opportunistic", offered: "STARTTLS", says: "certificate"},
		{setting: "opportunistic"},
		{setting: "implicit", offered: "implicit", trusted: true, encrypted: true},
		{setting: "implicit", offered: "implicit", says: "certificate"},
		{setting: "implicit", says: "tls"},
		{setting: "none", offered: "STARTTLS"},
		{setting: "", says: "does not support STARTTLS"}, // a mistake here shall not turn TLS off
	} {
		t.Run(fmt.Sprintf("%s of %s, trusted %t", test.setting, test.offered, test.trusted), func(t *testing.T) {
			t.Parallel()
			serving, pool := certificate(t)
			server := serveTLS(t, test.offered, serving)
			config := smtpConfig(server.addr)
			config.TLS = test.setting
			sender := NewSMTPSender(config)
			if test.trusted {
				sender.tls.RootCAs = pool
			}
			err := sender.Send(t.Context(), anEmail())
			if test.says == "" {
				if err != nil {
					t.Fatal(err)
				}
				if mail := server.mail(); mail.tls != test.encrypted {
					t.Errorf("the mail was encrypted: %t; want %t", mail.tls, test.encrypted)
				}
				return
			}
			if err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "SMTP_TLS="+test.setting) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("it says %v; want SMTP_TLS and %s", err, test.says)
			}
			if n := len(server.mails()); n != 0 {
				t.Errorf("%d mails were accepted", n)
			}
		})
	}
}

func TestSMTPCredentialsAreGivenAndNeverShown(t *testing.T) {
	t.Parallel()
	serving, pool := certificate(t)
	for _, offers := range []string{"STARTTLS", "implicit"} {
		server := serveTLS(t, offers, serving)
		config := smtpConfig(server.addr)
		config.TLS = map[string]string{"STARTTLS": "required", "implicit": "implicit"}[offers]
		for _, password := range []string{"right", "canary"} {
			config.User, config.Password = "shop", password
			sender := NewSMTPSender(config)
			sender.tls.RootCAs = pool
			err := sender.Send(t.Context(), anEmail())
			if password == "right" && err != nil {
				t.Fatal(err)
			}
			if password != "right" && (err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "SMTP_PASSWORD") ||
				strings.Contains(err.Error(), password)) {
				t.Errorf("a wrong password: %v", err)
			}
		}
		if got := server.mail(); !got.authenticated {
			t.Error("the mail was sent without authentication")
		}
	}
}

func TestSMTPMailsAreSentAtOnceEachOverAConnectionOfItsOwn(t *testing.T) {
	t.Parallel()
	server := serveSMTP(t)
	sender := server.sender()
	var met sync.WaitGroup
	met.Add(concurrentSends)
	var together sync.Mutex
	waiting := concurrentSends
	server.failWith(func(step string) error { // the first of each connection wait for each other
		if step != "DATA" {
			return nil
		}
		together.Lock()
		first := waiting > 0
		if first {
			waiting--
		}
		together.Unlock()
		if first {
			met.Done()
			met.Wait()
		}
		return nil
	})
	emails := map[string]Email{}
	var sends errgroup.Group
	sends.SetLimit(concurrentSends)
	for i := range 10 * concurrentSends {
		email := anEmail()
		email.UserID = fmt.Sprintf("user-%d", i)
		emails[email.UserID+"@people.example"] = email
		sends.Go(func() error { return sender.Send(t.Context(), email) })
	}
	if err := sends.Wait(); err != nil {
		t.Fatal(err)
	}
	mails := server.mails()
	if len(mails) != len(emails) || len(server.conns()) != concurrentSends {
		t.Fatalf("%d mails went over %d connections; want %d over %d", len(mails), len(server.conns()), len(emails), concurrentSends)
	}
	for _, mail := range mails {
		email, ok := emails[mail.to]
		if !ok {
			t.Errorf("a mail went to %s twice, or for nobody", mail.to)
			continue
		}
		read(t, mail.data).headers(t, email, mail.to)
		delete(emails, mail.to)
	}
}

func TestSMTPAnOrderIsMailedOnceThoughTheServerPutsItOff(t *testing.T) {
	t.Parallel()
	b, server := newBench(t), serveSMTP(t)
	server.failWith(once("DATA", 451))
	through := server.sender()
	placed, err := b.orders.Place(order.Send{
		Key:   idempotency.Key{Caller: "anonymous", Operation: order.Operation, Value: uuid.NewString()},
		Draft: order.Draft{UserID: "user-456", Amount: 1000},
	})
	if err != nil {
		t.Fatal(err)
	}
	var eventID uuid.UUID
	if err := b.pool.QueryRow(t.Context(), "SELECT event_id FROM outbox").Scan(&eventID); err != nil {
		t.Fatal(err)
	}
	b.start(b.relay(b.broker).Run)
	b.start(b.consumer("email", sender(func(ctx context.Context, email Email) error {
		if err := through.Send(ctx, email); err != nil {
			return err
		}
		return b.mails.Send(ctx, email)
	})).Run)
	b.eventually("the mail is marked", func() bool { return b.count("SELECT count(*) FROM inbox WHERE state = 'sent'") == 1 })
	b.eventually("it is acknowledged", func() bool {
		p, err := b.redis.XPending(t.Context(), broker.Stream, EmailConsumer).Result()
		return err == nil && p.Count == 0
	})
	b.settled([]uuid.UUID{placed.OrderID})
	if !strings.Contains(b.log.String(), "451") {
		t.Errorf("the log does not say that the mail was put off:\n%s", b.log)
	}
	read(t, server.mail().data).headers(t, Email{EventID: eventID, OrderID: placed.OrderID}, "user-456@people.example")
}
