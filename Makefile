# `make` prints the targets. Each prepares what it needs, and running it twice does no harm.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || echo python3)
ARGS ?=
MODEL := smollm2-135m
WHEELS ?=
CYCLONEDX := 7.5.0
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help venv model check check-format check-lint check-types check-protos format protos \
        chart-tools chart-check chart-docs test demo lock wheel image-locks image-check sbom clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## Make .venv with the pinned packages (PYTHON=... picks the interpreter)

# The stamp is touched last, so an interrupted install is taken up again by the next make.
$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: Python 3.11 or newer is needed; '$(PYTHON) --version' says:" >&2; \
	    $(PYTHON) --version >&2 || true; \
	    echo "make: install one, or name it: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "make: creating .venv with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear .venv || { \
	    echo "make: could not create .venv. On Debian and Ubuntu, venv is a package of its own: python3-venv." >&2; exit 1; }; }
	@echo "make: installing the packages pinned in constraints.txt (minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' || { \
	  echo "make: the install failed; pip's reason is above. It needs a package index and 3 GB of disk" >&2; \
	  echo "make: (free here: $$(df -Ph . | awk 'NR == 2 { print $$4 }')). Mend that and run make again." >&2; exit 1; }
	@touch $@

model: $(INSTALLED) ## Fetch the built-in model into the user's cache
	@$(BIN)/dspark models pull $(MODEL)

check: check-format check-lint check-types check-protos ## Run every static check, as CI and pre-commit do

check-format: $(INSTALLED)
	$(BIN)/ruff format --check .

check-lint: $(INSTALLED)
	$(BIN)/ruff check .

check-types: $(INSTALLED)
	$(BIN)/mypy

check-protos: $(INSTALLED)
	$(BIN)/python scripts/gen_protos.py --check

format: $(INSTALLED) ## Format the code and apply the safe lint fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

protos: $(INSTALLED) ## Regenerate dspark/pb from protos/
	$(BIN)/python scripts/gen_protos.py

chart-tools: $(INSTALLED) ## Fetch the helm that the chart's checks run into .tools/
	@$(BIN)/python scripts/chart_tools.py

chart-check: chart-tools ## Lint the Helm chart and check everything that it renders
	$(BIN)/python scripts/chart_docs.py --check
	$(BIN)/python -m pytest -q -n logical --maxprocesses 2 tests/chart

chart-docs: $(INSTALLED) ## Rewrite docs/helm.md from the chart's values.yaml
	$(BIN)/python scripts/chart_docs.py

test: model chart-tools ## Run the tests (ARGS='-k gateway' goes to pytest)
	$(BIN)/pytest -n logical --maxprocesses 4 $(ARGS)

demo: model ## Run examples/demo.py: the four services on this machine
	$(BIN)/python examples/demo.py $(ARGS)

# pip's closing line reads "Would install NAME-VERSION ...". Names are normalised, so that the order
# is stable, and local versions (torch's +cpu) cut off, so that a pin holds on every platform.
lock: $(INSTALLED) ## Resolve constraints.txt anew, keeping the pins it has
	@trap 'rm -f constraints.new' EXIT; \
	{ grep '^#' constraints.txt; \
	  $(BIN)/python -m pip install --dry-run --ignore-installed -c constraints.txt '.[dev,kube]' \
	    | sed -n 's/^Would install //p' | tr ' A-Z_' '\na-z-' \
	    | sed -E 's/-([^-]+)$$/==\1/; s/\+.*//' | grep -v '^dspark-serve==' \
	    | LC_ALL=C sort -t= -k1,1; } > constraints.new; \
	mv constraints.new constraints.txt; \
	echo "make: constraints.txt holds $$(grep -c == constraints.txt) pins; see git diff"

# A stale build/ would smuggle deleted files into the wheel.
wheel: $(INSTALLED) ## Build dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

# Hashes are of wheels for CPython 3.11 on Linux x86-64. WHEELS names a folder with torch's CPU wheel,
# for machines that do not reach PyTorch's own index.
image-locks: $(INSTALLED) ## Resolve deploy/docker/requirements-*.txt anew from constraints.txt
	$(BIN)/python scripts/lock_images.py $(if $(WHEELS),--find-links $(WHEELS))

image-check: wheel ## Run the CPU image's install steps in a clean environment (minutes, 3 GB)
	$(BIN)/python scripts/image_check.py $(if $(WHEELS),--find-links $(WHEELS))

# An environment of its own: what writes the list has two dozen dependencies of its own.
sbom: ## Write dist/sbom-*.cdx.json, CycloneDX lists of what the images install, from their locks
	@$(PYTHON) -m venv .venv/sbom
	@.venv/sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==$(CYCLONEDX)
	@mkdir -p dist
	@for name in cpu gpu; do \
	  .venv/sbom/bin/cyclonedx-py requirements deploy/docker/requirements-$$name.txt \
	    --pyproject pyproject.toml --mc-type application --output-reproducible \
	    --output-file dist/sbom-$$name.cdx.json; done; \
	ls dist/sbom-*.cdx.json

clean: ## Delete build products and caches (.venv and the model cache stay)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
