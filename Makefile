# Every target makes the virtual environment it needs; python3 (3.11 to 3.13) and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
SETUP := settings.ini setup.py pyproject.toml constraints.txt

.PHONY: demo test lab book bench readme hooks clean help

help:
	@echo "make demo    the whole pipeline on a phantom data set, from raw files to scored, overlaid label maps (demo/results)"
	@echo "make test    export and clean leave no difference, every chapter's tests, then tests/"
	@echo "make lab     JupyterLab on the chapters"
	@echo "make book    the chapters as HTML pages in _docs/"
	@echo "make bench   segnb beside its peers, stage by stage; writes benchmarks/RECORD.md"
	@echo "make readme  README.md from nbs/index.ipynb"
	@echo "make hooks   nbdev's git hooks for this clone: notebooks merge cell by cell"

$(VENV)/run: $(SETUP)
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 'segnb needs Python 3.11 to 3.13, this is %d.%d; name another one: make PYTHON=python3.12' % sys.version_info[:2])"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) -e .
	touch $@

$(VENV)/dev: $(VENV)/run
	$(PIP) -e ".[dev]"
	touch $@

demo: $(VENV)/run
	$(BIN)/segnb demo -o demo

test: $(VENV)/dev
	$(BIN)/python tools/in_step.py
	cd nbs && OMP_NUM_THREADS=1 SEGNB_STATIC=1 ../$(BIN)/nbdev_test --path . --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=5 tests

lab: $(VENV)/dev
	$(BIN)/jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

book: $(VENV)/dev
	$(BIN)/jupyter nbconvert --to html --output-dir _docs nbs/*.ipynb

$(VENV)-peers/done: benchmarks/requirements-peers.txt benchmarks/requirements-peers-alone.txt constraints.txt
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)-peers/bin/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements-peers.txt
	$(VENV)-peers/bin/python -m pip install -q --disable-pip-version-check --no-deps -r benchmarks/requirements-peers-alone.txt
	touch $@

bench: $(VENV)/dev $(VENV)-peers/done
	for stage in reading fingerprint planning resampling preprocessing augmentation training metrics sliding_window export prediction components exchange; do $(BIN)/python benchmarks/$$stage.py --peers $(VENV)-peers/bin/python || exit 1; done
	$(BIN)/python benchmarks/report.py

readme: $(VENV)/dev
	$(BIN)/python tools/readme.py

hooks: $(VENV)/dev
	$(BIN)/nbdev_install_hooks

clean:
	rm -rf $(VENV) $(VENV)-peers _docs _proc build dist *.egg-info
