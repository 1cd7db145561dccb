package testbed

import (
	"os"
	"os/exec"
	"testing"
)

func TestParseStat(t *testing.T) {
	t.Parallel()
	s, ok := parseStat("7 (a) (b c) S 42 1 1 0 -1 4194560 2731 88 0 0 11 22 33 44 20 0 1 0 12 99 3")
	if want := (Stat{Parent: 42, Ticks: 33, EndedChildren: 77}); !ok || s != want {
		t.Errorf("read %+v", s)
	}
	if _, ok := parseStat("7 (a) S 42"); ok {
		t.Error("half a line passes")
	}
}

func TestChildrenAreThoseThatLive(t *testing.T) {
	if _, ok := ReadStat(os.Getpid()); !ok {
		t.Skip("this system does not tell")
	}
	child := exec.Command("cat")
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if _, ok := Children(os.Getpid())[child.Process.Pid]; !ok {
		t.Error("a child is not found")
	}
	in.Close()
	_ = child.Wait()
	if _, ok := Children(os.Getpid())[child.Process.Pid]; ok {
		t.Error("a child that has ended is found")
	}
}
