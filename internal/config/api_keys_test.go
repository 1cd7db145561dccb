package config

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func hashOf(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }

func TestAPIKeysAreNamesAndHashes(t *testing.T) {
	c, err := read(map[string]string{"API_KEYS": "shop=" + hashOf("a") + " , Anonymous=" + hashOf("c") + ", back-office.2_B=" + strings.ToUpper(hashOf("b"))})
	want := []APIKey{{"shop", sha256.Sum256([]byte("a"))}, {"Anonymous", sha256.Sum256([]byte("c"))}, {"back-office.2_B", sha256.Sum256([]byte("b"))}}
	if err != nil || !slices.Equal(c.APIKeys, want) {
		t.Errorf("read %v, %v", c.APIKeys, err)
	}
}

func TestEachMistakeInAPIKeysIsNamedAndNoneIsShown(t *testing.T) {
	a, b := hashOf("a"), hashOf("b")
	for keys, want := range map[string]string{
		"canary":                               "no hash in entry 1",
		"shop=canary":                          "no hash in entry 1",
		"shop=" + a + ",other=" + a[:63]:       "no hash in entry 2",
		"shop=" + a + "0":                      "no hash in entry 1",
		"shop=" + a[:63] + "g":                 "no hash in entry 1",
		"shop=" + a[:62] + "ü":                 "no hash in entry 1",
		"=" + a:                                "no name in entry 1",
		"shop=" + a + ",":                      "no name in entry 2",
		"a b=" + a:                             "bad name in entry 1",
		"-a=" + a:                              "bad name in entry 1",
		strings.Repeat("canary", 11) + "=" + a: "bad name in entry 1",
		"shop=" + a + ",shop=" + b:             "same name in entries 1 and 2",
		"shop=" + a + ",b=" + b + ",c=" + a:    "same hash in entries 1 and 3",
		"shop=" + a + ",anonymous=" + b:        "name anonymous in entry 2, which would have the orders that were placed without a key; take another name",
		"shop=" + hashOf(""):                   "hash of an empty token in entry 1",
	} {
		_, err := read(map[string]string{"API_KEYS": keys})
		if err == nil || !strings.Contains(err.Error(), "API_KEYS has ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %s", keys, err, want)
		}
		if err != nil && (strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), a)) {
			t.Errorf("%s: the error shows it: %v", keys, err)
		}
	}
}
