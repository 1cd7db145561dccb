//go:build faults

package lua

import (
	"regexp"

	"github.com/redis/go-redis/v9"

	"idempotent-orders/internal/fault"
)

// tokenCheck is where a script makes sure that the holder still has the reservation.
var tokenCheck = regexp.MustCompile(`(?s)if redis\.call\('GET', KEYS\[1\]\) ~= 'held:' \.\. ARGV\[1\] then.*?end\n`)

func init() {
	if fault.TokenCheck.Removed() {
		Complete, Release = unchecked(complete), unchecked(release)
	}
}

func unchecked(script string) *redis.Script {
	if !tokenCheck.MatchString(script) {
		panic("REMOVE=token-check does not find the check in " + script)
	}
	return redis.NewScript(tokenCheck.ReplaceAllString(script, ""))
}
