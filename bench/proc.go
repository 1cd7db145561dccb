package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"idempotent-orders/internal/testbed"
)

// usage is what the processes used while they were watched, in cores. A figure below zero is not known.
type usage struct {
	contender, postgres, redis float64 // the contender's is NaN when there is none
	busy                       float64 // the whole machine
	peak                       int64   // the most memory the contender ever had, in bytes
}

// ticksPerSecond is the unit of /proc/<pid>/stat on every Linux that Go runs on.
const ticksPerSecond = 100

// watch begins to watch; the returned function ends it. p may be nil.
func (l *lab) watch(p *process) func() usage {
	read := func() [4]float64 {
		seconds := [4]float64{math.NaN(), cpuSeconds(l.postgres.Pid(), true), cpuSeconds(l.redis.Pid(), false), busySeconds()}
		if p != nil {
			seconds[0] = cpuSeconds(p.cmd.Process.Pid, false)
		}
		return seconds
	}
	start, before := time.Now(), read()
	return func() usage {
		after, took := read(), time.Since(start).Seconds()
		cores := func(i int) float64 {
			if before[i] < 0 || after[i] < 0 {
				return -1
			}
			return (after[i] - before[i]) / took
		}
		u := usage{contender: cores(0), postgres: cores(1), redis: cores(2), busy: cores(3)}
		if p != nil {
			u.peak = peakMemory(p.cmd.Process.Pid)
		}
		return u
	}
}

// cpuSeconds returns the processor time that a process has used, if wanted with all its children, living or ended, or a
// number below zero if the system does not tell.
func cpuSeconds(pid int, children bool) float64 {
	for {
		own, ok := testbed.ReadStat(pid)
		if !ok {
			return -1
		}
		ticks := own.Ticks
		if children {
			ticks += own.EndedChildren + livingChildren(pid)
			// A child that ended in between was counted twice or not at all.
			if again, _ := testbed.ReadStat(pid); again.EndedChildren != own.EndedChildren {
				continue
			}
		}
		return float64(ticks) / ticksPerSecond
	}
}

func livingChildren(pid int) (ticks int64) {
	for _, child := range testbed.Children(pid) {
		ticks += child.Ticks
	}
	return ticks
}

// busySeconds returns the processor time that everything on the machine has used, or a number below zero if the system
// does not tell.
func busySeconds() float64 {
	text, err := os.ReadFile("/proc/stat") // cpu, then ticks: user nice system idle iowait irq softirq steal
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 9 {
		return -1
	}
	total := int64(0)
	for _, i := range []int{1, 2, 3, 6, 7, 8} {
		ticks, _ := strconv.ParseInt(fields[i], 10, 64)
		total += ticks
	}
	return float64(total) / ticksPerSecond
}

// peakMemory returns the most memory that a process had resident, or 0 if the system does not tell.
func peakMemory(pid int) int64 {
	kilobytes, _ := strconv.ParseInt(fieldOf(fmt.Sprintf("/proc/%d/status", pid), "VmHWM"), 10, 64)
	return kilobytes << 10
}

// fieldOf returns the first word after "name:" in a file, or all of the line if there is no unit in kB; "" if there is none.
func fieldOf(path, name string) string {
	text, _ := os.ReadFile(path) // #nosec G304 -- in /proc
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		}
	}
	return ""
}

// machine describes the machine in one line, without its name.
func machine(dir string) string {
	memory, _ := strconv.ParseFloat(fieldOf("/proc/meminfo", "MemTotal"), 64)
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	text := fmt.Sprintf("%s, %d cores", cmp.Or(fieldOf("/proc/cpuinfo", "model name"), runtime.GOARCH), runtime.NumCPU())
	if memory > 0 {
		text += fmt.Sprintf(", %.0f GB of memory", memory/(1<<20))
	}
	text += ", " + runtime.GOOS + " " + strings.TrimSpace(string(kernel))
	if d, err := fsyncTakes(dir); err == nil {
		text += fmt.Sprintf("; its disk writes and syncs 8 kB in %s (median of 100)", d.Round(time.Microsecond))
	}
	return text
}

// fsyncTakes returns how long it takes to write a page and have it on the disk. It says more of a disk than its type.
func fsyncTakes(dir string) (time.Duration, error) {
	file, err := os.CreateTemp(dir, "fsync")
	if err != nil {
		return 0, err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	var took []float64
	page := make([]byte, 8192)
	for range 100 {
		start := time.Now()
		if _, err := file.Write(page); err != nil {
			return 0, err
		}
		if err := file.Sync(); err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(start)))
	}
	return time.Duration(median(took)), nil
}
