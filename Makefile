# Mallee's commands. Each works on a fresh Debian 12, as root, with Rust, gcc and make.
#
#   make run           build, start a cloud on this machine, use it as a first user would, leave it running
#   make run ONCE=1    the same, then end it and remove everything that it made
#   make test          formatting, lints, unit tests, end-to-end tests against the real parts
#   make bench         measure, beside peers; JSON under target/bench/
#   make fuzz          fuzz each target for a minute (SECONDS=60), guided by coverage, from the kept corpora
#   make down          end the cloud that `make run` left running
#
# CARGO_TARGET_DIR may name another place for everything that is built.

export CARGO_TARGET_DIR ?= $(CURDIR)/target
export MALLEE_BIN    := $(CARGO_TARGET_DIR)/release
export MALLEE_IMAGES := $(CARGO_TARGET_DIR)/images
export MALLEE_VENV   := $(CARGO_TARGET_DIR)/venv
ONCE ?=

.PHONY: all build images packages venv run down test lint bench fuzz clean

all: build

packages:
	@setup/packages

build: packages
	@setup/build

images: build
	@$(MALLEE_BIN)/mallee-images build tiny --source $(CURDIR) --out $(MALLEE_IMAGES)/tiny
	@$(MALLEE_BIN)/mallee-images build probe --source $(CURDIR) --out $(MALLEE_IMAGES)/probe

venv: packages
	@setup/venv $(MALLEE_VENV)

run: images venv
	@$(MALLEE_VENV)/bin/python tests/first_user/story.py $(if $(ONCE),--once)

down:
	@$(MALLEE_BIN)/mallee down
	@$(MALLEE_BIN)/mallee-lab down

test: packages
	@tests/check

lint: packages
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --release -- -D warnings

bench: images venv
	$(MALLEE_BIN)/mallee-bench --out $(CARGO_TARGET_DIR)/bench
	$(MALLEE_BIN)/mallee-bench --out $(CARGO_TARGET_DIR)/bench snapshot
	$(MALLEE_BIN)/mallee-bench --out $(CARGO_TARGET_DIR)/bench --runs 5 echo --probe $(MALLEE_IMAGES)/probe/probe.elf
	@tests/bench/linux $(CARGO_TARGET_DIR)/bench
	cargo bench --locked -p mallee-netd --bench scale --bench nat -- $(CARGO_TARGET_DIR)/bench
	@$(MALLEE_VENV)/bin/python tests/bench/launch.py --out $(CARGO_TARGET_DIR)/bench

fuzz: packages
	@tests/fuzz $(or $(SECONDS),60)

clean:
	cargo clean
