# Every target sets up what it needs: a virtual environment with pinned packages, made once.
PYTHON ?= python3
# for a GPU: make run TORCH=<the CUDA wheel of your choice, in pip's words>; remove .venv to change it later
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: run test test-long test-all ui lint golden bench bench-gpu setup clean

run: $(READY)  ## train v1 on this machine; more arguments: make run ARGS="size=tiny seed=1"
	$(PY) run.py $(ARGS)

test: $(READY)  ## run the tests, without those that take minutes
	$(PY) -m pytest -n 2 --dist loadgroup -m "not long" $(ARGS)

test-long: $(READY)  ## run the tests that take minutes: random command lines, damaged checkpoints, the checkpoint matrix
	$(PY) -m pytest -n 2 --dist loadgroup -m long $(ARGS)

test-all: test test-long  ## run all tests

ui: $(READY)  ## MLflow's web page over all runs, at http://127.0.0.1:5000
	@mkdir -p outputs
	$(PY) -m mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db --workers 1 $(ARGS)

lint: $(READY)  ## what a commit must pass
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

golden: $(READY)  ## rewrite the golden loss curves and messages; review the difference before you commit it
	$(PY) -m tests.golden.curves
	$(PY) -m tests.golden.messages

bench: $(READY)  ## measure; tests/bench/README.md says what and keeps the results
	$(PY) tests/bench/start_time.py
	$(PY) tests/bench/platform_tax.py
	$(PY) tests/bench/kill.py 20
	$(PY) -m tests.fuzz.flips 400
	$(PY) -m tests.fuzz.config 1000 1
	$(PY) -m tests.fuzz.training 200 1
	@! $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(MAKE) bench-gpu

bench-gpu: $(READY)  ## measure on one GPU: kernels, whole steps beside the peers, where their time goes, loss curves
	$(PY) tests/bench/kernels.py
	$(PY) tests/bench/training.py dense
	$(PY) tests/bench/training.py moe
	$(PY) tests/bench/training.py dense --size 3b
	$(PY) tests/bench/fp8.py
	$(PY) tests/bench/step_profile.py dense
	$(PY) tests/bench/step_profile.py moe --size 1b
	$(PY) tests/bench/parity.py

setup: $(READY)  ## only make the environment

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"PYTHON={sys.executable} is Python {v[0]}.{v[1]}, and 3.11 or 3.12 is needed. Fix: make PYTHON=python3.11 ...")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment. Fix: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	@$(PY) -W ignore -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # as pip does, on all cores; templates fail
	@touch $@

clean:  ## remove the environment; runs in outputs/ stay
	rm -rf $(VENV)
