package server

import (
	"regexp"
	"strings"
	"testing"
)

func TestTheDocsAreMadeFromTheContractAndLoadNothingFromElsewhere(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	page := api.do("GET", "/docs", nil, nil)
	for _, want := range []string{
		"POST <code>/orders</code>", "GET <code>/orders/{order_id}</code>", "GET <code>/docs</code>", "Idempotency-Key", "<th>429</th>", `<form id="try">`,
	} {
		if page.status != 200 || !strings.Contains(page.body, want) {
			t.Errorf("%d: %q is missing", page.status, want)
		}
	}
	for _, link := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(page.body, -1) {
		if got := api.do("GET", link[1], nil, nil); !strings.HasPrefix(link[1], "/") || got.status != 200 || len(got.body) == 0 {
			t.Errorf("%s: %d", link[1], got.status)
		}
	}
	for _, elsewhere := range []string{"http://", "https://", "//cdn"} {
		for _, path := range []string{"/docs", "/docs/docs.js", "/docs/docs.css"} {
			if body := api.do("GET", path, nil, nil).body; strings.Contains(body, elsewhere) {
				t.Errorf("%s leads to %s", path, elsewhere)
			}
		}
	}
	for _, none := range []string{"docs.html", "..%2fdocs.go", "other.js"} {
		api.do("GET", "/docs/"+none, nil, nil).problem(t, 404, "not-found")
	}
}

func TestPagesAllowBrowsersOnlyWhatTheyNeed(t *testing.T) {
	t.Parallel()
	api := newAPI(t)
	inline := regexp.MustCompile(`(?i)<style|<script[^>]*>[^<]|\sstyle=|\son[a-z]+=|javascript:`)
	for _, path := range []string{"/docs", "/docs/docs.css", "/docs/docs.js", "/problems/not-found", "/problems/none"} {
		got := api.do("GET", path, nil, nil)
		policy := got.header.Get("Content-Security-Policy")
		if !strings.HasPrefix(policy, "default-src 'none';") || strings.Contains(policy, "unsafe") || strings.Contains(policy, "*") ||
			!strings.Contains(policy, "frame-ancestors 'none'") || strings.Contains(policy, "'self'") != strings.HasPrefix(path, "/docs") {
			t.Errorf("%s has the policy %s", path, policy)
		}
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
			"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
		} {
			if got.header.Get(name) != want {
				t.Errorf("%s: %s is %q", path, name, got.header.Get(name))
			}
		}
		if strings.HasPrefix(got.header.Get("Content-Type"), "text/html") && inline.MatchString(got.body) {
			t.Errorf("%s has something inline: %s", path, inline.FindString(got.body))
		}
	}
}
