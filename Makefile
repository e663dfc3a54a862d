# `make help` lists the targets. PIP_ARGS is handed to pip, for instance to name the index of torch's smaller CPU build:
#   make demo PIP_ARGS="--extra-index-url URL"
PYTHON := python3
PIP_ARGS :=
TRITONS := 3.4.0 3.9.0# the oldest that the kernels take and the newest there is
BIN := .venv/bin

.PHONY: help demo test test-slow test-all test-tritons check docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: .venv/train.stamp  ## train a small Longhorn on Python's own documentation (under 3 minutes on 2 cores)
	@rm -rf runs/demo
	@$(BIN)/recur train longhorn --batch 8 --steps 400 --out runs/demo

test: .venv/test.stamp  ## run the suite
	@$(BIN)/pytest -n 2 --dist worksteal --hypothesis-profile ci

test-slow: .venv/test.stamp  ## run what takes minutes: every program compiled, every preset compiled by layer
	@$(BIN)/pytest -n 2 --dist worksteal --hypothesis-profile ci -m slow

test-all: .venv/test.stamp  ## run the suite and what is slow, with many more examples per law
	@$(BIN)/pytest -n 2 --dist worksteal --hypothesis-profile nightly -m "not gpu"

check: .venv/test.stamp  ## formatter, linter and type checker
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

test-tritons: $(TRITONS:%=.venv/triton-%.stamp)  ## compile and interpret some kernels with the oldest and the newest Triton
	@$(MAKE) --no-print-directory -j 2 $(TRITONS:%=triton-%)

triton-%: .venv/triton-%.stamp
	@PYTHONPATH=$(CURDIR)/.venv/triton-$* $(BIN)/python -W ignore tests/tritons.py

docs: .venv/docs.stamp  ## build the site into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:  ## remove the environment and everything that was built
	rm -rf .venv build *.egg-info runs

.venv/triton-%.stamp: .venv/test.stamp
	@echo "installing Triton $* into a folder of its own"
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) --no-deps --upgrade --target .venv/triton-$* triton==$*
	@touch $@

.venv/%.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing recur with its '$*' extra into .venv (the first time takes a few minutes)"
	@$(BIN)/python -m pip install -qq $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $@
