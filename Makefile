# make demo | test | check | bench B=name | browser | lock | clean.  Everything is installed in ./.venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_VERSION := 2.13.0
# On Linux without a local CPU wheel: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := .venv/.ready
# Bases of our own: installed in place, so new weights are there without copying them.
BASES := bases/pyproject.toml $(wildcard bases/src/alambic_bases/*.py)
LOCKED := $(shell $(PYTHON) -c "import sys,platform as p; print('yes' if sys.platform=='linux' and p.machine()=='x86_64' and sys.version_info[:2]==(3,11) else '')")

# Two processes, each file in one of them, slow ones first (tests/conftest.py); the seed of the order is in pyproject.toml.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-fast check bench browser docs lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml $(BASES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch$(if $(LOCKED),==$(TORCH_VERSION)) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
ifneq ($(LOCKED),)
	$(BIN)/python -m pip install -q --no-deps -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e . -e ./bases
else
	$(BIN)/python -m pip install -q -e ".[build,generate,gguf,test,bench]" -e ./bases
endif
	@touch $@

demo: $(READY)
	@$(BIN)/python -m alambic build examples/field-service/task.toml --out runs/field-service

test: $(READY)
	@$(BIN)/python -m pytest $(SPREAD)

test-fast: $(READY)
	@$(BIN)/python -m pytest $(SPREAD) -m "not slow and not browser"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(BIN)/python -m pytest $(SPREAD) -m "not slow and not browser"

bench: $(READY)
	@$(BIN)/python benchmarks/run.py $(B)

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "install Chromium and chromedriver with your system's packages" >&2; exit 1; }; \
	  [ "$$(id -u)" = 0 ] && S= || S=sudo; $$S apt-get update -qq && $$S apt-get install -y -qq chromium chromium-driver; }
	@chromium --version

docs: $(READY)
	$(BIN)/python docs/generate.py

lock: $(READY)
	@echo "# Resolved for Linux x86-64 and CPython 3.11. Installed with --no-deps after torch, by make; see README, \"Other machines\"." > requirements.lock
	@$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^torch(==| @)' >> requirements.lock

clean:
	rm -rf .venv runs build dist .bench
