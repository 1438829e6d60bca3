# Every target makes its own .venv when it is missing.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test lint serve report proto

demo: $(INSTALLED) ## train, serve, ask, print the answers, stop
	dvc repro
	python examples/demo.py

test: $(INSTALLED)
	pytest

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

serve: $(INSTALLED)
	dvc repro
	tercet serve

report: $(INSTALLED) ## all figures and plots on one page, report.html
	dvc repro
	python -m pipeline.report

proto: $(INSTALLED) ## generate the code of proto/*.proto anew
	python proto/generate.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tercet needs Python 3.11 or newer; set PYTHON to one")'
	$(PYTHON) -m venv $(VENV)
	@echo 'pip fills $(VENV) with 7 GB, most of it torch; this takes minutes and shows nothing'
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,demo,trace,train,dev]'
	touch $@
