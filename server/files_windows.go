package server

// maxFiles returns how many files the process may open, which Windows does not limit.
func maxFiles() uint64 { return maxConns * 2 }
