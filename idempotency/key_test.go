package idempotency

import (
	"errors"
	"strings"
	"testing"
)

func TestParseKeyReadsBothForms(t *testing.T) {
	for header, want := range map[string]string{
		"a":                                  "a",
		"8e03978e-40d5-43dd-bc93":            "8e03978e-40d5-43dd-bc93",
		`"8e03978e-40d5-43dd-bc93"`:          "8e03978e-40d5-43dd-bc93",
		`a"b`:                                `a"b`,
		`"a\"b"`:                             `a"b`,
		`a\b`:                                `a\b`,
		`"a\\b"`:                             `a\b`,
		"a,b;c=%41":                          "a,b;c=%41",
		strings.Repeat("k", 255):             strings.Repeat("k", 255),
		`"` + strings.Repeat("k", 255) + `"`: strings.Repeat("k", 255),
		"!~":                                 "!~",
	} {
		got, err := ParseKey(header)
		if err != nil || got != want {
			t.Errorf("ParseKey(%q) = %q, %v; want %q", header, got, err, want)
		}
	}
}

func TestParseKeyRefusesWithoutShowingTheKey(t *testing.T) {
	for _, header := range []string{
		"", `""`, `"`, `"open`, `"secret\"`, `"secret\x"`, `"secret" `, `"secret";v=1`, "sec ret", `"sec ret"`, "sécret", "sec\tret",
		"secret\x7f", "secret\x00", strings.Repeat("s", 256), `"` + strings.Repeat("s", 256) + `"`,
	} {
		got, err := ParseKey(header)
		if !errors.Is(err, ErrInvalidKey) || got != "" {
			t.Errorf("ParseKey(%q) = %q, %v; want ErrInvalidKey", header, got, err)
		} else if strings.Contains(err.Error(), "sec") {
			t.Errorf("the error shows the key: %v", err)
		}
	}
}

// Whatever a stranger sends: a key that is accepted keeps the rules, and its quoted form names the same key.
func FuzzParseKey(f *testing.F) {
	for _, seed := range []string{"", "a", `"a"`, `"a\"b"`, `a"b`, `"a\`, `"a"b`, "é", strings.Repeat("k", 256)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		key, err := ParseKey(header)
		if err != nil {
			if !errors.Is(err, ErrInvalidKey) || key != "" {
				t.Fatalf("ParseKey(%q) = %q, %v", header, key, err)
			}
			return
		}
		if len(key) < 1 || len(key) > MaxKeyLength || strings.IndexFunc(key, func(r rune) bool { return r < '!' || r > '~' }) >= 0 {
			t.Fatalf("ParseKey(%q) accepted %q", header, key)
		}
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(key) + `"`
		if again, err := ParseKey(quoted); err != nil || again != key {
			t.Fatalf("ParseKey(%q) = %q, %v; want %q", quoted, again, err, key)
		}
		if header != key && header != quoted {
			t.Fatalf("ParseKey(%q) = %q: neither the bare nor the quoted form", header, key)
		}
	})
}
