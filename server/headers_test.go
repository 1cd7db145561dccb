package server

import (
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// What strangers write into headers is read without a fault, and never into more than it says.
func FuzzHeaders(f *testing.F) {
	f.Add("Bearer token", "wait=5", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "application/json")
	f.Add("", "", "", "")
	f.Fuzz(func(t *testing.T, authorization, prefer, traceparent, contentType string) {
		h := http.Header{"Authorization": {authorization}, "Content-Type": {contentType}}
		if token, ok := bearer(h); ok {
			scheme := authorization[:min(7, len(authorization))]
			if token == "" || !strings.EqualFold(scheme, "bearer ") || strings.TrimLeft(authorization[7:], " ") != token {
				t.Fatalf("%q has the token %q", authorization, token)
			}
		}
		if wait := preferredWait(prefer); wait < 0 || wait > maxWait || wait > 0 && !strings.Contains(strings.ToLower(prefer), "wait") {
			t.Fatalf("%q waits for %s", prefer, wait)
		}
		if validTraceparent(traceparent) && !regexp.MustCompile(`^[0-9a-f-]{55}$`).MatchString(traceparent) {
			t.Fatalf("%q is taken for a traceparent", traceparent)
		}
		if isJSON(h) && !strings.Contains(strings.ToLower(contentType), "application/json") {
			t.Fatalf("%q is taken for JSON", contentType)
		}
	})
}
