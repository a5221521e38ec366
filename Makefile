# make demo   train the demo model and sample from it (about ten minutes on two cores)
# make test   the tests        make lint   ruff and pyright        make bench   timings against peers
# make docs   the kernel and traffic tables in docs/ (every kernel compiled for four GPUs, none needed: minutes)
# make families   what holds of every Hugging Face family, measured, in docs/families.md (minutes)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread per test process: two of them on two cores, and numpy's own threads would only wait for each other. Inductor
# would start processes of its own beside each that compiles.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1

.PHONY: demo test lint bench docs families oracle clean

demo: $(READY)
	$(BIN)/python examples/demo.py $(DEMO)

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/cpu.py $(BENCH)

docs: $(READY)
	$(ONE_THREAD) $(BIN)/python -m plait docs docs

families: $(READY)
	$(ONE_THREAD) $(BIN)/python tests/hf_table.py

# What transformers says of every case, in float64: run by hand where a case is new or changed.
oracle: $(READY)
	$(BIN)/python -m pip install -q -e '.[oracle]'
	$(ONE_THREAD) $(BIN)/python tests/hf_make_golden.py $(CASES)

# The link lets pyright read `import plait`, whose folder is the checkout itself whatever it is called.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/plait
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run
