package server

import (
	"bytes"
	"context"
	"embed"
	"html/template"
	"net/http"
	"strings"

	"idempotent-orders/gen/api"
)

//go:embed docs
var docsFiles embed.FS

var docsPage = template.Must(template.ParseFS(docsFiles, "docs/docs.html"))

// GetDocs serves a page to read and try the contract, made from it. Nothing of it comes from elsewhere.
func (s *Server) GetDocs(context.Context, api.GetDocsRequestObject) (api.GetDocsResponseObject, error) {
	page, err := s.docs()
	if err != nil {
		return nil, err
	}
	return api.GetDocs200TexthtmlResponse{Body: bytes.NewReader(page), ContentLength: int64(len(page))}, nil
}

// renderDocs makes the page of GetDocs.
func renderDocs() ([]byte, error) {
	contract, err := api.GetSpec()
	if err != nil {
		return nil, err
	}
	var page bytes.Buffer
	err = docsPage.Execute(&page, contract)
	return page.Bytes(), err
}

// GetDocsFile serves what the page of GetDocs loads.
func (s *Server) GetDocsFile(_ context.Context, request api.GetDocsFileRequestObject) (api.GetDocsFileResponseObject, error) {
	content, err := docsFiles.ReadFile("docs/" + request.File)
	switch {
	case err != nil:
		return nil, errNotFound
	case strings.HasSuffix(request.File, ".css"):
		return api.GetDocsFile200TextcssResponse{Body: bytes.NewReader(content), ContentLength: int64(len(content))}, nil
	case strings.HasSuffix(request.File, ".js"):
		return api.GetDocsFile200TextjavascriptResponse{Body: bytes.NewReader(content), ContentLength: int64(len(content))}, nil
	}
	return nil, errNotFound
}

// guardPage tells browsers what a page may do, which is nothing but what it must: styles, scripts and requests of its own origin for
// the page of GetDocs, and nothing at all for others.
func guardPage(h http.Header, path string) {
	docs := path == "/docs" || strings.HasPrefix(path, "/docs/")
	if !docs && !strings.HasPrefix(path, "/problems/") {
		return
	}
	policy := "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	if docs {
		policy += "; style-src 'self'; script-src 'self'; connect-src 'self'"
	}
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Embedder-Policy", "require-corp")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Permissions-Policy", "camera=(), geolocation=(), microphone=()")
}
