# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make run    set up and run the main job (layerwise compare on the built-in text)
#   make test   set up and run the linter, the type checker and the tests
# And: make docs builds the site into build/site; a broken link, or a docstring that does not parse, fails.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

.PHONY: run test lint types docs setup clean

run: $(READY)
	$(BIN)/layerwise compare

test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2   # two processes of one thread each, for two cores

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

setup: $(READY)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $(DOCS_READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,test]'
	$(BIN)/python -m pip install --quiet --no-deps mup==1.0.0   # it asks for torchvision, which its check does not import
	touch $(READY)

clean:
	rm -rf .venv build dist src/*.egg-info
