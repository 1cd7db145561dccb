package main

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

//go:embed report.html
var pageText string

var page = template.Must(template.New("report").Parse(pageText))

// result is all there is to report.
type result struct {
	Seed     uint64         `json:"seed"`
	Duration time.Duration  `json:"duration"`
	Callers  int            `json:"callers"`
	Tags     string         `json:"tags,omitempty"`
	Env      []string       `json:"env,omitempty"`
	Quiet    time.Duration  `json:"quiet"` // how long it took until everything was done
	Calls    int            `json:"calls"`
	Keys     int            `json:"keys"`
	Orders   int            `json:"orders"`
	Mails    int            `json:"mails"`
	Outcomes map[string]int `json:"outcomes"`
	Exits    map[string]int `json:"exits"` // how often processes ended by themselves, and were started again
	Strikes  []strike       `json:"strikes"`
	Verdict  *verdict       `json:"verdict"`
	Seconds  []second       `json:"seconds"`
}

// second is what was answered in one second.
type second struct {
	OK, Refused, Unclear int
	P50, P99             float64 // milliseconds, of all but the unclear
}

func newResult(o options, e *evidence, v *verdict, quiet time.Duration, l *lab) *result {
	r := &result{Seed: o.seed, Duration: min(e.until, o.duration), Callers: len(l.callers()), Tags: o.tags, Env: o.env, Quiet: quiet, Keys: len(e.keys),
		Orders: len(e.orders), Mails: len(e.mails), Outcomes: map[string]int{}, Exits: map[string]int{}, Strikes: e.strikes, Verdict: v}
	for _, p := range l.processes {
		for _, exit := range p.exits {
			r.Exits[p.name+": "+exit]++
		}
	}
	latencies := make([][]float64, int(e.until/time.Second)+1)
	r.Seconds = make([]second, len(latencies))
	for _, k := range e.keys {
		for _, c := range k.calls {
			r.Calls++
			r.Outcomes[outcomeNames[c.outcome]]++
			at := int(c.end / int64(time.Second))
			if at >= len(latencies) {
				continue
			}
			switch c.outcome {
			case placed, replayed, found:
				r.Seconds[at].OK++
			case unclear:
				r.Seconds[at].Unclear++
				continue
			default:
				r.Seconds[at].Refused++
			}
			latencies[at] = append(latencies[at], float64(c.end-c.start)/1e6)
		}
	}
	for i, all := range latencies {
		if len(all) > 0 {
			slices.Sort(all)
			r.Seconds[i].P50, r.Seconds[i].P99 = all[len(all)/2], all[len(all)*99/100]
		}
	}
	return r
}

// worst is the worst recovery after faults of a kind.
type worst struct {
	Kind             string
	Count, Unseen    int
	Intake, Delivery time.Duration
	Median           time.Duration // of intake
}

func (r *result) Worst() (all []worst) {
	byKind := map[string][]strike{}
	for _, s := range r.Strikes {
		byKind[s.Kind] = append(byKind[s.Kind], s)
	}
	for _, kind := range slices.Sorted(maps.Keys(byKind)) {
		w := worst{Kind: kind, Count: len(byKind[kind])}
		var intakes []time.Duration
		for _, s := range byKind[kind] {
			if !s.Seen {
				w.Unseen++
				continue
			}
			intakes = append(intakes, s.Intake)
			w.Intake, w.Delivery = max(w.Intake, s.Intake), max(w.Delivery, s.Delivery)
		}
		if len(intakes) > 0 {
			slices.Sort(intakes)
			w.Median = intakes[len(intakes)/2]
		}
		all = append(all, w)
	}
	return all
}

// claimed is a claim, and how often it was broken.
type claimed struct {
	Claim string
	Count int
}

func (r *result) Claims() (all []claimed) {
	for _, claim := range claims {
		all = append(all, claimed{claim, r.Verdict.Count[claim]})
	}
	return all
}

func (r *result) Violations() int { return r.Verdict.total() }

// Data is the timeline, for the page's own script.
func (r *result) Data() (template.JS, error) {
	text, err := json.Marshal(map[string]any{"seconds": r.Seconds, "strikes": r.Strikes})
	return template.JS(text), err // #nosec G203 -- its strings are ours, and json escapes < and >
}

func (r *result) writeText(w io.Writer) {
	fmt.Fprintf(w, "seed %d, %s, %d callers: %d faults, %d calls under %d keys, %d orders, %d mails; quiet after %s\n",
		r.Seed, r.Duration.Round(time.Second), r.Callers, len(r.Strikes), r.Calls, r.Keys, r.Orders, r.Mails, r.Quiet.Round(100*time.Millisecond))
	for _, name := range outcomeNames {
		if n := r.Outcomes[name]; n > 0 {
			fmt.Fprintf(w, "  %9d %s\n", n, name)
		}
	}
	fmt.Fprintln(w, "\nrecovery from the end of a fault (of a kill: from the start of the next process), worst of each kind")
	fmt.Fprintf(w, "  %-20s %6s %14s %14s %14s\n", "", "faults", "intake median", "intake worst", "delivery worst")
	for _, k := range r.Worst() {
		fmt.Fprintf(w, "  %-20s %6d %14s %14s %14s\n", k.Kind, k.Count, ms(k.Median), ms(k.Intake), ms(k.Delivery))
	}
	if len(r.Exits) > 0 {
		fmt.Fprintln(w, "\nprocesses that ended by themselves, and were started again")
		for _, exit := range slices.Sorted(maps.Keys(r.Exits)) {
			fmt.Fprintf(w, "  %4d %s\n", r.Exits[exit], exit)
		}
	}
	fmt.Fprintf(w, "\nmails sent again in the documented case (a consumer killed, or its line to the mail server cut, between mail and mark): %d\n\n", r.Verdict.Doubled)
	for _, c := range r.Claims() {
		verdict := "held"
		if c.Count > 0 {
			verdict = fmt.Sprintf("BROKEN %d times", c.Count)
		}
		fmt.Fprintf(w, "  %-75s %s\n", c.Claim, verdict)
	}
	for _, v := range r.Verdict.Violations {
		fmt.Fprintf(w, "\n%s:\n  %s\n", v.Claim, v.Detail)
	}
	fmt.Fprintf(w, "\n%d violations\n", r.Violations())
}

func ms(d time.Duration) string { return d.Round(time.Millisecond).String() }

func (r *result) writeFiles(o options) error {
	if o.json != "" {
		text, err := json.MarshalIndent(r, "", " ")
		if err != nil {
			return err
		}
		if err := os.WriteFile(o.json, text, 0o644); err != nil { // #nosec G306 -- for everybody to read
			return fmt.Errorf("write --json: %w", err)
		}
	}
	if o.report == "" {
		return nil
	}
	var text strings.Builder
	if err := page.Execute(&text, r); err != nil {
		return err
	}
	if err := os.WriteFile(o.report, []byte(text.String()), 0o644); err != nil { // #nosec G306 -- likewise
		return fmt.Errorf("write --report: %w", err)
	}
	return nil
}
