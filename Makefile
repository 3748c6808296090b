# `make demo` and `make test` need Python 3.10 or later and nothing else: they make their own .venv.
PYTHON ?= python3
BIN := .venv/bin

# Tests of what only `make frameworks` installs, with the slow ones of several processes; tests of the documentation.
FRAMEWORKS := tests/distributed tests/integrations
DOCS := tests/docs

.PHONY: demo study test quick frameworks docs bench kernels lint types check clean

demo: .venv/installed-demo  ## base, SFT, preference training with online merging, ratio sweep, Pareto plot
	$(BIN)/python bench/alignment_tax/run.py --quick

study: .venv/installed-study  ## every algorithm and rival of the two papers, in small; 70 minutes
	$(BIN)/python bench/study/run.py

test: .venv/installed-test  ## every test; on a CPU the kernels run in Triton's interpreter, on a GPU on the GPU
	$(BIN)/pytest -n auto $(patsubst %,--ignore=%,$(FRAMEWORKS) $(DOCS))

quick: .venv/installed-test  ## the tests that need neither the interpreter nor a compiler nor other processes
	$(BIN)/pytest -n auto -q -m "not slow" $(patsubst %,--ignore=%,$(FRAMEWORKS) $(DOCS))

frameworks: .venv/installed-frameworks  ## inside training frameworks, and sharded over several processes; examples/
	$(BIN)/pytest -n 2 --dist loadfile --durations 10 $(FRAMEWORKS)

docs: .venv/installed-frameworks .venv/installed-docs  ## the site in out/site, strictly, and all code of pages and docstrings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/pytest -n 2 --tb short --durations 10 $(DOCS)

bench: .venv/installed-bench  ## steps and paths on a CPU against torch, torch-optimi and the published algorithm; ten minutes
	mkdir -p out
	$(BIN)/pytest -q bench/bench_merging_adamw.py bench/bench_auto.py bench/bench_interpolate.py \
		bench/bench_operations.py --benchmark-json out/bench.json --benchmark-columns median,rounds
	$(BIN)/python bench/bench_scaling.py --out out/scaling.json
	$(BIN)/python bench/tables.py --record out/bench.json out/scaling.json \
		--write docs/explanation/speed.md --plot docs/explanation/scaling.png
	$(BIN)/python bench/readme.py --write

kernels: .venv/installed-test  ## every build of the kernels, compiled for GPUs that need not be here
	$(BIN)/python bench/kernels.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

check: lint types test frameworks docs  ## what CI runs

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# DeepSpeed's setup asks the installed torch, and on a CPU there is nothing to build. torchtitan asks for older datasets
# than TRL; its optimizers import none.
.venv/installed-frameworks: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[frameworks]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torchtitan
	touch $@

.venv/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
