# The two commands of the README are "make demo" and "make test", as root.
# Everything else is a part of them, or for whoever works on grm itself.

# sudo's PATH often lacks the place where a current Go lives.
export GO ?= $(shell command -v go || echo /usr/local/go/bin/go)
PREFIX   ?= /usr
DESTDIR  ?=
FUZZTIME ?= 3s
SEED     ?=

# Not stamped with the commit: root may not read another user's repository, and
# equal sources are to give equal binaries.
export GOFLAGS     := -buildvcs=false $(filter-out -buildvcs=%,$(GOFLAGS))

BUILD = CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w'
# Tests with root's rights share one kernel: one package at a time, never from the cache.
GOTEST = tools/gotest -count=1 -p 1

commands = grm grm-activate grm-decoy grm-unitgen
manuals  = $(wildcard docs/man/*.8)
# Packages whose tests need no rights, or few: these also run under the race detector.
unprivileged = $(shell $(GO) list ./... | grep -v -e '/test' -e '/examples' -e '/bpfprog$$' -e '/activate$$')

.PHONY: build demo test test-unit test-race test-fuzz test-stories test-kernels bench flood soak fuzz lint \
	generate check-generated install clean deps-build deps-demo deps-test

build:
	@$(BUILD) -o bin/ $(addprefix ./cmd/,$(commands))

# A private systemd, a server under load, five restarts, and what came of each packet.
demo: deps-demo build
	@$(GO) build -o bin/demo ./test/demo && bin/demo

# Everything there is, what fails fast first.
test: deps-test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-unit
	@$(MAKE) --no-print-directory check-generated
	@$(MAKE) --no-print-directory test-race
	@$(MAKE) --no-print-directory test-fuzz
	@$(MAKE) --no-print-directory test-stories
	@$(MAKE) --no-print-directory test-kernels
	@echo "make test: all of it passed"

test-unit: build
	@$(GOTEST) -timeout 10m $$($(GO) list ./... | grep -v -e '/test/stories' -e '/test/operator' -e '/test/vm$$')

test-race:
	@CGO_ENABLED=1 $(GOTEST) -race -timeout 10m $(unprivileged)

test-fuzz:
	@tools/fuzz $(FUZZTIME)

test-stories: build
	@$(GOTEST) -timeout 40m ./test/stories/... ./test/operator

# What the kernel decides, on Debian's kernels under qemu.
test-kernels:
	@$(GOTEST) -timeout 40m ./test/vm

# The long ones, not part of "make test".
fuzz:
	@tools/fuzz 5m

bench flood soak: deps-test build
	@tools/long $@ $(SEED)

lint:
	@out=$$(gofmt -l $$(find . -name '*.go' -not -path './bin/*')); \
		[ -z "$$out" ] || { echo "gofmt: these files are not formatted (gofmt -w):" $$out >&2; exit 1; }
	@$(GO) vet ./...
	@$(GO) tool staticcheck ./...
	@echo "ok  	lint: gofmt, vet, staticcheck"

generate:
	@$(GO) generate ./...

check-generated:
	@tools/check-generated

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/grm $(DESTDIR)$(PREFIX)/share/man/man8
	install -m 755 bin/grm bin/grm-unitgen $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/grm-activate bin/grm-decoy $(DESTDIR)$(PREFIX)/lib/grm/
	$(if $(manuals),install -m 644 $(manuals) $(DESTDIR)$(PREFIX)/share/man/man8/)
	$(if $(filter /usr,$(PREFIX)),,@echo "units find the commands with: grm-unitgen --bindir $(PREFIX)/lib/grm")

clean:
	rm -rf bin

deps-build deps-demo deps-test:
	@GO=$(GO) tools/install-deps $(@:deps-%=%)
