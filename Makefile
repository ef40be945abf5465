# make demo: a device's first boot and first renewal, on this machine.
# make test: everything CI runs.

GO ?= go
FUZZTIME ?= 30s
# Where programs, manual pages and completions are made, and where they go.
BIN ?= bin
SHARE ?= $(BIN)/share
PREFIX ?= /usr/local
# The commit is in the program where git can tell it: its time is the earliest that a
# device's clock is believed. Asked first, because go build fails where git refuses.
BUILDVCS := $(shell git status >/dev/null 2>&1 && echo true || echo false)
export BIN SHARE PREFIX DESTDIR BUILDVCS

.PHONY: demo test conformance build docs install uninstall boot build-arm64 build-armhf lint deps loss crash hostile https fleet years bench figures fuzz

demo:
	@packaging/deps gcc libc6-dev openssl softhsm2 opensc
	@$(MAKE) --no-print-directory build
	@examples/demo

# Without GORACE each program with the race detector sleeps for a second before it exits.
test: export GORACE = atexit_sleep_ms=0
test: deps lint
	$(GO) run ./internal/conformance -race -timeout 15m ./...

# CONFORMANCE.md, of the markers that the tests reach; make test holds it to them.
conformance: deps
	$(GO) run ./internal/conformance -write -race -timeout 15m ./...

build:
	@packaging/deps gcc libc6-dev
	$(GO) build -trimpath -buildvcs=$(BUILDVCS) -o $(BIN)/ ./cmd/...

# For other machines, with Debian's cross compilers, which this installs as root.
build-arm64 build-armhf: build-%:
	@packaging/cross $* $(BIN)/$*

# Manual pages, completions and an example configuration, made from the commands.
docs: build
	@mkdir -p $(SHARE)/man $(SHARE)/completions
	@$(GO) test -count 1 -run '^TestManPages$$' ./cmd/... -args -man.dir $(abspath $(SHARE))/man -man.date $$(git log -1 --format=%cs 2>/dev/null || date +%F)
	@for shell in bash zsh fish; do $(BIN)/est-enroll completion $$shell >$(SHARE)/completions/est-enroll.$$shell || exit 1; done
	@$(BIN)/est-enroll config --example >$(SHARE)/config.yaml

# After "make build docs", perhaps as another user, below DESTDIR.
install uninstall:
	@packaging/install $@

# The installed services under a systemd that is booted for them in namespaces of its
# own: they enrol, renew and rekey with a SoftHSM token, as hardened as they are.
boot: deps docs
	@packaging/systemd/boot

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

# The program killed before and after every PKCS#11 call, datagram and operation on
# files of the state directory, of first boot, renewal, rekey, rollover and reset, and,
# counted apart, at a sample inside the module's own writes. CRASH=-crash.write also writes the
# figures to testdata/crash.json and README.md, CRASH='-crash.story rekey' chooses one.
crash: deps
	$(GO) test -timeout 60m -count 1 -run '^TestCrash$$' -v ./cmd/est-enroll -args -crash.every 1 -crash.module 60 $(CRASH)

# The program at servers and on networks that get something wrong, each case in
# each situation of the device; the token before and after, in the eyes of others.
hostile: deps
	$(GO) test -C cmd/est-enroll -timeout 30m -count 1 -run '^TestHostile$$' -args -hostile.all $(HOSTILE)

# Each story of the command that was written over CoAPs, over HTTPS.
https: deps
	$(GO) test -C cmd/est-enroll -timeout 15m -count 1 -run '^TestScriptsOverHTTPS$$' . -args -https.all

# 100,000 devices that renew by the policy, through outages of a day and of a week;
# the plot is the README's.
fleet:
	$(GO) test -count 1 -run '^TestFleet$$' -v . -args -fleet.plot testdata/fleet.svg $(FLEET)

# Three years of a device in seconds, on a clock of its own and all else real: outages,
# power cuts, a change of the CA's root. YEARS='-years.seed 7' lives the years of a seed again.
years: deps
	$(GO) test -timeout 30m -count 1 -run '^TestYears' -v . -args -years.n 3 -years.seed 0 $(YEARS)

# What an enrolment costs beside what it cannot do without, and beside estclient and
# estserver of globalsign/est: each figure beside its target. "make figures" also writes
# them to testdata/figures.json and README.md.
bench: deps
	$(GO) test -timeout 15m -count 1 -run '^TestBench$$' -v ./cmd/est-enroll -args -bench.n 61 -bench.objects 10000 $(BENCH)

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
