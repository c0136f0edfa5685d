# Every target starts from a fresh Debian 12 (or Fedora) machine with make; run as root.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

# Never the first python3 on PATH: services run under users of their own, and an
# interpreter below somebody's home directory is unreadable for them.
PY := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
CACHE := .cache
export PYTHONDONTWRITEBYTECODE :=

APT_RUN := python3-venv python3-libvirt python3-nftables iproute2 e2fsprogs xfsprogs btrfs-progs qemu-utils
APT_TEST := libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 nftables procps busybox-static strace util-linux iptables
APT_ALL := $(APT_RUN) $(APT_TEST)
DNF_ALL := python3 python3-pip python3-libvirt python3-nftables iproute e2fsprogs xfsprogs btrfs-progs qemu-img \
  libvirt-daemon libvirt-daemon-driver-qemu libvirt-client qemu-system-x86-core nftables procps-ng busybox strace util-linux cpio xz zstd \
  dnf-plugins-core iptables-nft

.PHONY: help setup packages venv kernel check test unit contract integration fault fuzz bench demo install clean

help:
	@echo "make demo    set everything up and run the main job, with timings"
	@echo "make test    lint, types, import rules, unit, contract, integration, fault sample"
	@echo "make check   lint, types and import rules only"
	@echo "make fault   every failpoint with a second kill during recovery"
	@echo "make fuzz    a million odd frames over the admin sockets (FUZZ=--frames N --seconds S)"
	@echo "make bench   every figure as a ratio to its floor"
	@echo "make install put it below DESTDIR=, its own files below PREFIX=/opt/bulkhead"
	@echo "make clean   remove the private environment and caches"

packages:
	@if command -v apt-get >/dev/null; then
	  have=$$({ dpkg-query -W -f='$${Package} $${db:Status-Abbrev}\n' $(APT_ALL) 2>/dev/null || true; } | awk '$$2=="ii"{print $$1}' | sort)
	  missing=$$(comm -13 <(echo "$$have") <(printf '%s\n' $(APT_ALL) | sort))
	  [ -n "$$missing" ] || exit 0
	  export DEBIAN_FRONTEND=noninteractive
	  apt-get -q update
	  apt-get -q install -y --no-install-recommends $$missing
	elif command -v dnf >/dev/null; then
	  missing=$$(for p in $(DNF_ALL); do rpm -q --quiet "$$p" || echo "$$p"; done)
	  [ -n "$$missing" ] || exit 0
	  dnf -q -y install --setopt=install_weak_deps=False $$missing
	else
	  echo "neither apt-get nor dnf is here: install by hand: $(APT_ALL)" >&2
	  exit 1
	fi

PROTOS := $(shell find proto -name '*.proto' 2>/dev/null)
$(VENV)/.stamp: pyproject.toml hatch_build.py $(PROTOS) $(wildcard clients/bus/generate.py) | packages
	@umask 022
	unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
	d=$$(pwd -P)
	while [ "$$d" != / ]; do
	  if [ -z "$$(find "$$d" -maxdepth 0 -perm -o+x)" ]; then
	    echo "warning: $$d is closed to other users: services cannot run under their own users from here; use a checkout below /srv or /opt" >&2
	  fi
	  d=$$(dirname "$$d")
	done
	$(BIN)/python -c '' 2>/dev/null || $(PY) -m venv --clear $(VENV)
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	for d in $$($(PY) -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")])'); do
	  for f in $$d/libvirt*.py $$d/libvirtmod*.so $$d/nftables; do [ -e "$$f" ] && ln -sfn "$$f" "$$site/" || true; done
	done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m compileall -q bulkhead services clients || true
	cd / && $(CURDIR)/$(BIN)/python -c 'import sys, libvirt, nftables, lxml.etree, zmq, uvloop; from bulkhead.api import envelope_pb2; assert sys.prefix != sys.base_prefix'
	touch $(CURDIR)/$@

venv: $(VENV)/.stamp

setup: packages venv

# The guest kernel for tests and the demo: the distribution's, unpacked, not installed.
kernel: setup
	@deploy/guest/fetch-kernel.sh $(CACHE)/kernel

check: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

unit: setup
	@$(BIN)/pytest tests/unit

contract: setup kernel
	@$(BIN)/pytest tests/contract

integration: setup kernel
	@$(BIN)/pytest tests/integration

# One kill at every failpoint of every operation.
fault: setup kernel
	@BULKHEAD_FAULT_KILLS=2 $(BIN)/pytest tests/fault --timeout 3600

test: check kernel
	@$(BIN)/pytest tests

# Odd and hostile frames against a running instance; FUZZ="--frames N --seconds S --seed N".
fuzz: setup
	@$(BIN)/python -m tests.system.fuzz_admin $(FUZZ)

bench: setup kernel
	@beyond=0
	for script in bench/*.py; do
	  case "$$script" in bench/__init__.py|bench/_*) continue;; esac
	  echo "== $$script"
	  $(BIN)/python "$$script" || beyond=1
	done
	exit $$beyond

demo: setup kernel
	@$(BIN)/python -m clients.cli.demo

DESTDIR ?= /
PREFIX ?= /opt/bulkhead
install: setup
	@$(BIN)/python -m deploy.install --destdir "$(DESTDIR)" --prefix "$(PREFIX)"

clean:
	rm -rf $(VENV) $(CACHE) build dist .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
