# Every target makes its own .venv when it is missing or older than the project's requirements.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PACKAGES := offload edkm integrations

.DELETE_ON_ERROR:
.PHONY: demo test check format bench clean

demo: $(STAMP)
	$(BIN)/edkm demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict $(addprefix --package ,$(PACKAGES))

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only

clean:
	rm -rf .venv build dist offload/*.so offload/*/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks

$(STAMP): pyproject.toml constraints.txt $(wildcard offload/*.[ch] offload/*/*.c)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "edkm needs Python 3.11 or newer, $(PYTHON) is older: name another with make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama,dev]'
	@touch $@
