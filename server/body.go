package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"idempotent-orders/gen/api"
	"idempotent-orders/internal/fault"
	"idempotent-orders/order"
)

// maxBody is the largest body, in bytes.
const maxBody = 64 << 10

// strictly is the generated code, but for the body of an order, which is read here: the generated code decodes with
// encoding/json, which ignores the case of names and keeps the last of repeated members.
type strictly struct {
	api.ServerInterface
	server *Server
}

// PlaceOrder reads the body and answers with what Server.PlaceOrder returns.
func (o strictly) PlaceOrder(w http.ResponseWriter, r *http.Request, params api.PlaceOrderParams) {
	response, err := o.placeOrder(w, r, params)
	o.server.respond(w, r, response, err)
}

// respond writes an answer, or the problem that err is.
func (s *Server) respond(w http.ResponseWriter, r *http.Request, response api.PlaceOrderResponseObject, err error) {
	fault.ServerAnswering.Reached()
	if err == nil {
		err = response.VisitPlaceOrderResponse(w)
	}
	if err != nil {
		s.refuse(w, r, err)
	}
	fault.ServerAnswered.Reached()
}

func (o strictly) placeOrder(w http.ResponseWriter, r *http.Request, params api.PlaceOrderParams) (api.PlaceOrderResponseObject, error) {
	body, err := bodyOf(w, r)
	if err != nil {
		return nil, err
	}
	request, err := parseOrderRequest(body)
	if err != nil {
		return nil, err
	}
	fault.ServerValidated.Reached()
	response, err := o.server.PlaceOrder(r.Context(), api.PlaceOrderRequestObject{Params: params, Body: &request})
	if placed, ok := response.(placedResponse); ok && placed.Replayed {
		o.server.note(r, params.IdempotencyKey, body, placed)
	}
	return response, err
}

// readBody returns the body, empty when there is none, or why it is refused.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.ContentLength > maxBody {
		return nil, errBodyTooLarge
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, errBodyTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		w.Header().Set("Connection", "close")
		return nil, &refusal{error: errInvalidRequest, detail: "The body did not arrive in time."}
	case err != nil:
		return nil, &refusal{error: fmt.Errorf("%w: %w", errInvalidRequest, err), detail: "The body was cut off."}
	}
	if len(body) > 0 && !isJSON(r.Header) {
		return nil, errUnsupportedMediaType
	}
	fault.ServerRead.Reached()
	return body, nil
}

// isJSON tells whether the headers declare plain JSON. The charset may be spelled out: JSON is always UTF-8.
func isJSON(h http.Header) bool {
	if h.Get("Content-Type") == "application/json" && h.Get("Content-Encoding") == "" { // as nearly always
		return true
	}
	mediaType, params, err := mime.ParseMediaType(h.Get("Content-Type"))
	charset, spelled := params["charset"]
	return err == nil && mediaType == "application/json" &&
		(!spelled || strings.EqualFold(charset, "utf-8")) && h.Get("Content-Encoding") == ""
}

// parseOrderRequest reads a body and returns the request with every member set. A refusal lists each member that is wrong.
func parseOrderRequest(body []byte) (api.OrderRequest, error) {
	userID, amount := order.DefaultUserID, int64(order.DefaultAmount)
	request := api.OrderRequest{UserId: &userID, Amount: &amount}
	if len(body) == 0 {
		return request, nil
	}
	members, broken := members(body)
	wrong := []api.ProblemMember(nil)
	for _, m := range members {
		var reason string
		switch m.name {
		case "user_id":
			userID, reason = parseUserID(m.value)
		case "amount":
			amount, reason = parseAmount(m.value)
		default:
			reason = "is not a member of the request"
		}
		if reason != "" {
			wrong = append(wrong, api.ProblemMember{Pointer: pointer(m.name), Detail: reason})
		}
	}
	if broken != nil {
		wrong = append(wrong, *broken)
	}
	if len(wrong) > 0 {
		return api.OrderRequest{}, &refusal{
			error: errInvalidRequest, detail: "The body breaks the schema; errors lists each member and why.", members: wrong,
		}
	}
	return request, nil
}

type member struct {
	name  string
	value jsontext.Value // a part of the body
}

// decoders keep what they have allocated from one body to the next.
var decoders = sync.Pool{New: func() any { return new(jsontext.Decoder) }}

// members returns the members of the one JSON object that body must be (RFC 8259, in UTF-8, no name twice), up to where
// it is broken.
func members(body []byte) (found []member, broken *api.ProblemMember) {
	whole := func(reason string) *api.ProblemMember { return &api.ProblemMember{Pointer: "#", Detail: reason} }
	d := decoders.Get().(*jsontext.Decoder)
	defer decoders.Put(d)
	d.Reset(bytes.NewBuffer(body)) // which it reads in place
	if d.PeekKind() != '{' {
		if err := d.SkipValue(); err != nil {
			return nil, whole("is not JSON")
		}
		return nil, whole("must be an object")
	}
	if _, err := d.ReadToken(); err != nil {
		return nil, whole("is not JSON")
	}
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return found, broke(err)
		}
		key := name.String()
		value, err := d.ReadValue()
		if err != nil {
			return found, broke(err)
		}
		end := d.InputOffset()
		found = append(found, member{key, body[end-int64(len(value)) : end]})
	}
	if _, err := d.ReadToken(); err != nil {
		return found, whole("is not JSON")
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return found, whole("has something after the object")
	}
	return found, nil
}

// broke returns what breaks an object, from the error of its reader: a repeated name, with the member it names, or else
// what is not JSON.
func broke(err error) *api.ProblemMember {
	var syntax *jsontext.SyntacticError
	if errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &syntax) {
		name, _, nested := strings.Cut(strings.TrimPrefix(string(syntax.JSONPointer), "/"), "/")
		detail := "stands twice"
		if nested {
			detail = "has a member twice"
		}
		return &api.ProblemMember{Pointer: pointer(strings.NewReplacer("~1", "/", "~0", "~").Replace(name)), Detail: detail}
	}
	return &api.ProblemMember{Pointer: "#", Detail: "is not JSON"}
}

// parseUserID returns the user id, or why it is none.
func parseUserID(value jsontext.Value) (string, string) {
	if value.Kind() != '"' {
		return "", "must be a string"
	}
	text, err := jsontext.AppendUnquote(nil, value)
	if err != nil {
		return "", "must be a string of Unicode"
	}
	switch n := utf8.RuneCount(text); {
	case n == 0:
		return "", "must not be empty"
	case n > order.MaxUserID:
		return "", fmt.Sprintf("must have at most %d characters", order.MaxUserID)
	case bytes.IndexByte(text, 0) >= 0:
		return "", "must not contain U+0000"
	}
	return string(text), ""
}

// parseAmount returns the amount, or why it is none. An integer is a number without a fraction or an exponent, as in the
// JSON Schema that OpenAPI 3.0 builds on (draft-wright-json-schema-00, section 3.5).
func parseAmount(value jsontext.Value) (int64, string) {
	if value.Kind() != '0' {
		return 0, "must be an integer"
	}
	if bytes.ContainsAny(value, ".eE") {
		return 0, "must be an integer, without a fraction or an exponent"
	}
	amount, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || amount < 1 || amount > order.MaxAmount {
		return 0, fmt.Sprintf("must be from 1 to %d", order.MaxAmount)
	}
	return amount, ""
}

// pointer returns the JSON Pointer of a member as a URI fragment (RFC 6901, section 6).
func pointer(name string) string {
	const most = 64 // of a name that a stranger made up
	if len(name) > most {
		name = strings.ToValidUTF8(name[:most], "") + "…"
	}
	var b strings.Builder
	b.WriteString("#/")
	for _, c := range []byte(strings.NewReplacer("~", "~0", "/", "~1").Replace(name)) {
		if c > ' ' && c < 0x7f && !strings.ContainsRune(`"#%<>[\]^`+"`{|}", rune(c)) {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
