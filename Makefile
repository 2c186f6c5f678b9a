# The only commands to learn: demo, test, check, dev, bench.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check dev browser bench bench-gpu format clean

# The main job end to end on made-up anatomy, in a few minutes.
demo: $(READY)
	$(BIN)/vclipseg demo --out runs/demo

# Every test, the slow ones too (a reduced demo among them).
test: $(READY)
	$(BIN)/python -m pytest -n auto

# Format, lint, types, import layers, fast tests.
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n auto -m "not slow"

# Everything a developer needs.
dev: $(READY) browser
	@echo "ready: $(BIN)/vclipseg --help"

# Chromium, in which the pages are tested, where it can be installed; else those tests are skipped.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null \
	  || timeout 300 sh -c "apt-get install -y chromium || (apt-get update && apt-get install -y chromium)" > /dev/null 2>&1 \
	  || echo "no Chromium, and it cannot be installed here: the tests of the pages will be skipped"

# Speed and memory beside the literature's way, in about ten minutes.
bench: $(READY)
	$(BIN)/python benchmarks/speed.py

# Step, prediction and memory on a GPU beside eager float32 there, after the tests of what runs on one.
bench-gpu: $(READY)
	VCLIPSEG_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/test_gpu.py
	$(BIN)/python benchmarks/gpu.py --record results/speed-gpu.json

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone: its CPU build is picked before anything else can ask for another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.12 ...' if sys.version_info < (3, 11) else 0)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .mypy_cache
