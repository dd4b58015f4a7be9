# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.
# To name the interpreter: make PYTHON=/path/to/python3.12 install

BIN := .venv/bin
PEERS := .venv-peers
STAMP := .venv/.installed
WORKERS ?= 2
REDUCED := PUSHFORWARD_REDUCED=1
# For processes side by side: threads of each would only wait for those of the others.
ONE_THREAD := XLA_FLAGS=--xla_cpu_multi_thread_eigen=false OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
export MPLBACKEND := Agg
export NO_MKDOCS_2_WARNING := 1
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help install demo test test-broad test-full check docs notebooks notebooks-full bench clean

help:
	@echo "make install     create .venv with pushforward and the versions of constraints.txt"
	@echo "make demo        Lotka-Volterra on real data: table, netCDF and plots under out/"
	@echo "make test        the quick tests, most of all (at most 10 minutes on 2 cores)"
	@echo "make test-broad  those that take longer, as continuous integration runs them too"
	@echo "make test-full   slow tests, notebooks at full size, figures into docs/benchmarks.md"
	@echo "make check       ruff, formatting, pyright"
	@echo "make docs        the documentation site, into site/"
	@echo "make notebooks   the notebooks at reduced size, as a check"
	@echo "make bench       speed, against peers in .venv-peers"
	@echo "make clean       remove what the other targets made"

install: $(STAMP)

# The stamp lies inside .venv, so that removing .venv is enough to start anew.
$(STAMP): pyproject.toml constraints.txt
	@python=$$(./.ci/find-python) && { [ -x $(BIN)/python ] || "$$python" -m venv .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[examples,docs,bench,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/lynx_hare.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not broad"

test-broad: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "broad and not slow"

test-full: $(STAMP) notebooks-full
	$(BIN)/python -m pytest -n $(WORKERS) -m slow
	$(BIN)/python -m benchmarks.full
	$(BIN)/python -m benchmarks.state_parameters
	$(BIN)/python -m benchmarks.darcy
	$(BIN)/python -m benchmarks.trajectories
	$(BIN)/python -m benchmarks.variational
	$(BIN)/python -m benchmarks.learned_gain
	$(BIN)/python -m benchmarks.learned_filters
	$(BIN)/python -m benchmarks.learned_dynamics

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/python docs/make_pages.py
	$(BIN)/mkdocs build --strict --quiet

# Reduced copies go to out/: the notebooks in the repository keep the outputs of a full run. MPLBACKEND is taken away,
# because with it notebooks show no figures.
notebooks: $(STAMP)
	mkdir -p out/notebooks
	ls notebooks/*.ipynb | xargs -P $(WORKERS) -n 1 env -u MPLBACKEND $(REDUCED) $(ONE_THREAD) \
		$(BIN)/jupyter-nbconvert --to notebook --execute --output-dir out/notebooks

notebooks-full: $(STAMP)
	env -u MPLBACKEND $(BIN)/jupyter-nbconvert --to notebook --execute --inplace notebooks/*.ipynb

bench: $(STAMP) $(PEERS)/.installed
	$(BIN)/python -m benchmarks.speed
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.state_space
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.particles
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.online
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PEERS)/bin/python -m benchmarks.simulation_based
	$(PEERS)/bin/python -m benchmarks.inversion

# Peers bring packages that this project does not need, so they have an environment of their own. particles asks for an
# older numpy than the others, which its filters do not need.
$(PEERS)/.installed: pyproject.toml constraints.txt
	@python=$$(./.ci/find-python) && { [ -x $(PEERS)/bin/python ] || "$$python" -m venv $(PEERS); }
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[bench]' dynamax==1.0.3 dapper==1.8.1 cuthbert==0.1.1 numba joblib scikit-learn \
		sbi==0.27.0 torch==2.14.1 iterative_ensemble_smoother==1.3.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps particles==0.4
	@touch $(PEERS)/.installed

clean:
	rm -rf .venv $(PEERS) site out dist .pytest_cache .ruff_cache docs/notebooks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
