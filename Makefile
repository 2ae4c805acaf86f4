PYTHON ?= python3
VENV ?= .venv
# One pair that is known to work together, so that two installs give the same numbers. On PyPI this is
# the CUDA build, which runs on a CPU too. Another build:
#   make install TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0 torchvision==0.28.0
RUNS ?= runs
# Test files at a time, one thread each.
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo omniglot-eval test lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make the virtual environment (.venv)

# The first call installs torch from where TORCH says, the second everything else beside it.
$(STAMP): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	touch $@

test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile $(TESTS)

# A second call continues what is there.
resume = $(if $(wildcard $(RUNS)/$(1)/config.yaml),--resume)

demo: $(STAMP) ## train, evaluate and sample on handwritten digits: minutes on a CPU
	$(BIN)/python scripts/train_vae.py --config configs/digits/vae.yaml \
		--out $(RUNS)/demo-vae $(call resume,demo-vae)
	$(BIN)/python scripts/train_lsgm.py --config configs/digits/lsgm.yaml \
		--vae $(RUNS)/demo-vae --out $(RUNS)/demo-lsgm $(call resume,demo-lsgm)
	$(BIN)/python scripts/evaluate.py --run $(RUNS)/demo-vae $(RUNS)/demo-lsgm \
		--metrics nelbo normal --samples 10 \
		--pictures $(RUNS)/demo --json $(RUNS)/demo/report.json > $(RUNS)/demo.md
	@cat $(RUNS)/demo.md
	@echo "table: $(RUNS)/demo.md  pictures: $(RUNS)/demo/"

omniglot-eval: $(STAMP) ## repeat the README's OMNIGLOT likelihoods from the released weights
	@mkdir -p $(RUNS)/omniglot-eval
	$(BIN)/python scripts/evaluate.py --run released/omniglot-vae released/omniglot-lsgm \
		--metrics nelbo normal iw --k 4 --iw_steps 5 \
		--out $(RUNS)/omniglot-eval --json $(RUNS)/omniglot-eval/all.json > $(RUNS)/omniglot-eval/table.md
	@cat $(RUNS)/omniglot-eval/table.md
	@echo "reports and pictures: $(RUNS)/omniglot-eval/"

lint: $(STAMP) ## check style and types without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment, caches and build files; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
