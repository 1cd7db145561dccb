package idempotency

import (
	"crypto/sha256"
	"fmt"
	"strings"
)

// MaxKeyLength is the longest key, in characters.
const MaxKeyLength = 255

// Key names one intent: a caller's own name for one use of an operation. Keys of other callers or operations never meet.
type Key struct {
	Caller    string
	Operation string
	Value     string
}

// Digest stands for a key where room is dear: the first half of the SHA-256 of its parts. It is bounded however long the key
// is, no part can be mistaken for another, and it does not show the key. That two keys share one is as likely as two random
// 128-bit numbers being equal, and as hard to bring about.
func (k Key) Digest() [16]byte {
	parts := make([]byte, 0, 512)                    // does not escape
	parts = append(append(parts, k.Operation...), 0) // no part contains U+0000
	parts = append(append(parts, k.Caller...), 0)
	sum := sha256.Sum256(append(parts, k.Value...))
	return [16]byte(sum[:])
}

// Fingerprint is the SHA-256 of what was asked for under a key.
type Fingerprint [32]byte

// ParseKey reads the value of an Idempotency-Key header: 1 to MaxKeyLength visible ASCII characters, bare or as a quoted
// string of structured fields (RFC 9651, section 3.3.3). Both forms name the same key; a value that begins with a quote
// is always read as a quoted string. Errors wrap ErrInvalidKey and do not contain the value.
func ParseKey(header string) (string, error) {
	value := header
	if strings.HasPrefix(header, `"`) {
		unquoted, ok := unquote(header)
		if !ok {
			return "", fmt.Errorf("%w: it begins with a quote but is not a structured-field string", ErrInvalidKey)
		}
		value = unquoted
	}
	switch {
	case value == "":
		return "", fmt.Errorf("%w: it is empty", ErrInvalidKey)
	case len(value) > MaxKeyLength:
		return "", fmt.Errorf("%w: it is longer than %d characters", ErrInvalidKey, MaxKeyLength)
	}
	for i := range len(value) {
		if value[i] <= ' ' || value[i] > '~' {
			return "", fmt.Errorf("%w: character %d is not visible ASCII", ErrInvalidKey, i+1)
		}
	}
	return value, nil
}

// unquote reads a structured-field string: in quotes, with \" and \\ as the only escapes, and nothing after it.
func unquote(s string) (string, bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), i == len(s)-1
		case '\\':
			i++
			if i == len(s) || s[i] != '"' && s[i] != '\\' {
				return "", false
			}
		}
		b.WriteByte(s[i])
	}
	return "", false
}
