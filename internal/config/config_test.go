package config

import (
	"fmt"
	"log/slog"
	"maps"
	"net/mail"
	"slices"
	"strings"
	"testing"
	"time"
)

func read(env map[string]string) (Config, error) {
	return Read(func(name string) string { return env[name] })
}

func TestNothingNeedsToBeSet(t *testing.T) {
	c, err := read(nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.DatabaseURL != DefaultDatabaseURL || c.DatabaseSet || c.RedisSet || !slices.Equal(c.RedisAddrs, []string{DefaultRedisAddr}) ||
		c.Port != 8080 || c.IdempotencyRetention != 24*time.Hour || c.OutboxRetention != 72*time.Hour ||
		c.OutboxMaxAge != 0 || c.EventBroker != "redis-streams" || c.EmailSender != "log" || c.LogJSON || c.LogLevel != slog.LevelInfo {
		t.Errorf("the defaults are %+v", c)
	}
}

func TestEveryVariableCounts(t *testing.T) {
	c, err := read(map[string]string{
		"DB_HOST": "db", "DB_PORT": "6543", "DB_USER": "u", "DB_PASSWORD": "p@ss/word?", "DB_NAME": "n",
		"REDIS_ADDR": "a:1, b:2", "REDIS_PASSWORD": "r", "PORT": "0", "IDEMPOTENCY_RETENTION": "90m", "EMAIL_SENDER": "discard",
		"OUTBOX_RETENTION": "48h", "OUTBOX_MAX_AGE": "30s",
		"EVENT_BROKER": "redis-pubsub", "LOG_FORMAT": "json", "LOG_LEVEL": "debug",
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.DatabaseURL != "postgres://u:p%40ss%2Fword%3F@db:6543/n" || !c.DatabaseSet || !slices.Equal(c.RedisAddrs, []string{"a:1", "b:2"}) ||
		c.RedisPassword != "r" || !c.RedisSet || c.Port != 0 || c.IdempotencyRetention != 90*time.Minute || c.OutboxRetention != 48*time.Hour ||
		c.OutboxMaxAge != 30*time.Second || c.EmailSender != "discard" ||
		c.EventBroker != "redis-pubsub" || !c.LogJSON || c.LogLevel != slog.LevelDebug {
		t.Errorf("read %+v", c)
	}
	c, err = read(map[string]string{"DATABASE_URL": "postgres://u:p@db/n?sslmode=require"})
	if err != nil || c.DatabaseURL != "postgres://u:p@db/n?sslmode=require" || !c.DatabaseSet {
		t.Errorf("read %+v, %v", c, err)
	}
}

func TestEachMistakeIsNamedAndNoSecretIsShown(t *testing.T) {
	env := map[string]string{
		"DB_HOST": "db", "DB_PORT": "x", "DB_PASSWORD": "canary", "DATABASE_URL": "postgres://u:canary@:x/n", "REDIS_ADDR": "nohost",
		"REDIS_PASSWORD": "canary", "PORT": "65536", "IDEMPOTENCY_RETENTION": "1", "EMAIL_SENDER": "pigeon", "EVENT_BROKER": "kafka",
		"LOG_FORMAT": "xml", "LOG_LEVEL": "loud", "API_KEYS": "canary", "OPS_ADDR": ":9090",
	}
	_, err := read(env)
	if err == nil {
		t.Fatal("everything is wrong, and no error")
	}
	for name := range env {
		if name == "REDIS_PASSWORD" || name == "DB_PORT" { // a password is never wrong; DATABASE_URL stands for the parts
			continue
		}
		if !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name %s:\n%v", name, err)
		}
	}
	if strings.Contains(err.Error(), "canary") {
		t.Errorf("the error shows a secret:\n%v", err)
	}
	for _, env := range []map[string]string{
		{"DB_PORT": "0"}, {"DB_PORT": "-1"}, {"PORT": ""}, {"PORT": "-1"}, {"PORT": "http"}, {"REDIS_ADDR": "a:1,"}, {"REDIS_ADDR": ":6379"},
		{"REDIS_ADDR": "a:0"}, {"IDEMPOTENCY_RETENTION": "-1h"}, {"IDEMPOTENCY_RETENTION": "59s"},
		{"OUTBOX_RETENTION": "59s"}, {"OUTBOX_RETENTION": "3d"}, {"OUTBOX_MAX_AGE": "1s"}, {"OUTBOX_MAX_AGE": "0"}, {"OUTBOX_MAX_AGE": ""},
	} {
		_, err := read(env)
		for name, value := range env {
			if value == "" && err != nil || value != "" && (err == nil || !strings.Contains(err.Error(), name)) {
				t.Errorf("%s=%q: %v", name, value, err)
			}
		}
	}
}

func TestTheSMTPSenderIsConfiguredWhole(t *testing.T) {
	env := map[string]string{"EMAIL_SENDER": "smtp", "SMTP_ADDR": "mail:587", "EMAIL_FROM": "The Shop <orders@shop.example>"}
	c, err := read(env)
	want := SMTP{Addr: "mail:587", TLS: "required", From: mail.Address{Name: "The Shop", Address: "orders@shop.example"}, ToDomain: "shop.example"}
	if err != nil || c.EmailSender != "smtp" || c.SMTP != want {
		t.Errorf("read %+v, %v; want %+v", c.SMTP, err, want)
	}
	maps.Copy(env, map[string]string{
		"EMAIL_FROM": "orders@shop.example", "EMAIL_TO_DOMAIN": "people.example", "SMTP_TLS": "implicit", "SMTP_USER": "u", "SMTP_PASSWORD": "p",
	})
	c, err = read(env)
	want = SMTP{Addr: "mail:587", User: "u", Password: "p", TLS: "implicit", From: mail.Address{Address: "orders@shop.example"}, ToDomain: "people.example"}
	if err != nil || c.SMTP != want {
		t.Errorf("read %+v, %v; want %+v", c.SMTP, err, want)
	}
	env["EMAIL_SENDER"] = "log" // the rest may stay
	if c, err = read(env); err != nil || c.SMTP != (SMTP{}) {
		t.Errorf("read %+v, %v", c.SMTP, err)
	}
}

func TestEachMistakeInTheSMTPSenderIsNamedAndNoPasswordIsShown(t *testing.T) {
	for _, test := range []struct {
		env   map[string]string // an empty variable is taken out of one that is right
		names []string
	}{
		{map[string]string{"SMTP_ADDR": "", "EMAIL_FROM": ""}, []string{"SMTP_ADDR", "EMAIL_FROM"}},
		{map[string]string{"SMTP_ADDR": "mail"}, []string{"SMTP_ADDR"}},
		{map[string]string{"SMTP_ADDR": "a:25,b:25"}, []string{"SMTP_ADDR"}},
		{map[string]string{"SMTP_ADDR": "mail:0"}, []string{"SMTP_ADDR"}},
		{map[string]string{"EMAIL_FROM": "shop"}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": "a@x.example, b@x.example"}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": "ä@x.example"}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": "a@ä.example"}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": "a@[127.0.0.1]"}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": `"a b"@x.example`}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_FROM": `"a@b"@x.example`}, []string{"EMAIL_FROM"}},
		{map[string]string{"EMAIL_TO_DOMAIN": "a@b"}, []string{"EMAIL_TO_DOMAIN"}},
		{map[string]string{"EMAIL_TO_DOMAIN": "x.example> SIZE=1"}, []string{"EMAIL_TO_DOMAIN"}},
		{map[string]string{"SMTP_TLS": "sometimes"}, []string{"SMTP_TLS"}},
		{map[string]string{"SMTP_USER": "u"}, []string{"SMTP_USER", "SMTP_PASSWORD"}},
		{map[string]string{"SMTP_PASSWORD": "canary"}, []string{"SMTP_USER", "SMTP_PASSWORD"}},
		{map[string]string{"SMTP_USER": "u", "SMTP_PASSWORD": "canary", "SMTP_TLS": "none"}, []string{"SMTP_PASSWORD", "SMTP_TLS"}},
		{map[string]string{"SMTP_USER": "u", "SMTP_PASSWORD": "canary", "SMTP_TLS": "opportunistic"}, []string{"SMTP_PASSWORD", "SMTP_TLS"}},
		{map[string]string{"EMAIL_SENDER": ""}, []string{"SMTP_ADDR", "EMAIL_SENDER=smtp"}},
	} {
		env := map[string]string{"EMAIL_SENDER": "smtp", "SMTP_ADDR": "mail:587", "EMAIL_FROM": "orders@shop.example"}
		maps.Copy(env, test.env)
		_, err := read(env)
		if err == nil {
			t.Errorf("%v: no error", test.env)
			continue
		}
		for _, name := range test.names {
			if !strings.Contains(err.Error(), name) {
				t.Errorf("%v: the error does not name %s: %v", test.env, name, err)
			}
		}
		if strings.Contains(err.Error(), "canary") {
			t.Errorf("%v: the error shows the password: %v", test.env, err)
		}
	}
}

func TestTheLogShowsNoSecret(t *testing.T) {
	for _, env := range []map[string]string{
		{"DB_PASSWORD": "canary", "REDIS_PASSWORD": "canary"}, {"DATABASE_URL": "postgres://u:canary@db/n"},
		{"DATABASE_URL": "host=db user=u password=canary dbname=n"},
		{"EMAIL_SENDER": "smtp", "SMTP_ADDR": "mail:587", "EMAIL_FROM": "a@b", "SMTP_USER": "u", "SMTP_PASSWORD": "canary"},
	} {
		c, err := read(env)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		slog.New(slog.NewTextHandler(&out, nil)).Info("Starting", "config", c)
		if strings.Contains(out.String(), "canary") {
			t.Errorf("the log shows the password: %s", &out)
		}
		if !strings.Contains(out.String(), fmt.Sprintf("port=%d", c.Port)) {
			t.Errorf("the log does not show the configuration: %s", &out)
		}
	}
}
