package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"html/template"
	"log/slog"
	"math"
	"net/http"
	"strconv"

	"github.com/google/uuid"

	"idempotent-orders/gen/api"
	"idempotent-orders/idempotency"
	"idempotent-orders/migrations"
	"idempotent-orders/order"
)

// Errors that only HTTP knows.
var (
	errKeyMissing           = errors.New("no idempotency key")
	errInvalidRequest       = errors.New("invalid request")
	errNotFound             = errors.New("not found")
	errMethodNotAllowed     = errors.New("method not allowed")
	errBodyTooLarge         = errors.New("body too large")
	errUnsupportedMediaType = errors.New("unsupported media type")
	errUnauthorized         = errors.New("unauthorized")
	errTooManyRequests      = errors.New("too many requests")
	errInternal             = errors.New("internal error")
)

// problemType is a kind of problem: what a client is told, and the page that explains it.
type problemType struct {
	name       string
	status     int
	title      string
	detail     string // of a problem whose error has nothing more to say
	meaning    string // for the page
	remedy     string // for the page
	retryAfter int    // seconds; 0: no such header
}

var internalError = problemType{
	name: "internal-error", status: http.StatusInternalServerError, title: "Internal error",
	detail:  "The service failed. Send the request again with the same Idempotency-Key.",
	meaning: "A fault of the service, not of the request. Whether the order was placed is unknown.",
	remedy:  "Send the same request again with the same Idempotency-Key: at most one order will exist.",
}

// problems says which error is which problem. The first entry that matches counts; an error that none matches is the
// last.
var problems = []struct {
	err error
	problemType
}{
	{errKeyMissing, problemType{
		name: "idempotency-key-missing", status: http.StatusBadRequest, title: "Idempotency-Key is missing",
		detail:  "Placing an order requires the header Idempotency-Key.",
		meaning: "The request has no Idempotency-Key header, so sending it again could place a second order.",
		remedy:  "Make up a key for each order, such as a UUID, and send it with every try of that order.",
	}},
	{idempotency.ErrInvalidKey, problemType{
		name: "idempotency-key-invalid", status: http.StatusBadRequest, title: "Idempotency-Key is invalid",
		detail:  "The header Idempotency-Key must stand once, with 1 to 255 visible ASCII characters, bare or as a quoted string.",
		meaning: "The Idempotency-Key header is empty, too long, sent twice, or has characters that are not visible ASCII.",
		remedy:  "Send the header once, with 1 to 255 characters from ! to ~, bare or as a quoted structured-field string.",
	}},
	{errInvalidRequest, problemType{
		name: "invalid-request", status: http.StatusBadRequest, title: "The request is invalid",
		detail:  "The body is not a JSON object of the members that openapi.yaml describes.",
		meaning: "The body is not JSON, or a member of it breaks the schema. The member errors lists each one and why.",
		remedy:  "Correct the members listed. Unknown, repeated and differently spelled members are refused.",
	}},
	{errNotFound, notFound},
	{order.ErrNotFound, notFound},
	{errMethodNotAllowed, problemType{
		name: "method-not-allowed", status: http.StatusMethodNotAllowed, title: "Method not allowed",
		detail:  "This resource does not have that method; the header Allow lists those it has.",
		meaning: "The resource exists, but does not have the method of the request.",
		remedy:  "Use one of the methods that the Allow header lists.",
	}},
	{errBodyTooLarge, problemType{
		name: "body-too-large", status: http.StatusRequestEntityTooLarge, title: "The body is too large",
		detail:  "The body may be 64 KiB at most.",
		meaning: "The request's body is larger than 64 KiB.",
		remedy:  "Send a smaller body; an order needs less than a hundred bytes.",
	}},
	{errUnsupportedMediaType, problemType{
		name: "unsupported-media-type", status: http.StatusUnsupportedMediaType, title: "Unsupported media type",
		detail:  "The body must be application/json, without a Content-Encoding.",
		meaning: "The body's Content-Type is not application/json, or it has a Content-Encoding.",
		remedy:  "Send the header Content-Type: application/json, or no body at all.",
	}},
	{idempotency.ErrInProgress, problemType{
		name: "request-in-progress", status: http.StatusConflict, title: "The first send is still under way",
		detail:  "Another send with this Idempotency-Key is still under way. Send again for its answer, or with Prefer: wait=N.",
		meaning: "Another request with the same Idempotency-Key is being worked on at this moment.",
		remedy:  "Send again after the seconds in Retry-After, or send with Prefer: wait=10 to wait for the answer.",

		retryAfter: 1,
	}},
	{idempotency.ErrMismatch, problemType{
		name: "idempotency-key-reused", status: http.StatusUnprocessableEntity, title: "Idempotency-Key belongs to another request",
		detail:  "This Idempotency-Key was used for an order that asked for something else.",
		meaning: "An order was placed with this Idempotency-Key, and that request asked for something else.",
		remedy:  "Use a new key for a new order. To get the first answer again, send exactly what was sent first.",
	}},
	{idempotency.ErrOutcomeUnknown, unavailable},
	{order.ErrUnavailable, unavailable},
	{migrations.ErrNotMigrated, unavailable},
	{errUnauthorized, problemType{
		name: "unauthorized", status: http.StatusUnauthorized, title: "Unauthorized",
		detail:  "The bearer token is missing or wrong.",
		meaning: "This service wants a bearer token, and the request has none or a wrong one.",
		remedy:  "Send the header Authorization: Bearer, with the token you were given.",
	}},
	{errTooManyRequests, problemType{
		name: "too-many-requests", status: http.StatusTooManyRequests, title: "Too many requests",
		detail:  "You are over your rate. Send again later.",
		meaning: "The caller is over the rate that is configured for it.",
		remedy:  "Send again after the seconds in Retry-After.",

		retryAfter: 1,
	}},
	{errInternal, internalError},
}

var notFound = problemType{
	name: "not-found", status: http.StatusNotFound, title: "Not found",
	detail:  "There is no such resource.",
	meaning: "There is no such resource, or it belongs to another caller.",
	remedy:  "Check the path and the order's id.",
}

var unavailable = problemType{
	name: "unavailable", status: http.StatusServiceUnavailable, title: "Unavailable",
	detail: "The service cannot say at the moment. Send the request again with the same Idempotency-Key; that is always safe.",
	meaning: "PostgreSQL, which decides about every order, cannot be asked at the moment, too many requests are under way, " +
		"or events wait longer than the service allows. " +
		"Whether the order was placed may be unknown.",
	remedy: "Send the same request again with the same Idempotency-Key after the seconds in Retry-After: at most one order will exist.",

	retryAfter: 1,
}

// refusal is an error with something to say to the client.
type refusal struct {
	error
	detail  string // empty: that of the problem
	members []api.ProblemMember

	retryAfter int   // seconds; 0: as the problem says
	line       *line // where the connection waits before it is read again; nil: it does not
}

func (r *refusal) Unwrap() error { return r.error }

// classify returns the problem that an error is.
func classify(err error) problemType {
	for _, p := range problems {
		if errors.Is(err, p.err) {
			return p.problemType
		}
	}
	return internalError
}

// refuse answers a request with the problem that err is. The cause goes to the log, never to the client.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	p := classify(err)
	id := uuid.Must(uuid.NewV7()).String() // names the request in the log and in the problem
	s.logProblem(r, p, id, err)

	var line *line
	body := api.Problem{Type: "/problems/" + p.name, Title: p.title, Status: p.status, Detail: p.detail, Instance: id}
	if said := (*refusal)(nil); errors.As(err, &said) {
		body.Detail = cmp.Or(said.detail, p.detail)
		p.retryAfter, line = cmp.Or(said.retryAfter, p.retryAfter), said.line
		if len(said.members) > 0 {
			body.Errors = &said.members
		}
	}
	var buf bytes.Buffer
	if err := json.NewEncoder(&buf).Encode(body); err != nil {
		panic(err) // a struct of strings and numbers
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Cache-Control", "no-store")
	if p.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if l := linkOf(r); l != nil && line != nil {
		l.line, l.held = line, s.holds.join(line)
		p.retryAfter = max(p.retryAfter, int(math.Ceil(l.held.Seconds())))
	}
	if p.retryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(p.retryAfter))
	}
	h.Set("Content-Length", strconv.Itoa(buf.Len()))
	w.WriteHeader(p.status)
	_, _ = w.Write(buf.Bytes())
}

func (s *Server) logProblem(r *http.Request, p problemType, id string, err error) {
	level := slog.LevelInfo
	switch {
	case errors.Is(err, errCrowded): // a room logs once a second
		level = slog.LevelDebug
	case p.status >= http.StatusInternalServerError && r.Context().Err() == nil: // else the client left, which is no fault of ours
		level = slog.LevelError
	}
	s.Log.Log(r.Context(), level, "Request refused",
		"request", id, "method", r.Method, "path", r.URL.Path, "status", p.status, "problem", p.name, "error", err)
}

var problemPage = template.Must(template.New("problem").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{.Title}}</title>
<h1>{{.Title}}</h1>
<p>Status {{.Status}}, type <code>/problems/{{.Name}}</code>.</p>
<p>{{.Meaning}}</p>
<p>{{.Remedy}}</p>
</html>
`))

// GetProblem serves the page of a problem type.
func (s *Server) GetProblem(_ context.Context, request api.GetProblemRequestObject) (api.GetProblemResponseObject, error) {
	for _, p := range problems {
		if p.name != request.Name {
			continue
		}
		var page bytes.Buffer
		err := problemPage.Execute(&page, struct {
			Name, Title, Meaning, Remedy string
			Status                       int
		}{p.name, p.title, p.meaning, p.remedy, p.status})
		return api.GetProblem200TexthtmlResponse{Body: &page, ContentLength: int64(page.Len())}, err
	}
	return nil, errNotFound
}
