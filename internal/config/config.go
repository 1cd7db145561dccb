// Package config is the program's configuration: read once from the environment, checked whole before anything starts.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/mail"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Where the stores are when nothing is set.
const (
	DefaultDatabaseURL = "postgres://postgres:postgres@localhost:5432/outbox_db" // #nosec G101 -- of a server for development, and known to all
	DefaultDatabase    = "outbox_db"
	DefaultRedisAddr   = "localhost:6379"
)

// Variable describes one variable of the environment. An empty variable counts as not set.
type Variable struct {
	Name    string
	Default string
	Meaning string
}

// Variables lists what Read reads, in the order of the help.
var Variables = []Variable{
	{"DB_HOST", "localhost", "where PostgreSQL is"},
	{"DB_PORT", "5432", ""},
	{"DB_USER", "postgres", ""},
	{"DB_PASSWORD", "postgres", ""},
	{"DB_NAME", DefaultDatabase, ""},
	{"DB_SSLMODE", "prefer", "disable, prefer, require, verify-ca or verify-full, as in libpq"},
	{"DATABASE_URL", "", "instead of the DB_ variables; may set sslmode, pool_max_conns and the like"},
	{"REDIS_ADDR", DefaultRedisAddr, "where Redis is; several addresses, with commas, mean a Redis Cluster; rediss://host:port means TLS"},
	{"REDIS_PASSWORD", "", ""},
	{"PORT", "8080", "public HTTP; 0 takes any free port"},
	{"API_KEYS", "", "name=sha256-hex,...: who may use /orders, and the hash of the bearer token; without it, everyone may"},
	{"RATE_LIMIT", "", "how much each caller may send to /orders, such as 100/s or 600/m (default: anything)"},
	{"OPS_ADDR", "127.0.0.1:9090", "profiles, for operators; off or empty turns it off; beyond loopback it demands OPS_TOKEN"},
	{"OPS_TOKEN", "", "the bearer token that OPS_ADDR asks for, of at least 16 characters"},
	{"IDEMPOTENCY_RETENTION", "24h", "how long an Idempotency-Key answers after its order was placed"},
	{"OUTBOX_RETENTION", "72h", "how long published events are kept, in days that are dropped whole, once they are finished"},
	{"OUTBOX_MAX_AGE", "", "orders are refused while an event has waited longer than this to be published (default: never)"},
	{"EVENT_BROKER", "redis-streams", "redis-streams, or redis-pubsub, which loses what is published while nobody listens"},
	{"EMAIL_SENDER", "log", "log writes each mail to the log; smtp sends it; discard sends nothing"},
	{"EMAIL_FROM", "", "with smtp, the sender of each mail, such as orders@example.com"},
	{"EMAIL_TO_DOMAIN", "", "a mail goes to the user id at this domain (default the domain of EMAIL_FROM)"},
	{"SMTP_ADDR", "", "with smtp, the server that takes the mails, such as mail.example.com:587"},
	{"SMTP_TLS", "required", "required or opportunistic STARTTLS, implicit (TLS at once, usually port 465), or none"},
	{"SMTP_USER", "", ""},
	{"SMTP_PASSWORD", "", ""},
	{"LOG_FORMAT", "text", "text or json"},
	{"LOG_LEVEL", "info", "debug, info, warn or error"},
}

// later are variables that are part of the contract but not built yet. To ignore one would be to promise what is not kept.
var later = []string{"NATS_URL", "KAFKA_BROKERS"}

// Config is the whole configuration.
type Config struct {
	DatabaseURL string // of PostgreSQL, with the password
	DatabaseSet bool   // by the environment: then there is no fallback to a local server

	RedisAddrs    []string
	RedisPassword string
	RedisSet      bool // as DatabaseSet

	Port                 int           // 0: any
	APIKeys              []APIKey      // none: everyone is the caller "anonymous", as which no key has its name
	RateRequests         int           // that each caller may send in RatePeriod; 0: any
	RatePeriod           time.Duration //
	OpsAddr              string        // host:port; empty: none
	OpsSet               bool          // by the environment: then it must be had
	OpsToken             string        // needed beyond loopback
	IdempotencyRetention time.Duration // at least minRetention
	OutboxRetention      time.Duration // at least minRetention
	OutboxMaxAge         time.Duration // at least minMaxAge; 0: any age
	EventBroker          string        // "redis-streams" or "redis-pubsub"
	EmailSender          string        // "log", "smtp" or "discard"
	SMTP                 SMTP          // for the sender "smtp"
	LogJSON              bool
	LogLevel             slog.Level
}

// SMTP says how mails reach an SMTP server.
type SMTP struct {
	Addr     string       // host:port
	User     string       // empty: without authentication
	Password string       // only with TLS "required" or "implicit"
	TLS      string       // "required", "opportunistic", "implicit" or "none"
	From     mail.Address // in ASCII
	ToDomain string       // where the user ids are mailboxes
}

const (
	// minRetention is the shortest time for which a key may answer, or an event be kept. It is longer than a reservation in Redis
	// lasts.
	minRetention = time.Minute
	// minMaxAge is the shortest age at which events may be too old. It is as long as a relay may take to try again.
	minMaxAge = 2 * time.Second
)

// Read reads the configuration through getenv. The error names every mistake, each with its remedy.
func Read(getenv func(string) string) (Config, error) {
	r := reader{getenv: getenv}
	c := Config{
		RedisAddrs:           r.addresses("REDIS_ADDR"),
		RedisPassword:        getenv("REDIS_PASSWORD"),
		RedisSet:             getenv("REDIS_ADDR") != "" || getenv("REDIS_PASSWORD") != "",
		Port:                 r.port("PORT", 0),
		APIKeys:              r.apiKeys("API_KEYS"),
		IdempotencyRetention: r.duration("IDEMPOTENCY_RETENTION", minRetention),
		OutboxRetention:      r.duration("OUTBOX_RETENTION", minRetention),
		EventBroker:          r.oneOf("EVENT_BROKER", "redis-streams", "redis-pubsub"),
		EmailSender:          r.oneOf("EMAIL_SENDER", "log", "smtp", "discard"),
		LogJSON:              r.oneOf("LOG_FORMAT", "text", "json") == "json",
	}
	if getenv("OUTBOX_MAX_AGE") != "" {
		c.OutboxMaxAge = r.duration("OUTBOX_MAX_AGE", minMaxAge)
	}
	c.SMTP = r.smtp(c.EmailSender)
	c.RateRequests, c.RatePeriod = r.rate("RATE_LIMIT")
	c.OpsAddr, c.OpsToken = r.ops()
	c.OpsSet = getenv("OPS_ADDR") != ""
	c.DatabaseURL, c.DatabaseSet = r.database()
	_ = c.LogLevel.UnmarshalText([]byte(r.oneOf("LOG_LEVEL", "debug", "info", "warn", "error")))
	for _, name := range later {
		if getenv(name) != "" {
			r.mistake(name, "is not supported by this version; unset it")
		}
	}
	return c, errors.Join(r.mistakes...)
}

// LogValue shows the configuration without its secrets.
func (c Config) LogValue() slog.Value {
	database := "(default)"
	if c.DatabaseSet {
		database = redacted(c.DatabaseURL)
	}
	return slog.GroupValue(
		slog.String("database", database), slog.String("redis", strings.Join(c.RedisAddrs, ",")), slog.Int("port", c.Port),
		slog.Int("api_keys", len(c.APIKeys)), slog.String("ops", c.OpsAddr),
		slog.Group("rate_limit", "requests", c.RateRequests, "period", c.RatePeriod),
		slog.Duration("idempotency_retention", c.IdempotencyRetention),
		slog.Duration("outbox_retention", c.OutboxRetention), slog.Duration("outbox_max_age", c.OutboxMaxAge), slog.String("event_broker", c.EventBroker),
		slog.String("email_sender", c.EmailSender), slog.String("smtp", c.SMTP.Addr), slog.Any("log_level", c.LogLevel),
	)
}

// redacted returns where a connection string leads, and nothing that could be a secret.
func redacted(databaseURL string) string {
	cfg, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return "(unreadable)"
	}
	return fmt.Sprintf("%s/%s", net.JoinHostPort(cfg.ConnConfig.Host, strconv.Itoa(int(cfg.ConnConfig.Port))), cfg.ConnConfig.Database)
}

// reader reads variables and collects what is wrong with them.
type reader struct {
	getenv   func(string) string
	mistakes []error
}

func (r *reader) mistake(name, format string, args ...any) {
	r.mistakes = append(r.mistakes, fmt.Errorf("%s %s", name, fmt.Sprintf(format, args...)))
}

// value returns a variable or its default.
func (r *reader) value(name string) string {
	i := slices.IndexFunc(Variables, func(v Variable) bool { return v.Name == name })
	return cmp.Or(r.getenv(name), Variables[i].Default)
}

func (r *reader) oneOf(name string, allowed ...string) string {
	value := r.value(name)
	if !slices.Contains(allowed, value) {
		r.mistake(name, "is %q; it must be %s", value, strings.Join(allowed, " or "))
	}
	return value
}

func (r *reader) port(name string, least int) int {
	port, err := strconv.Atoi(r.value(name))
	if err != nil || port < least || port > 65535 {
		r.mistake(name, "is %q; it must be a port, from %d to 65535", r.value(name), least)
	}
	return port
}

func (r *reader) duration(name string, least time.Duration) time.Duration {
	d, err := time.ParseDuration(r.value(name))
	if err != nil || d < least {
		r.mistake(name, "is %q; it must be a duration of at least %s, such as 90m or 24h", r.value(name), least)
	}
	return d
}

func (r *reader) addresses(name string) []string {
	addrs := strings.Split(r.value(name), ",")
	encrypted := 0
	for i := range addrs {
		addrs[i] = strings.TrimSpace(addrs[i])
		plain, tls := strings.CutPrefix(addrs[i], "rediss://")
		if tls {
			encrypted++
		}
		switch {
		case isAddress(plain):
		case strings.Contains(plain, "@"): // before it stands a password
			r.mistake(name, "has an address with @; an address is host:port or rediss://host:port, and the password goes into REDIS_PASSWORD")
		default:
			r.mistake(name, "has %q; an address is host:port, or rediss://host:port for TLS", addrs[i])
		}
	}
	if encrypted > 0 && encrypted < len(addrs) {
		r.mistake(name, "has addresses with rediss:// and without; a cluster has TLS on all or on none")
	}
	return addrs
}

func isAddress(addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	n, portErr := strconv.Atoi(port)
	return err == nil && host != "" && portErr == nil && n >= 1 && n <= 65535
}

// smtp returns how mails reach an SMTP server, when that is the sender.
func (r *reader) smtp(sender string) SMTP {
	if sender != "smtp" {
		if r.getenv("EMAIL_SENDER") == "" && r.getenv("SMTP_ADDR") != "" {
			r.mistake("SMTP_ADDR", "is set, and EMAIL_SENDER is not; set EMAIL_SENDER=smtp to send mails there")
		}
		return SMTP{}
	}
	s := SMTP{
		Addr: r.getenv("SMTP_ADDR"), User: r.getenv("SMTP_USER"), Password: r.getenv("SMTP_PASSWORD"),
		TLS: r.oneOf("SMTP_TLS", "required", "opportunistic", "implicit", "none"),
	}
	if !isAddress(s.Addr) {
		r.mistake("SMTP_ADDR", "is %q; with EMAIL_SENDER=smtp it must be host:port, such as mail.example.com:587", s.Addr)
	}
	switch {
	case (s.User == "") != (s.Password == ""):
		r.mistake("SMTP_USER", "and SMTP_PASSWORD go together; set both or neither")
	case s.Password != "" && (s.TLS == "none" || s.TLS == "opportunistic"): // who sits in between can take an offer of TLS away
		r.mistake("SMTP_PASSWORD", "could be sent unencrypted with SMTP_TLS=%s; set SMTP_TLS to required or implicit", s.TLS)
	}
	s.From, s.ToDomain = r.from("EMAIL_FROM")
	if domain := r.getenv("EMAIL_TO_DOMAIN"); domain != "" {
		if s.ToDomain = domain; !domainName.MatchString(domain) {
			r.mistake("EMAIL_TO_DOMAIN", "is %q; it must be a domain, such as example.com", domain)
		}
	}
	return s
}

// What mail servers take without extensions, and no more than anybody needs: in particular no quotes and no brackets.
var (
	domainName = regexp.MustCompile(`^[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*$`)
	localPart  = regexp.MustCompile(`^[A-Za-z0-9_+=-]+(\.[A-Za-z0-9_+=-]+)*$`)
)

// from returns the sender of mails, which may have a name, and its domain.
func (r *reader) from(name string) (mail.Address, string) {
	addr, err := mail.ParseAddress(r.getenv(name))
	if err == nil {
		local, domain, _ := strings.Cut(addr.Address, "@")
		if localPart.MatchString(local) && domainName.MatchString(domain) {
			return *addr, domain
		}
	}
	r.mistake(name, "is %q; with EMAIL_SENDER=smtp it must be an address, such as Shop <orders@example.com>", r.getenv(name))
	return mail.Address{}, ""
}

// database returns the connection string, and whether any variable names the database.
func (r *reader) database() (string, bool) {
	var parts []string
	for _, name := range []string{"DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DB_SSLMODE"} {
		if r.getenv(name) != "" {
			parts = append(parts, name)
		}
	}
	given := r.getenv("DATABASE_URL")
	if given != "" {
		if len(parts) > 0 {
			r.mistake("DATABASE_URL", "is set, and so is %s; set one or the other", strings.Join(parts, ", "))
		}
		if _, err := pgxpool.ParseConfig(given); err != nil {
			r.mistake("DATABASE_URL", "cannot be read; it must be like postgres://user:password@host:5432/database")
		}
		return given, true
	}
	u := url.URL{
		Scheme: "postgres",
		User:   url.UserPassword(r.value("DB_USER"), r.value("DB_PASSWORD")),
		Host:   net.JoinHostPort(r.value("DB_HOST"), strconv.Itoa(r.port("DB_PORT", 1))),
		Path:   "/" + r.value("DB_NAME"),
	}
	if mode := r.oneOf("DB_SSLMODE", "disable", "prefer", "require", "verify-ca", "verify-full"); r.getenv("DB_SSLMODE") != "" {
		u.RawQuery = "sslmode=" + mode
	}
	return u.String(), len(parts) > 0
}
