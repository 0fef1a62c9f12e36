# make demo    train the quick start with and without PSS, print a table, draw two pictures
# make test    run the tests
# Each sets up a virtual environment in .venv first, unless it is there and up to date.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test lint clean

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else f"make: needs Python 3.10 to 3.12, $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.11")'
	@echo "== Setting up .venv (once; 2 to 5 minutes, 7 GB: torch comes with its CUDA libraries)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	@echo "== 1/3 Training digits.yaml: a small ViT on all of its tokens"
	$(BIN)/composer train.py yamls/digits.yaml save_overwrite=true
	@echo "== 2/3 Training digits_pss.yaml: the same under PSS"
	$(BIN)/composer train.py yamls/digits_pss.yaml save_overwrite=true
	@echo "== 3/3 Evaluating both at every keep rate, drawing the pictures into demo/"
	$(BIN)/python -m pss_composer report runs/digits runs/digits_pss --out demo

test: $(READY)
	@echo "== Running the tests"
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .

clean:
	rm -rf .venv runs demo data *.egg-info
