# Each target builds .venv from nothing the first time and reuses it until the requirements change.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(RUN) -m fastlogits demo $(ARGS)

test: $(VENV)/ready
	$(RUN) -m pytest $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(RUN) -m benchmarks $(ARGS)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
