# In a fresh clone `go run .` and `make test` work at once; nothing here has to come before them.

# The tools stand in a module of their own. Without cgo, because sqlc would compile a whole C parser.
TOOL = CGO_ENABLED=0 go tool -modfile=tools/go.mod
# SHIPPED are the packages of the program itself. What else there is (bench, storm, loadtest, internal/test*) starts the servers that it
# tests (G204), draws what a seed repeats (G404), and keeps small counts in small numbers (G115): there these three rules say nothing.
SHIPPED = $$(go list -deps . | grep ^idempotent-orders | grep -v /gen/)
PACKAGES = $$(go list ./... | grep -v /gen/)
DEVELOPERS = $$(go list ./... | grep -v /gen/ | grep -vxF "$(SHIPPED)")
FILES = $$(find . -path ./gen -prune -o -name '*.go' -print)
FUZZTIME = 30s
CRASHES ?= 20

.PHONY: help
help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: run
run: ## run everything; starts its own PostgreSQL and Redis if there are none
	go run .

.PHONY: build
build: ## build the program into bin/
	CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o bin/idempotent-orders .

.PHONY: generate
generate: ## rewrite gen/ from the contract and the queries
	go generate ./...

.PHONY: generate-check
generate-check: generate ## fail when gen/ is not up to date, or not committed
	git --no-pager diff --exit-code HEAD -- gen/
	@new=$$(git ls-files --others -- gen/) && test -z "$$new" || { echo "not committed: $$new"; exit 1; }

.PHONY: fmt
fmt: ## format the hand-written files
	gofmt -w $(FILES)

.PHONY: fmt-check
fmt-check: ## fail when a hand-written file is not formatted
	@bad=$$(gofmt -l $(FILES)) && test -z "$$bad" || { echo "not formatted (make fmt): $$bad"; exit 1; }

.PHONY: vet
vet: ## go vet, of the builds that break on purpose too
	go vet ./...
	go vet -tags=faults ./...

.PHONY: lint
lint: ## staticcheck on the hand-written packages
	$(TOOL) staticcheck $(PACKAGES)

.PHONY: sec
sec: export CGO_ENABLED = 0
sec: ## gosec on the hand-written packages; a finding that is wrong has a '#nosec Gxxx -- why' at its line
	cd tools && go build -o ../bin/gosec ./gosec
	bin/gosec -test=false $(SHIPPED)
	bin/gosec -test=false -exclude=G115,G204,G404 $(DEVELOPERS)
	GOFLAGS=-tags=faults bin/gosec -test=false ./internal/fault
	cd tools && ../bin/gosec -test=false ./gosec

.PHONY: vuln
vuln: ## fail on known vulnerabilities; says which database it asked, and when none can be reached
	@tools/vuln.sh

.PHONY: test
test: test-servers ## run every test against a real PostgreSQL and Redis, with race and shuffle
	go test -race -shuffle=on -timeout=10m ./...

.PHONY: test-servers
test-servers: ## install redis-server and PostgreSQL when they are missing
	@internal/testenv/install.sh

.PHONY: model
model: ## check the models of the protocol with spin, which is installed when it is missing
	@internal/testenv/install.sh spin
	@model/check.sh

.PHONY: fuzz
fuzz: test-servers ## run each fuzz target for FUZZTIME (30s)
	@set -e; for package in $$(go list ./...); do \
		listed=$$(go test -list='^Fuzz' $$package); \
		for target in $$(echo "$$listed" | grep '^Fuzz'); do \
			echo "== $$package $$target"; \
			go test -run='^$$' -fuzz="^$$target\$$" -fuzztime=$(FUZZTIME) $$package; \
		done; \
	done

.PHONY: loadtest
loadtest: ## place 100 orders with the service that runs at http://localhost:8080
	go run ./loadtest

.PHONY: bench
bench: ## measure everything against pgbench and a naive server, and write docs/figures.md (over 10 minutes; a quiet machine)
	go run ./bench

.PHONY: storm
storm: test-servers ## break everything for a minute while clients send orders, and judge; STORM="--duration 30m --seed 7"
	go run ./storm $(STORM)

.PHONY: crash-points
crash-points: test-servers ## let a process die at each step, CRASHES times (20), and show what came of it; long
	CRASHES=$(CRASHES) go test -count=1 -v -timeout=6h -run='^TestAProcessMayDieAtAnyPoint$$' ./internal/fault

.PHONY: removals
removals: test-servers ## take each safety device away, and show which test misses it
	go test -count=1 -v -run='^TestEachDeviceThatIsRemovedIsMissed$$' ./internal/fault

.PHONY: clean
clean: ## remove what was built, and cached test results
	rm -rf bin
	go clean -testcache
