# make demo    train the quick start with and without PSS, print a table, draw two pictures
# make demo-pretrain    pre-train on the digits, fine-tune under PSS from that and from scratch, print a table and draw;
#              with DATASET=FashionMNIST on that data set of torchvision (or another with ten classes), downloaded into
#              data/torchvision, or read from the folder DATA=FOLDER, where torchvision has stored it
# make test    run the tests; make test-quick leaves out those that are slow
# make lint    ruff and the type checker
# make test-package    build wheel and sdist and try both
# make test-versions    the tests of model families and trainers, with the newest libraries and no Composer, in an
#              environment of its own in .versions/newest (7 GB), and with the lowest supported over this one
# Each sets up a virtual environment in .venv first, unless it is there and up to date.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo demo-pretrain test test-quick test-package test-versions lint clean

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
	$(BIN)/pss report runs/digits runs/digits_pss --out demo

# Fashion-MNIST has 42 times as many images: few epochs make as many batches, and a cycle is to be as many of them
OTHER_DATA := data.name=torchvision data.dataset=$(DATASET) data.path=$(or $(DATA),data/torchvision) data.download=true
PRETRAIN_DATA := $(if $(DATASET),$(OTHER_DATA) max_duration=3ep)
FINETUNE_DATA := $(if $(DATASET),$(OTHER_DATA) max_duration=1ep pss.schedule.period=0.05dur)
PRETRAINED := $(or $(DATASET),digits)_pretrain

demo-pretrain: $(READY)
	@echo "== 1/5 Pre-training by digits_pretrain.yaml: SimMIM, without labels"
	$(BIN)/composer train.py yamls/digits_pretrain.yaml run_name=$(PRETRAINED) save_overwrite=true $(PRETRAIN_DATA)
	@echo "== 2/5 Fine-tuning under PSS by digits_finetune_pss.yaml, from pre-training"
	$(BIN)/composer train.py yamls/digits_finetune_pss.yaml run_name=from_pretraining save_overwrite=true $(FINETUNE_DATA) \
		model.pretrained=runs/$(PRETRAINED)
	@echo "== 3/5 The same from scratch"
	$(BIN)/composer train.py yamls/digits_finetune_pss.yaml run_name=from_scratch save_overwrite=true $(FINETUNE_DATA)
	@echo "== 4/5 Evaluating both at every keep rate, drawing pictures into demo-pretrain/"
	$(BIN)/pss report runs/from_scratch runs/from_pretraining --out demo-pretrain
	@echo "== 5/5 Drawing what the pre-trained model paints into masked patches"
	$(BIN)/pss reconstruct runs/$(PRETRAINED) --out demo-pretrain/reconstruction.png

# files in the order of their names, but the long one first; each worker takes whole files
test: $(READY)
	@echo "== Running the tests"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-quick: $(READY)
	@echo "== Running the quick tests"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# what a user gets: wheel and sdist, the wheel in an environment of its own and away from the repository (5 minutes)
test-package: $(READY)
	rm -rf build dist .package && mkdir .package
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .package/venv
	.package/venv/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd .package && venv/bin/pss --version && venv/bin/pss train digits_pss max_duration=1ep && venv/bin/pss evaluate runs/digits_pss
	tar -xzf dist/*.tar.gz -C .package
	cd .package/pss_composer-* && ../../$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# transformers is at its lowest in .venv, whose Composer pins the torch that goes with it, and at its newest in the other
NEWEST := "torch>=2.8" torchvision timm "transformers>=5,<6" "open_clip_torch<4" "lightning<3" accelerate \
	"pytest>=8,<10" pytest-xdist scikit-image scipy
LOWEST := timm==1.0.31 open_clip_torch==2.32.0 lightning==2.5.0
VERSIONED := tests/test_schedules.py tests/test_sampling.py tests/surgery tests/integrations
PYTEST_VERSIONED := -m pytest $(VERSIONED) --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-versions: $(READY)
	rm -rf .versions && mkdir .versions
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .versions/lowest $(LOWEST)
	@echo "== The lowest versions: $(LOWEST)"
	PYTHONPATH=.versions/lowest $(BIN)/python $(PYTEST_VERSIONED)
	$(PYTHON) -m venv .versions/newest
	.versions/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade $(NEWEST)
	@echo "== The newest versions, without Composer"
	.versions/newest/bin/python -m pip list --disable-pip-version-check
	.versions/newest/bin/python $(PYTEST_VERSIONED) --ignore tests/surgery/test_export.py  # Composer's export, too

clean:
	rm -rf .venv .versions .package build dist runs demo demo-pretrain data *.egg-info
