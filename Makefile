VENV ?= .venv
# Extras of pyproject.toml to install, for example EXTRAS=dev,maniskill.
EXTRAS ?= dev
# What pip is asked for as torch, for example TORCH_SPEC=torch==2.13.0. Empty: the CPU build if there is no NVIDIA GPU.
TORCH_SPEC ?=
# Options of `vla quickstart`, for example ARGS="seed=1".
ARGS ?=
STAMP := $(VENV)/.installed
export EXTRAS TORCH_SPEC

.PHONY: quickstart setup test lint doctor clean distclean

quickstart: setup  ## demonstrations, imitation, PPO, evaluation and a report in runs/quickstart
	$(VENV)/bin/vla quickstart $(ARGS)

setup: $(STAMP)  ## virtual environment with everything installed; quick when nothing has changed

$(STAMP): pyproject.toml setup.sh
	./setup.sh $(VENV)
	touch $@

# Tests of the robot's side watch the clock and have the machine to themselves.
ALONE := tests/deployment/ tests/e2e/ tests/vla_policy/

test: setup lint  ## static checks and every test that is not slow
	$(VENV)/bin/pytest -n 2 --dist loadfile $(filter-out $(ALONE),$(wildcard tests/*/))
	$(VENV)/bin/pytest $(ALONE)

lint: setup  ## style, dependency rules, types
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

doctor: setup  ## what this machine lacks
	$(VENV)/bin/vla doctor

clean:  ## caches and build outputs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean  ## the virtual environment too; runs/ stays
	rm -rf $(VENV)
