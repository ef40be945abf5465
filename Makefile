# make demo: a device's first boot and first renewal, on this machine.
# make test: everything CI runs.

GO ?= go
FUZZTIME ?= 30s

.PHONY: demo test build lint deps loss crash bench figures fuzz

demo: deps build
	@examples/demo

test: deps lint
	$(GO) test -race -timeout 15m ./...

build: deps
	$(GO) build -trimpath -o bin/ ./cmd/...

lint:
	@unformatted=$$(gofmt -l .); test -z "$$unformatted" || { echo "not gofmt-ed: $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) mod tidy -diff

deps:
	@packaging/deps

# Enrolments through a link with 10 % loss, 10 % duplication and reordering: 200
# with 512-byte blocks, 20 each with 64 and 16 bytes.
loss: deps
	$(GO) test -timeout 30m -count 1 -run '^TestLoss$$' -v . -args -loss.n 200 -loss.small 20 $(LOSS)

# The program killed before and after every PKCS#11 call of first boot, renewal and reset.
crash: deps
	$(GO) test -timeout 60m -count 1 -run '^TestCrash' -v ./cmd/est-enroll -args -crash.every 1 $(CRASH)

# What an enrolment costs beside what it cannot do without: each figure beside its
# target. "make figures" also writes them to testdata/figures.json and README.md.
bench: deps
	$(GO) test -timeout 15m -count 1 -run '^TestBench$$' -v ./cmd/est-enroll -args -bench.n 41 -bench.objects 10000 $(BENCH)

figures: BENCH += -bench.write
figures: bench

# Each fuzz target for FUZZTIME.
fuzz: deps
	@set -e; for dir in $$($(GO) list -f '{{.Dir}}' ./...); do \
		for target in $$(grep -hos '^func Fuzz[A-Za-z0-9]*' $$dir/*_test.go | cut -d' ' -f2); do \
			echo "$$target in $${dir##*/}"; \
			(cd $$dir && $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x .); \
		done; \
	done
