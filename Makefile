# The one task file: people and CI run the same targets. `make` alone lists them.
# Everything uses the Python of the active virtual environment; PYTHON=... names another.

PYTHON  ?= python
WORKERS ?= auto
ARGS    ?=

# One test process per core (at most 4, each holds a torch), so one thread in each: more would only wait.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest
# A build folder that is kept, so that only what changed is compiled again.
EDITABLE = --no-build-isolation -Cbuild-dir='build/{wheel_tag}' -e

.DEFAULT_GOAL := help
.PHONY: help install native asan test doctest quick lint types format check docs readme seen fuzz bench wheel ci clean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Install for development: editable, with every tool
	$(PYTHON) -m pip install "scikit-build-core>=0.11" "nanobind>=2.7,<4"
	$(PYTHON) -m pip install $(EDITABLE) ".[dev]"

native: ## Compile the C++ extension again, after `make install`
	$(PYTHON) -m pip install --no-deps $(EDITABLE) .

# detect_leaks=0: the interpreter itself frees little at its end. The compiler's own run-time library must come first.
asan: ## Run the kernels' tests on a build with the address and undefined behaviour sanitizers
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps --upgrade --target build/asan \
		-Ccmake.define.LINSTATE_SANITIZE=ON -Cbuild-dir='build/asan-{wheel_tag}' .
	PYTHONPATH=build/asan LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(PYTEST) -q -p no:cacheprovider tests/ops tests/mixers tests/models -k "native or packed" $(ARGS)

test: doctest ## Run the tests, on the installed package (ARGS="-k delta_rule")
	$(PYTEST) -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

quick: ## Run the tests that take less than a few seconds each
	$(PYTEST) -n $(WORKERS) --maxprocesses 4 --dist worksteal -m "not slow" $(ARGS)

doctest: ## Run the examples in the docstrings (pytest ends with 5 where there are none)
	$(PYTEST) -q -c pyproject.toml --rootdir . --doctest-modules --doctest-ignore-import-errors \
		--pyargs linstate || [ $$? -eq 5 ]

lint: ## Check style and layout of the code
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: ## Check the types
	$(PYTHON) -m mypy

format: ## Rewrite the code in the project's layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check: lint types test ## Everything that must pass before a commit

docs: ## Write docs/help.md anew from the command line's own help
	$(PYTHON) -m linstate.cli.docs

readme: ## Draw the README's picture from docs/measured
	$(PYTHON) tools/readme_picture.py

seen: ## Write what transformers' and FLA's configuration classes can see (models/families/seen.json)
	$(PYTHON) tools/seen_settings.py

fuzz: ## Ten minutes of files that were sealed again after they were changed
	LINSTATE_FUZZ=40000 $(PYTEST) -q tests/state/test_sealed.py $(ARGS)

bench: ## Measure the recurrences on this machine (ARGS="--json")
	$(PYTHON) -m linstate bench ops $(ARGS)

wheel: ## Build source archive and wheel into dist/
	$(PYTHON) -m build

ci: ## What CI does: a fresh copy, a fresh environment, the README's test command, lint, types
	.ci/run

clean: ## Remove what was built or cached
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find src \( -name '_native.*.so' -o -name '_native.*.pyd' \) -delete
