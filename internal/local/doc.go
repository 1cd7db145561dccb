// Package local starts PostgreSQL and Redis for development and for tests.
//
// What is true. A server belongs to a folder: its data, its log, its port and its locks live there, and nothing outside is
// touched. It listens on 127.0.0.1 only. As root the servers run as an unprivileged user; the folder must be one that user
// can enter.
//
// Who decides. Several processes may use one folder at the same time, and they share its one server. Two locks settle
// everything, and the kernel drops both when a process dies, however it dies:
//
//	<name>-start.lock  exclusive, held while a server is looked for, started and waited for: one process at a time
//	<name>-users.lock  shared, held by every process while it uses the server
//
// Stop gives back the shared lock and asks for it exclusively, without waiting. Who gets it was the last user and stops the
// server, whoever started it; who does not leaves the server to the others.
//
// What happens after kill -9. The server runs on, in a process group of its own. The next Start on the folder finds it,
// makes sure that it is the server of this folder, and uses it; the Stop after that stops it. If the server died too, or the
// machine did, it is started again on its data and recovers by itself; a process id that it left behind and that belongs to
// someone else by now is recognised by that process's command line. No process is ever signalled on the word of a file alone.
package local
