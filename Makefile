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
	pytest -n auto --dist worksteal

quick: $(INSTALLED) ## the tests that start no process and train nothing
	pytest -n auto --dist worksteal -m "not slow"

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy
	lint-imports

# `dvc repro` writes tracked files: dvc.lock, metrics, plots. In a copy it leaves `git status` clean. The copy shares the DVC cache, so a
# later `dvc repro` in the checkout restores what the copy has trained. Without SCM, DVC does not mind that git ignores build/.
SOURCES := .dvc .dvcignore data/sample dvc.yaml 'models/*.py' params.yaml pipeline service/tercet/card.py
models: $(INSTALLED) ## train in build/models, and bring the trained files back
	mkdir -p build/models
	git ls-files -z $(SOURCES) | tar --create --null --files-from=- | tar --extract --directory=build/models
	printf '[core]\n    no_scm = true\n[cache]\n    dir = $(CURDIR)/.dvc/cache\n' >build/models/.dvc/config.local
	cd build/models && dvc repro
	cd build/models && cp --parents models/*/model.onnx models/*/model.pt models/*/card.json $(CURDIR)

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
