# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make run    set up and run the main job (layerwise compare on the built-in text)
#   make test   set up and run the linter, the type checker and the tests
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: run test lint types setup clean

run: $(READY)
	$(BIN)/layerwise compare

test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2   # two processes of one thread each, for two cores

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	touch $(READY)

clean:
	rm -rf .venv build dist src/*.egg-info
