# What people run and what CI runs. `make demo` and `make test` need nothing but Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Genuine pictures and semseg's own code, where they are at hand.
SEGFLEET_DATA ?= ../shared/data
CITYSCAPES := $(wildcard $(SEGFLEET_DATA)/cityscapes)
CAMVID ?= $(SEGFLEET_DATA)/camvid
MOBILENET := $(wildcard $(SEGFLEET_DATA)/weights/mobilenet_v2_imagenet_features.pth)
SEMSEG ?=

.PHONY: help install demo demo-stop test test-slow test-long faults faults-all check audit fuzz format
.PHONY: test-reference bench-data bench-model bench-inference bench-gpu bench-overhead bench-parts bench-search soak

help:
	@echo "make demo       the whole loop on this machine: images, search, tracking, registered model"
	@echo "make demo-stop  end the servers that make demo started"
	@echo "make test       the fast tests"
	@echo "make test-slow  the tests through real Ray clusters and MLflow servers"
	@echo "make test-reference SEMSEG=DIR MMSEG=DIR   networks, recipes and windows against the code of others, in checkouts"
	@echo "make test-long  the few of many minutes, which CI leaves out"
	@echo "make faults     faults put into the program on purpose: a table of what it held; make faults-all: every one"
	@echo "make check      format, lint, types, import contracts, fast tests"
	@echo "make fuzz       readers of files of others on mutated files for FUZZ_SECONDS (600)"
	@echo "make audit      known advisories of the pinned packages, asked of osv.dev"
	@echo "make format     put the code into the form that make check wants"
	@echo "make bench-data how fast samples are read and pictures ingested; writes benchmarks/README.md"
	@echo "make bench-model how fast a training step is; writes benchmarks/README.md"
	@echo "make bench-inference how fast pictures are segmented; writes benchmarks/README.md"
	@echo "make bench-gpu  training steps and predictions on a GPU, MFU, memory; writes benchmarks/README.md"
	@echo "make bench-parts what the network's parts are worth on CamVid, in hours; writes benchmarks/README.md"
	@echo "make bench-search what a trial and a search cost; writes benchmarks/README.md"
	@echo "make soak       does anything grow in two hours of small studies? writes benchmarks/README.md"
	@echo "make bench-overhead what Ray costs a training step; writes benchmarks/README.md"
	@echo "make install    .venv from constraints.txt (the others do it when it is needed)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "error: Python 3.11 or newer is needed. Say which: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python jobs/demo.py

demo-stop: install
	$(BIN)/python jobs/demo_stop.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not faults_long and not long" -n 3 --dist loadfile

REFERENCES = tests/pspnet_model/test_published.py tests/pspnet_model/test_semseg_windows.py \
	tests/pspnet_model/test_optim.py tests/segfleet_config/test_semseg_recipe.py tests/segfleet_config/test_mmseg_recipe.py

test-reference: install
	@test -n "$(SEMSEG)$(MMSEG)" \
	|| { echo "error: A reference is compared with its own code. Say where it is: make test-reference SEMSEG=DIR MMSEG=DIR" >&2; exit 2; }
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	OMP_NUM_THREADS=1 $(if $(SEMSEG),SEGFLEET_SEMSEG=$(SEMSEG)) $(if $(MMSEG),SEGFLEET_MMSEG=$(MMSEG)) \
	$(BIN)/python -m pytest -rs $(REFERENCES)

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long" -n 2 --dist loadfile

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.faults.table -m "not faults_long" tests/faults

faults-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p tests.faults.table --write-faults docs/faults.md tests/faults

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

FUZZ_SECONDS ?= 600
fuzz: install
	$(BIN)/uv pip install --quiet atheris || echo "no atheris for this Python: seeds are mutated blindly"
	OMP_NUM_THREADS=1 PYTHONPATH=.:platform $(BIN)/python tests/fuzz/readers.py --seconds $(FUZZ_SECONDS) \
	$$($(BIN)/python -c 'import atheris' 2> /dev/null || echo --random)

audit: install
	@found=$$($(BIN)/uv tool run pip-audit -r constraints.txt --no-deps --disable-pip -s osv 2>&1); code=$$?; \
	case "$$found" in \
	*Traceback*) printf '%s\n' "$$found" | tail -1 >&2; \
	  echo "error: the advisories could not be asked for, so nothing is known of these pins. Run it where api.osv.dev can be reached." >&2; exit 2;; \
	esac; printf '%s\n' "$$found"; exit $$code

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-data: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/data_path.py --write benchmarks/README.md \
	$(if $(CITYSCAPES),--cityscapes $(CITYSCAPES)) $(if $(SEMSEG),--semseg $(SEMSEG))
	$(BIN)/python benchmarks/ingest.py --write benchmarks/README.md $(if $(CITYSCAPES),--cityscapes $(CITYSCAPES))

bench-model: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/model_step.py --write benchmarks/README.md \
	$(if $(CITYSCAPES),--cityscapes $(CITYSCAPES)) $(if $(SEMSEG),--semseg $(SEMSEG))

bench-inference: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/inference.py --write benchmarks/README.md \
	$(if $(CITYSCAPES),--cityscapes $(CITYSCAPES)) $(if $(SEMSEG),--semseg $(SEMSEG))

bench-gpu: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/gpu.py --write benchmarks/README.md \
	$(if $(CITYSCAPES),--cityscapes $(CITYSCAPES)) $(if $(SEMSEG),--semseg $(SEMSEG))

bench-parts: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	test -d stores/camvid || $(BIN)/python jobs/ingest_folder.py --root $(CAMVID) --store stores/camvid
	$(BIN)/python benchmarks/parts.py --write benchmarks/README.md --store stores/camvid \
	$(if $(MOBILENET),--backbone-weights $(abspath $(MOBILENET)))

bench-search: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/trial_overhead.py --write benchmarks/README.md
	$(BIN)/python benchmarks/search_efficiency.py --write benchmarks/README.md
	$(BIN)/python benchmarks/tracking_outage.py --write benchmarks/README.md

soak: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --hours 2 --write benchmarks/README.md

bench-overhead: install
	$(BIN)/uv pip install --quiet --compile-bytecode -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks/overhead.py --write benchmarks/README.md
	$(BIN)/python benchmarks/overhead.py --spare-core --write benchmarks/README.md
