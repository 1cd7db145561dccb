// Package config is the program's configuration: read once from the environment, checked whole before anything starts.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Where the stores are when nothing is set.
const (
	DefaultDatabaseURL = "postgres://postgres:postgres@localhost:5432/outbox_db"
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
	{"DATABASE_URL", "", "instead of the DB_ variables; may set sslmode, pool_max_conns and the like"},
	{"REDIS_ADDR", DefaultRedisAddr, "where Redis is; several addresses, with commas, mean a Redis Cluster"},
	{"REDIS_PASSWORD", "", ""},
	{"PORT", "8080", "public HTTP; 0 takes any free port"},
	{"IDEMPOTENCY_RETENTION", "24h", "how long an Idempotency-Key answers after its order was placed"},
	{"EVENT_BROKER", "redis-streams", "redis-streams"},
	{"EMAIL_SENDER", "log", "log writes each mail to the log; discard sends nothing"},
	{"LOG_FORMAT", "text", "text or json"},
	{"LOG_LEVEL", "info", "debug, info, warn or error"},
}

// later are variables that are part of the contract but not built yet. To ignore one would be to promise what is not kept.
var later = []string{"API_KEYS", "OPS_ADDR", "OPS_TOKEN", "OUTBOX_RETENTION", "OUTBOX_MAX_AGE", "NATS_URL", "KAFKA_BROKERS",
	"SMTP_ADDR", "EMAIL_FROM"}

// Config is the whole configuration.
type Config struct {
	DatabaseURL string // of PostgreSQL, with the password
	DatabaseSet bool   // by the environment: then there is no fallback to a local server

	RedisAddrs    []string
	RedisPassword string
	RedisSet      bool // as DatabaseSet

	Port                 int           // 0: any
	IdempotencyRetention time.Duration // at least minRetention
	EmailSender          string        // "log" or "discard"
	LogJSON              bool
	LogLevel             slog.Level
}

// minRetention is the shortest time for which a key may answer. It is longer than a reservation in Redis lasts.
const minRetention = time.Minute

// Read reads the configuration through getenv. The error names every mistake, each with its remedy.
func Read(getenv func(string) string) (Config, error) {
	r := reader{getenv: getenv}
	c := Config{
		RedisAddrs:           r.addresses("REDIS_ADDR"),
		RedisPassword:        getenv("REDIS_PASSWORD"),
		RedisSet:             getenv("REDIS_ADDR") != "" || getenv("REDIS_PASSWORD") != "",
		Port:                 r.port("PORT", 0),
		IdempotencyRetention: r.duration("IDEMPOTENCY_RETENTION", minRetention),
		EmailSender:          r.oneOf("EMAIL_SENDER", "log", "discard"),
		LogJSON:              r.oneOf("LOG_FORMAT", "text", "json") == "json",
	}
	r.oneOf("EVENT_BROKER", "redis-streams")
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
		slog.Duration("idempotency_retention", c.IdempotencyRetention), slog.String("email_sender", c.EmailSender),
		slog.Any("log_level", c.LogLevel),
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
	for i := range addrs {
		addrs[i] = strings.TrimSpace(addrs[i])
		host, port, err := net.SplitHostPort(addrs[i])
		if n, portErr := strconv.Atoi(port); err != nil || host == "" || portErr != nil || n < 1 || n > 65535 {
			r.mistake(name, "has %q; an address is host:port", addrs[i])
		}
	}
	return addrs
}

// database returns the connection string, and whether any variable names the database.
func (r *reader) database() (string, bool) {
	var parts []string
	for _, name := range []string{"DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME"} {
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
	return u.String(), len(parts) > 0
}
