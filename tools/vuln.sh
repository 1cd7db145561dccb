#!/usr/bin/env bash
# Fails on known vulnerabilities in the packages, in what they use, and in the Go that go.mod names, whichever runs here.
# The generators (tools/go.mod) are left out: they read nothing but this project, and are no part of the program.
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0

go build -modfile=tools/go.mod -o bin/govulncheck golang.org/x/vuln/cmd/govulncheck
installed=$(go env GOVERSION)
named=$(GOTOOLCHAIN=auto go env GOVERSION) || {
	named=$installed
	echo "judged is $installed, which is installed: the Go that go.mod names cannot be had from here"
}
[ "$named" = "$installed" ] || echo "$installed is installed; judged is what $named (go.mod) builds, so build with that"
export GOTOOLCHAIN=$named

# A look at the modules alone shows in a second whether the database answers. Its newest edition is also a module.
set -- -show=version
if [[ $(bin/govulncheck -scan=module 2>&1) == *'fetching vulnerabilities'* ]]; then
	module=$(GOTOOLCHAIN=auto go mod download -json golang.org/x/vulndb@latest) || {
		printf '%s\nNOT CHECKED: neither the database of vulnerabilities nor the module with it can be reached from here\n' "$module"
		exit
	}
	field() { sed -n "s/^\t\"$1\": \"\(.*\)\",\$/\1/p" <<<"$module"; }
	echo "the database cannot be reached; asked is the module with it, golang.org/x/vulndb $(field Version), whose digits are its date"
	set -- "-db=file://$(field Dir)/data/osv"
fi
bin/govulncheck "$@" ./...
