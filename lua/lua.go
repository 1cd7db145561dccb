// Package lua holds the Redis scripts of the idempotency guard. Each touches one key, so it runs on a Redis Cluster, and
// opens with its contract. The scripts only hurry: whatever they answer, PostgreSQL decides.
package lua

import (
	_ "embed"

	"github.com/redis/go-redis/v9"
)

//go:embed reserve.lua
var reserve string

//go:embed complete.lua
var complete string

//go:embed release.lua
var release string

// The scripts; see the head of each file for keys, arguments and answers.
var (
	Reserve  = redis.NewScript(reserve)
	Complete = redis.NewScript(complete)
	Release  = redis.NewScript(release)
)
