# Every target first sets up a virtual environment, once. `make help` lists the targets.

VENV ?= .venv
# The first Python that is new enough. To choose one: make PYTHON=/path/to/python3
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
# INSTALL.md says how to choose another torch, or another index.
TORCH_SPEC ?= torch==2.14.1 torchvision==0.29.1
TORCH_INDEX ?=
# Versions tested together. Empty (CONSTRAINTS=): keep whatever the environment has.
CONSTRAINTS ?= tools/setup/constraints.txt

PY = $(VENV)/bin/python
READY = $(VENV)/.regionspot_d2-ready
PIP_INSTALL = $(PY) -m pip --disable-pip-version-check install
WITH_CONSTRAINTS = $(addprefix --constraint ,$(CONSTRAINTS))
SOURCES = $(wildcard *.py datasets/*.py) regionspot_d2 demo integrations tests tools
DEMO = $(PY) demo/demo.py --input $$($(PY) demo/photos.py) --proposals demo/boxes.json \
	--vocabulary lvis --output output/demo

IS_NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 10))
# A torch and a torchvision that do not match import, but fail at the first operator.
TORCH_WORKS = import torch, torchvision; \
	torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5)

.PHONY: help setup demo web train test lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: $(READY)  ## set up the virtual environment, about 4 minutes and 6 GB the first time

demo: $(READY)  ## name regions of real photos, into output/demo
	$(DEMO)

web: $(READY)  ## serve a web page on which regions are drawn and named, until Ctrl-C
	$(PY) -m regionspot_cli web

train: $(READY)  ## train a head on the photos of the demo, into output/mini/train_demo_quick
	$(PY) demo/train_set.py --output output/demo_photos
	$(PY) train_net.py --config-file configs/mini/train_demo_quick.yaml

# One thread: on few shared cores, OpenMP's waiting threads make a step up to ten times slower.
test: export OMP_NUM_THREADS ?= 1
test: $(READY)  ## run the tests
	$(PY) -m pytest -q -n auto --dist loadfile

lint: $(READY)  ## check format and types
	$(PY) -m black --check -l 100 $(SOURCES)
	$(PY) -m isort --check $(SOURCES)
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m mypy regionspot_d2

clean:  ## remove the virtual environment .venv, output and every cache of the tools
	rm -rf .venv output build regionspot_d2.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f $(READY)
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Every step checks first whether its work is done, so an interrupted set-up continues where it was.
# The stamp is written last. The set-up runs again when one of the files that define it changes.
$(READY): setup.py Makefile $(wildcard tools/setup/*)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -c '$(IS_NEW_ENOUGH)' || { echo \
		"regionspot_d2 needs Python 3.10 or newer ($(or $(PYTHON),python3) is not):" \
		"make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -q $(WITH_CONSTRAINTS) "setuptools>=77.0.3,<82" wheel
	$(PY) -c '$(TORCH_WORKS)' 2>/dev/null \
		|| $(PIP_INSTALL) $(TORCH_SPEC) $(addprefix --index-url ,$(TORCH_INDEX))
	$(PY) -c "import cv2" 2>/dev/null \
		|| $(PIP_INSTALL) -q $(WITH_CONSTRAINTS) opencv-python-headless
	$(PIP_INSTALL) -q $(WITH_CONSTRAINTS) --no-build-isolation --editable ".[all]"
	@# lvis, a reference for the tests, trackers, and imagecorruptions of tools/evaluate_robustness.py
	@# would install a second OpenCV.
	$(PIP_INSTALL) -q $(WITH_CONSTRAINTS) --no-deps lvis==0.5.3 trackers==2.6.1 \
		imagecorruptions==1.1.2
	$(PY) tools/setup/install_detectron2.py $(WITH_CONSTRAINTS)
	touch $@
