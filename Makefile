# make test and make demo install what they need; see CONTRIBUTING.md.

GO      ?= go
PREFIX  ?= /usr/local
VERSION ?=
LDFLAGS := $(if $(VERSION),-X main.version=$(VERSION))

.PHONY: all build test demo deps lint fuzz microbench bench bench-downtime bench-remote dist install clean

all: build

build:
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o holdfast ./cmd/holdfast

# gofmt, vet, staticcheck, all tests with the race detector; no test may be skipped, and nothing
# may be left behind. The last line is "N passed, N failed".
test: deps
	$(GO) run ./scripts/runtests

# What the linters say, without the tests.
lint:
	$(GO) run ./scripts/runtests -lint

demo: deps
	$(GO) run ./internal/demo

deps:
	scripts/install-test-deps.sh

# Each fuzz target for FUZZTIME.
FUZZTIME ?= 30s
fuzz:
	scripts/fuzz.sh $(FUZZTIME)

# The small parts by themselves: chunker, hashes, encryption, compression, tars, parsers, trees, the index. Standard output is
# what benchstat reads; see CONTRIBUTING.md. BENCH chooses by name, COUNT says how often each runs.
BENCH   ?= .
COUNT   ?= 6
microbench:
	@$(GO) test -run '^$$' -bench '$(BENCH)' -count $(COUNT) -benchtime 0.3s ./internal/ocis ./internal/snapshot ./internal/capture ./internal/repo/...

# Holdfast against restic and borg on a generated store; needs some 25 GB in SCRATCH. STEPS leaves steps out, such as
# the restores of a million files: STEPS=first,unchanged,changed VERIFY=false.
FILES   ?= 20000
BYTES   ?= 4GB
RUNS    ?= 3
SCRATCH ?= /var/tmp/holdfast-bench
STEPS   ?=
VERIFY  ?= true
bench: build deps
	mkdir -p $(SCRATCH)
	$(GO) run ./bench/run -holdfast ./holdfast -borg -files $(FILES) -bytes $(BYTES) -n $(RUNS) -steps '$(STEPS)' -verify=$(VERIFY) -scratch $(SCRATCH) -o docs/BENCHMARKS.md
	$(GO) run ./bench/plot docs/BENCHMARKS.md docs/benchmarks.svg

# For how long the service is down, on a store of 2.6 million entries; needs root, restic, btrfs-progs
# and 40 GB in SCRATCH. What was interrupted goes on when it is run again.
bench-downtime: FILES = 200000
bench-downtime: build deps
	mkdir -p $(SCRATCH)
	$(GO) run ./bench/run -downtime -holdfast ./holdfast -files $(FILES) -bytes $(BYTES) -n $(RUNS) -scratch $(SCRATCH) -o docs/BENCHMARKS.md

# A repository and a bucket on S3 behind a link of 100 Mbit/s and 20 ms, and a bucket of a million objects;
# needs restic and versitygw. NOTE is a sentence about the machine.
NOTE ?=
bench-remote: FILES = 10000
bench-remote: BYTES = 200MB
bench-remote: build deps
	mkdir -p $(SCRATCH)
	$(GO) run ./bench/run -remote -holdfast ./holdfast -files $(FILES) -bytes $(BYTES) -n $(RUNS) -note '$(NOTE)' -scratch $(SCRATCH) -o docs/BENCHMARKS.md

# Man pages and completions.
dist: build
	./holdfast generate --man dist/man --completions dist/completions

install: dist
	install -D -m 0755 holdfast $(DESTDIR)$(PREFIX)/bin/holdfast
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 0644 dist/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -D -m 0644 dist/completions/holdfast.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/holdfast
	install -D -m 0644 dist/completions/_holdfast $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_holdfast
	install -D -m 0644 dist/completions/holdfast.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/holdfast.fish

clean:
	rm -rf holdfast dist
