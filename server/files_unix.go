//go:build unix

package server

import "syscall"

// maxFiles returns how many files the process may open. Go has raised that to the hard limit already.
func maxFiles() uint64 {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) != nil {
		return maxConns * 2
	}
	return uint64(limit.Cur)
}
