package gather

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// stage is a gatherer whose batches take a second each, and what they were.
type stage struct {
	*Gatherer[int, string]
	mu      sync.Mutex
	batches [][]int
	most    int
	now     int
}

func newStage(limits Limits) *stage {
	s := &stage{}
	s.Gatherer = New(limits, func(ins []int) []string {
		s.mu.Lock()
		s.batches = append(s.batches, slices.Clone(ins))
		s.now++
		s.most = max(s.most, s.now)
		s.mu.Unlock()
		time.Sleep(time.Second) // of the bubble's own clock
		s.mu.Lock()
		s.now--
		s.mu.Unlock()
		outs := make([]string, len(ins))
		for i, in := range ins {
			outs[i] = fmt.Sprint("out ", in)
		}
		return outs
	})
	return s
}

// call makes a call and reports when it ended and how.
func (s *stage) call(t *testing.T, group *sync.WaitGroup, in int, want error) {
	group.Go(func() {
		out, err := s.Do(in)
		if !errors.Is(err, want) || want == nil && out != fmt.Sprint("out ", in) {
			t.Errorf("call %d got %q, %v; want error %v", in, out, err, want)
		}
	})
}

func TestACallAloneStartsAtOnceAndThoseMeanwhileFormTheNextBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(Limits{Batch: 100, UnderWay: 1, Waiting: 100, Wait: time.Minute})
		began := time.Now()
		var group sync.WaitGroup
		s.call(t, &group, 0, nil)
		synctest.Wait()
		for i := 1; i <= 5; i++ {
			s.call(t, &group, i, nil)
			synctest.Wait()
		}
		group.Wait()
		if want := [][]int{{0}, {1, 2, 3, 4, 5}}; !slices.EqualFunc(s.batches, want, slices.Equal) {
			t.Errorf("batches %v; want %v", s.batches, want)
		}
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("two batches took %s", took)
		}
		s.call(t, &group, 6, nil) // it has come to rest, and starts again
		group.Wait()
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("the third took until %s", took)
		}
		synctest.Wait() // no goroutine is left
	})
}

func TestBatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(Limits{Batch: 4, UnderWay: 3, Waiting: 100, Wait: time.Minute})
		var group sync.WaitGroup
		for i := range 50 {
			s.call(t, &group, i, nil)
		}
		group.Wait()
		total := 0
		for _, batch := range s.batches {
			total += len(batch)
			if len(batch) > 4 {
				t.Errorf("a batch has %d calls", len(batch))
			}
		}
		if total != 50 || s.most != 3 {
			t.Errorf("%d calls were made, up to %d batches at a time; want 50 and 3", total, s.most)
		}
	})
}

func TestAFullWaitingRoomRefusesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(Limits{Batch: 10, UnderWay: 1, Waiting: 2, Wait: time.Minute})
		var group sync.WaitGroup
		s.call(t, &group, 0, nil)
		synctest.Wait()
		s.call(t, &group, 1, nil)
		s.call(t, &group, 2, nil)
		synctest.Wait()
		began := time.Now()
		if _, err := s.Do(3); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v; want ErrBusy", err)
		}
		if waited := time.Since(began); waited != 0 {
			t.Errorf("it was refused after %s", waited)
		}
		group.Wait()
		s.call(t, &group, 4, nil) // there is room again
		group.Wait()
	})
}

func TestACallThatHasWaitedTooLongIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(Limits{Batch: 1, UnderWay: 1, Waiting: 100, Wait: 1500 * time.Millisecond})
		var group sync.WaitGroup
		for i, want := range []error{nil, nil, ErrBusy, ErrBusy} {
			s.call(t, &group, i, want)
			synctest.Wait()
		}
		group.Wait()
		s.call(t, &group, 4, nil)
		group.Wait()
		if want := [][]int{{0}, {1}, {4}}; !slices.EqualFunc(s.batches, want, slices.Equal) {
			t.Errorf("batches %v; want %v", s.batches, want)
		}
	})
}

func TestAPanicAnswersItsCallersAndNoOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Batch: 10, UnderWay: 1, Waiting: 10, Wait: time.Minute}, func(ins []int) []int {
			time.Sleep(time.Second)
			if slices.Contains(ins, 13) {
				panic("thirteen")
			}
			return ins
		})
		var group sync.WaitGroup
		do := func(in int, want string) {
			group.Go(func() {
				_, err := g.Do(in)
				if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("call %d got %v; want %q", in, err, want)
				}
			})
			synctest.Wait()
		}
		do(1, "")
		do(12, "thirteen")
		do(13, "thirteen")
		group.Wait()
		do(14, "")
		group.Wait()
	})
}

func TestABatchThatForgetsACallIsAnError(t *testing.T) {
	g := New(Limits{Batch: 1, UnderWay: 1, Waiting: 1, Wait: time.Minute}, func([]int) []int { return nil })
	if _, err := g.Do(1); err == nil {
		t.Error("a call without an output has no error")
	}
}

func BenchmarkDo(b *testing.B) {
	g := New(Limits{Batch: 256, UnderWay: 2, Waiting: 1 << 20, Wait: time.Minute}, func(ins []int) []int { return ins })
	b.ReportAllocs()
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := g.Do(1); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestACallThatIsToldIsMadeAndNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(Limits{Batch: 100, UnderWay: 1, Waiting: 2, Wait: 1500 * time.Millisecond})
		began := time.Now()
		for in := range 4 { // one under way, two waiting, one too many
			s.Tell(in)
			synctest.Wait()
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("telling took %s", took)
		}
		var group sync.WaitGroup
		s.call(t, &group, 4, ErrBusy)
		group.Wait()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if want := [][]int{{0}, {1, 2}}; !slices.EqualFunc(s.batches, want, slices.Equal) {
			t.Errorf("batches %v; want %v", s.batches, want)
		}
	})
}
