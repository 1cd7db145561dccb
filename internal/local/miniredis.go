package local

import (
	"fmt"

	"github.com/alicebob/miniredis/v2"
)

// StartMiniredis starts a stand-in for Redis inside this process, for when there is no redis-server: it speaks the protocol,
// keys expire in real time, other processes can use its address, and everything is lost when the process ends.
func StartMiniredis() (addr string, stop func(), err error) {
	m := miniredis.NewMiniRedis()
	m.ClockTTL(true) // by itself it is made for tests, in which no time passes
	if err := m.StartAddr("127.0.0.1:0"); err != nil {
		return "", nil, fmt.Errorf("start miniredis: %w", err)
	}
	return m.Addr(), m.Close, nil
}
