package config

import (
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var ratePattern = regexp.MustCompile(`^([1-9][0-9]{0,6})/(s|m)$`)

// rate reads requests/s or requests/m: one number to know, which is also how many may come at once.
func (r *reader) rate(name string) (requests int, period time.Duration) {
	if r.getenv(name) == "" {
		return 0, 0
	}
	parts := ratePattern.FindStringSubmatch(r.getenv(name))
	if parts == nil {
		r.mistake(name, "is %q; it must be requests per second or minute, such as 100/s or 600/m; unset it for any rate", r.getenv(name))
		return 0, 0
	}
	requests, _ = strconv.Atoi(parts[1])
	return requests, map[string]time.Duration{"s": time.Second, "m": time.Minute}[parts[2]]
}

// minOpsToken is the shortest OPS_TOKEN: a short one can be guessed.
const minOpsToken = 16

// ops returns where operators are answered, or nothing, and the token that they must have, if any.
func (r *reader) ops() (addr, token string) {
	addr, token = r.value("OPS_ADDR"), r.getenv("OPS_TOKEN")
	if token != "" && len(token) < minOpsToken {
		r.mistake("OPS_TOKEN", "is too short; it must have at least %d characters, such as those of `openssl rand -hex 32`", minOpsToken)
	}
	if addr == "off" {
		return "", token
	}
	host, port, err := net.SplitHostPort(addr)
	n, portErr := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil || portErr != nil || strconv.FormatUint(n, 10) != port:
		r.mistake("OPS_ADDR", "is %q; it must be host:port, such as 127.0.0.1:9090, or off", addr)
	case token == "" && !IsLoopback(host):
		r.mistake("OPS_ADDR", "is %q, which others can reach; set OPS_TOKEN, or use 127.0.0.1:%s", addr, port)
	}
	return addr, token
}

// IsLoopback tells whether a host, without its port, can only be this machine.
func IsLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && addr.Unmap().IsLoopback()
}
