# make quickstart | test | lint | slow       FAST=1 makes the quick start short, DATA=folder runs it on your pictures
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip install --quiet -c constraints.txt

.PHONY: quickstart test lint slow clean
quickstart: $(VENV)/ready
	$(VENV)/bin/mmllm quickstart $(if $(FAST),--fast) $(if $(DATA),--data $(DATA)) $(ARGS)

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

slow: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m "slow and not gpu"

# deepspeed ships as source and asks the installed torch how to build: it comes after torch, without a build environment
$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja py-cpuinfo torch torchvision
	$(PIP) --no-build-isolation deepspeed
	$(PIP) -e ".[data,sft,serve,eval,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
