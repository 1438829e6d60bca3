# Every target installs into .venv first when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
EXTRAS := serve,demo,trace,train,dev
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test quick lint models serve report proto

demo: models ## train, serve, ask, print the predictions next to the true labels, stop
	python examples/demo.py

test: $(INSTALLED)
	pytest -n auto

quick: $(INSTALLED) ## the tests that start no process and train nothing
	pytest -n auto -m "not slow"

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy
	lint-imports

models: $(INSTALLED) ## train in build/, which leaves tracked files as they are; put the trained files into models/
	python -m pipeline.scratch

serve: models
	tercet serve

report: $(INSTALLED) ## render all plots as an HTML page
	dvc plots show

proto: $(INSTALLED) ## generate service/tercet/proto from proto/*.proto
	python proto/generate.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tercet needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing dependencies into $(VENV) (7 GB, mostly PyTorch). This takes a few minutes.'
	@if command -v uv >/dev/null; \
	then uv pip install --python $(VENV) -c constraints.txt -e '.[$(EXTRAS)]'; \
	else $(VENV)/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'; fi
	touch $@
