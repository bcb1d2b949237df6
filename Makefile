# `make book` and `make test` are all a reader needs; both set up what they use and skip what is done.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# what runs here reads the notebooks' committed data or the embedded text: nothing is asked of the Hub
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# tqdm asks for ipywidgets in every kernel that has none; nbval would compare the request
export PYTHONWARNINGS = ignore:IProgress not found

.PHONY: book pdf test setup fetch notebooks findings lint unit nbval stored-book lab bench stress clean

book: fetch
	$(PY) -m thesislib.book

test: lint unit nbval stored-book

setup: $(STAMP)

# torch first and by its pin: a bare requirement may resolve to a build for another accelerator
$(STAMP): constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(PY) -m pip install --quiet -e ".[harness,book,sweep,test]" -c constraints.txt
	touch $@

fetch: setup
	$(PY) -m thesislib.cli fetch

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# two processes of one thread each: of two threads each they would wait for each other
unit: fetch
	OMP_NUM_THREADS=1 $(PY) -m pytest tests thesislib -m "not browser" -n 2 --dist worksteal --durations=10

# every notebook runs once, against its stored outputs; its default data is the embedded text
nbval: fetch
	$(PY) -m pytest -p no:cacheprovider -o addopts= -q --nbval --nbval-cell-timeout=900 --nbval-kernel-name python3 notebooks

# from the notebooks as stored, from scratch; then looked at in a browser where there is one
stored-book: setup
	rm -rf _build/stored
	$(PY) -m thesislib.book --stored --out _build/stored
	$(PY) -m pytest tests -m browser -rs

# the whole book as one PDF, printed by Chromium from the pages of `make book`
pdf: book
	$(PY) -m thesislib.pdf

notebooks: fetch
	$(PY) -m thesislib.book --store

findings: setup
	$(PY) -m thesislib.chapters

# here a reader may ask for any subject, hub:NAME too
lab: fetch
	env -u HF_HUB_OFFLINE $(PY) -m jupyter lab notebooks

bench: fetch
	$(PY) -m benchmarks

# kills, damaged files, bad calls and hostile names in bulk; a small part of it is in `make unit`
stress: setup
	$(PY) -m tests.stress --json _build/stress.json

clean:
	rm -rf _build
