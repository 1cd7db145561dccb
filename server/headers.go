package server

import (
	"regexp"
	"strconv"
	"strings"
	"time"
)

// maxWait is the longest that Prefer: wait may ask for.
const maxWait = 10 * time.Second

// preferredWait returns how long a Prefer header asks to wait (RFC 7240, section 4.3), at most maxWait. The first wait
// counts; one that is not a number of seconds, and any other preference, is ignored.
func preferredWait(prefer string) time.Duration {
	for preference := range strings.SplitSeq(prefer, ",") {
		preference, _, _ = strings.Cut(preference, ";")
		name, value, _ := strings.Cut(preference, "=")
		if !strings.EqualFold(strings.TrimSpace(name), "wait") {
			continue
		}
		seconds, err := strconv.ParseUint(strings.Trim(strings.TrimSpace(value), `"`), 10, 32)
		if err != nil {
			return 0
		}
		return min(time.Duration(seconds)*time.Second, maxWait)
	}
	return 0
}

// join folds the lines of a list header into one (RFC 9110, section 5.2).
func join(lines []string) string { return strings.Join(lines, ", ") }

var traceparent = regexp.MustCompile(`^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$`)

// validTraceparent tells whether s is a traceparent of version 00 (W3C Trace Context, section 3.2).
func validTraceparent(s string) bool {
	return traceparent.MatchString(s) && s[3:35] != strings.Repeat("0", 32) && s[36:52] != strings.Repeat("0", 16)
}
