# make demo: pictures from prompts; make test: the test suite; make test-slow: its long versions; make style: format, lint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow style
.NOTPARALLEL: # two pips would be in each other's way

# pip would compile one file after the other, which takes as long as all the rest. Not every file of a package compiles.
INSTALL := $(BIN)/pip install --quiet --no-compile
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true

# torch comes first and by its exact pin, so that nothing else decides which build is taken.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	touch $@

# What is there already is compiled while pip, which uses one core, installs the rest.
$(VENV)/installed-dev: EXTRA := [dev]
$(VENV)/installed $(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(COMPILE) & $(INSTALL) --constraint constraints.txt --editable ".$(EXTRA)" && wait
	$(COMPILE)
	touch $(VENV)/installed $@

demo: $(VENV)/installed
	$(BIN)/python examples/contact_sheet.py --output out/contact_sheet.png

# Two workers with a thread each; a file's tests stay together, since they share what is costly to make.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

style: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
