# `make demo` and `make test` need Python 3.10 or later and nothing else: they make their own .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick kernels lint types check clean

demo: .venv/installed-demo  ## base, SFT, preference training with online merging, ratio sweep, Pareto plot
	$(BIN)/python bench/alignment_tax/run.py --quick

test: .venv/installed-test  ## every test; on a CPU the kernels run in Triton's interpreter, on a GPU on the GPU
	$(BIN)/pytest -n auto

quick: .venv/installed-test  ## the tests that need neither the interpreter nor a compiler nor other processes
	$(BIN)/pytest -n auto -q -m "not slow"

kernels: .venv/installed-test  ## every build of the kernels, compiled for GPUs that need not be here
	$(BIN)/python bench/kernels.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

check: lint types test  ## what CI runs

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
