package server

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"
)

// anonymous is the caller of every request while there are no API keys.
const anonymous = "anonymous"

// Caller is who may use /orders. The token itself is known to the caller alone.
type Caller struct {
	Name string
	Hash [sha256.Size]byte // of the bearer token
}

type callerKey struct{}

// authenticated returns the request with its caller, or errUnauthorized. The hash of the token is compared with every
// caller's in constant time, so that the time tells neither how near a guess was nor whose key it was.
func (s *Server) authenticated(r *http.Request) (*http.Request, error) {
	if len(s.Callers) == 0 || !isOrders(r.URL.Path) {
		return r, nil
	}
	token, ok := bearer(r.Header)
	hash := sha256.Sum256([]byte(token))
	found := -1
	for i := range s.Callers {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(hash[:], s.Callers[i].Hash[:]), i, found)
	}
	if !ok || found < 0 {
		return nil, errUnauthorized
	}
	name := s.Callers[found].Name
	if l := linkOf(r); l != nil {
		l.carries(name)
	}
	return r.WithContext(context.WithValue(r.Context(), callerKey{}, name)), nil
}

// isOrders tells whether a path is that of an operation that asks who calls.
func isOrders(path string) bool { return path == "/orders" || strings.HasPrefix(path, "/orders/") }

// bearer returns the token of the one Authorization header (RFC 6750, section 2.1).
func bearer(h http.Header) (token string, ok bool) {
	values := h.Values("Authorization")
	if len(values) != 1 {
		return "", false
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	token = strings.TrimLeft(token, " ")
	return token, ok && strings.EqualFold(scheme, "Bearer") && token != ""
}

// caller returns who sent the request. Where nobody asked, nobody gets in.
func (s *Server) caller(ctx context.Context) (string, error) {
	if len(s.Callers) == 0 {
		return anonymous, nil
	}
	name, ok := ctx.Value(callerKey{}).(string)
	if !ok {
		return "", errUnauthorized
	}
	return name, nil
}
