package main

import (
	"regexp"
	"testing"

	"idempotent-orders/internal/testenv"
)

func TestWithRedisPubSubAnOrderIsMailedWhetherThePartsShareAProcessOrNot(t *testing.T) {
	t.Parallel()
	_, redisServer := testenv.Redis(t)
	env := []string{
		"PORT=0", "XDG_DATA_HOME=" + testenv.Dir(t), "DATABASE_URL=" + testenv.DatabaseURL(t), "REDIS_ADDR=" + redisServer.Addr(),
		"EVENT_BROKER=redis-pubsub",
	}
	whole := start(t, env).serving()
	placed, _ := whole.mustPlace("whole")
	whole.waitFor(mailFor(placed))
	whole.terminate()

	consumer := start(t, env, "consumer") // first: who comes late has missed what was published
	consumer.waitFor(regexp.MustCompile("Email consumer started"))
	parts := []*program{start(t, env, "worker"), start(t, env, "server").serving(), consumer}
	placed, _ = parts[1].mustPlace("parts")
	consumer.waitFor(mailFor(placed))
	for _, p := range parts {
		p.terminate()
	}
}
