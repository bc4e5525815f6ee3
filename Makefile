# SPDX-License-Identifier: Apache-2.0
# Everything a person does here, one line each: `make` lists it. Nothing is needed before it but Python >= 3.11 and make.

BIN    := .venv/bin
STAMP  := .venv/.ready
# The first interpreter that is new enough and can make an environment; `make env PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Where the CPU build of torch, which constraints.txt names, comes from if the index does not have it.
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-gpu check fmt bench docs

help:  ## show this list
	@echo "lowbits: train neural networks in few bits. Start with \`make demo\`."
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 \2/p' $(MAKEFILE_LIST) | awk '{ printf "  make %-10s", $$2; $$1 = $$2 = ""; print $$0 }'

env: $(STAMP)  ## make the environment in .venv (the others do so by themselves)
	@echo "env: .venv is ready: $$($(BIN)/python -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')"

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "env: no Python >= 3.11 with venv and pip found; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "env: making .venv (or bringing it up to date) with $$($(PYTHON) -c 'import sys; print(sys.executable)') and the versions of constraints.txt; one to three minutes, once"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch 2>/dev/null || $(PIP) --extra-index-url $(CPU_WHEELS) torch
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train a small GPT under a baseline and five recipes; the report is runs/demo/report.html
	@$(BIN)/lowbits data prepare stdlib --vocab-size 512 --out runs/stdlib-512
	@$(BIN)/lowbits compare bf16 null w8a8 w8a8g8 w4_tensor a4_tensor g4_tensor --seeds 2 --out runs/demo \
		--data runs/stdlib-512 --model gpt2-pico --steps 240 --batch-size 8 --block 128 --lr 1e-3 --eval-every 80

test: $(STAMP)  ## pass the tests (two processes, some minutes)
	@$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

test-slow: $(STAMP)  ## pass the tests that take minutes each
	@$(BIN)/python -m pytest -q -m slow

test-gpu: $(STAMP)  ## pass the tests that need a CUDA device
	@$(BIN)/python -m pytest -q -m gpu

check: $(STAMP)  ## format, lint, types, and the law of the layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_architecture.py

fmt: $(STAMP)  ## format, and mend what lint can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# What speed is made of; the other scripts of benchmarks/ answer questions of their own and are run by hand.
bench: $(STAMP)  ## time GEMMs, quantizers, a layer, a training step and an optimizer on the device there is
	@set -e; for name in gemm quantize linear train_step; do echo "bench: $$name"; $(BIN)/python "benchmarks/$$name.py" --peers --results runs/bench; done
	@echo "bench: optimizer_step"; $(BIN)/python benchmarks/optimizer_step.py --peers \
		$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--quick")')

docs: $(STAMP)  ## build the site into site/
	@$(BIN)/python docs/generate.py
	@$(BIN)/zensical build --clean --strict
	@echo "docs: open site/index.html"
