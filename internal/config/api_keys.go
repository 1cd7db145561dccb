package config

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"
)

// APIKey lets a caller in whose bearer token has this hash. The token itself is in no configuration.
type APIKey struct {
	Name string
	Hash [sha256.Size]byte
}

// callerName is what a caller may be called: the name stands in tables and, with its keys and orders, for ever.
var callerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// anonymous is the caller of every request while there are no keys (package server).
const anonymous = "anonymous"

// apiKeys reads name=hash,name=hash. A mistake says which entry is wrong, and not what it holds: it could be the token.
func (r *reader) apiKeys(name string) []APIKey {
	if r.getenv(name) == "" {
		return nil
	}
	var keys []APIKey
	names, hashes := map[string]int{}, map[[sha256.Size]byte]int{}
	for i, entry := range strings.Split(r.getenv(name), ",") {
		i++
		caller, hash, _ := strings.Cut(strings.TrimSpace(entry), "=")
		key := APIKey{Name: caller}
		n, err := hex.Decode(key.Hash[:], []byte(hash[:min(len(hash), 2*sha256.Size)]))
		switch {
		case caller == "":
			r.mistake(name, "has no name in entry %d; an entry is name=sha256-hex", i)
		case !callerName.MatchString(caller):
			r.mistake(name, "has a bad name in entry %d; a name is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or a digit", i)
		case caller == anonymous:
			r.mistake(name, "has the name anonymous in entry %d, which would have the orders that were placed without a key; take another name", i)
		case err != nil || n != sha256.Size || len(hash) != 2*sha256.Size:
			r.mistake(name, "has no hash in entry %d; it must be the SHA-256 of the token, in 64 hexadecimal digits", i)
		case key.Hash == sha256.Sum256(nil):
			r.mistake(name, "has the hash of an empty token in entry %d; make a token, and hash that", i)
		case names[caller] > 0:
			r.mistake(name, "has the same name in entries %d and %d; a caller has one key", names[caller], i)
		case hashes[key.Hash] > 0:
			r.mistake(name, "has the same hash in entries %d and %d; give each caller a token of its own", hashes[key.Hash], i)
		default:
			keys = append(keys, key)
		}
		names[caller], hashes[key.Hash] = i, i
	}
	return keys
}
