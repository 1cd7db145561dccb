package reconcile

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Err returns nil when every order has exactly one event and that is finished, and else says in one line what is not so.
// Dead events are accounted for, but nobody got the mail: they are an error too, unless they are allowed.
func (r Report) Err(allowDead bool) error {
	var parts []string
	if r.Missing > 0 {
		parts = append(parts, fmt.Sprintf("missing: %d", r.Missing))
	}
	if r.Unfinished > 0 {
		parts = append(parts, fmt.Sprintf("not finished yet: %d", r.Unfinished))
	}
	if r.Dead > 0 && !allowDead {
		parts = append(parts, fmt.Sprintf("dead: %d", r.Dead))
	}
	if parts == nil {
		return nil
	}
	return errors.New(strings.Join(parts, "; "))
}

// headings are how the kinds are shown, in this order.
var headings = []struct {
	kind Kind
	text string
}{{Missing, "missing"}, {Unfinished, "not finished yet"}, {Dead, "dead"}}

// WriteText writes the report for people: every difference with its count, and below it its first ids.
func (r Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s at %s\n", r.selected(), stamp(r.At))
	line(&b, r.Orders, "orders")
	line(&b, r.Sent, "sent by the consumer")
	if r.Older > 0 {
		line(&b, r.Older, "placed before "+stamp(r.KeptFrom)+", when the archive begins: retention may have dropped their events")
	}
	totals := map[Kind]int64{Missing: r.Missing, Unfinished: r.Unfinished, Dead: r.Dead}
	for _, h := range headings {
		fmt.Fprintf(&b, "%s: %d\n", h.text, totals[h.kind])
		for _, d := range r.Differences {
			if d.Kind == h.kind {
				d.write(&b)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (d Difference) write(b *strings.Builder) {
	line(b, d.Count, d.Meaning)
	for _, id := range d.First {
		fmt.Fprintf(b, "%12s  %s\n", "", id)
	}
	if more := d.Count - int64(len(d.First)); more > 0 {
		fmt.Fprintf(b, "%12s  and %d more\n", "", more)
	}
}

func line(b *strings.Builder, count int64, text string) { fmt.Fprintf(b, "%12d  %s\n", count, text) }

// selected says which orders the report is about.
func (r Report) selected() string {
	if r.From.IsZero() && r.To.IsZero() {
		return "All orders"
	}
	text := "Orders"
	if !r.From.IsZero() {
		text += " from " + stamp(r.From)
	}
	if !r.To.IsZero() {
		text += " to before " + stamp(r.To)
	}
	return text
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
