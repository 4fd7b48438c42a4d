# make demo: simulate a chip, process it, compare with the truth.  make test: everything that is tested.
# Both install what is missing first. With a DIALS on the PATH (conda, a module) that one is used; otherwise Debian's.
SHELL := /bin/bash
PREFIX ?= /opt/ssx_mpi
DEMO ?= demo

# the Python that DIALS belongs to: that of its installer, of a module or of a conda environment (which has no
# dials.python) on the PATH, else Debian's
DIALS_PYTHON := $(shell for p in dials.python python3 python; do \
  $$p -c 'import dials, sys; print(sys._base_executable)' 2>/dev/null && exit; done; echo /usr/bin/python3)
DEBIAN_PYTHON := $(filter /usr/bin/%,$(DIALS_PYTHON))
DEBIAN_PACKAGES := dials python3-mpi4py openmpi-bin python3-venv gcc libc6-dev
COMMA := ,
VENV := .venv
BIN := $(VENV)/bin
SOURCES := Makefile setup.cfg setup.py pyproject.toml $(wildcard ssx_mpi/kernels/src/*)

export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_mapby := :oversubscribe

# the batch system, modules and browser that the tests start, where they can be had
CLUSTER_PACKAGES := slurm-wlm munge libpmix-dev lmod chromium
PIP := $(BIN)/pip install -q --disable-pip-version-check
# Only what cannot be imported is installed: a second h5py beside the one that dxtbx is linked with would bring a second
# HDF5 library, which does not know the file handles of the first (Debian's h5py does not bear its own name in pip)
define MISSING
from importlib.metadata import requires
from importlib.util import find_spec
import re
for requirement in requires("ssx_mpi"):
    name = re.match(r"[\w-]+", requirement).group()
    if find_spec({"pyyaml": "yaml"}.get(name, name.replace("-", "_"))) is None:
        print(requirement.split(";")[0].replace(" ", ""))
endef
export MISSING

.PHONY: help setup install demo cluster test test-newest lint parameters clean
help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(VENV)/installed

$(VENV)/installed: $(SOURCES)
	@echo "== setup: DIALS, MPI and a virtual environment in $(VENV) =="
	@if ! $(DIALS_PYTHON) -c 'import dials, venv, ensurepip$(if $(DEBIAN_PYTHON),$(COMMA) mpi4py)' 2>/dev/null \
	  || ! command -v mpiexec >/dev/null || ! command -v $(CC) >/dev/null; then \
	  [ -n "$(DEBIAN_PYTHON)" ] || { echo "beside $(DIALS_PYTHON) there is no mpiexec, $(CC) or venv: install them"; exit 1; }; \
	  echo "-- installing with apt: $(DEBIAN_PACKAGES) (about 470 MB, a few minutes)"; \
	  as_root=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$as_root apt-get update -q && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(DEBIAN_PACKAGES); \
	else echo "-- DIALS, MPI and a compiler are there ($(DIALS_PYTHON))"; fi
	@echo "-- installing ssx_mpi into $(VENV)"
	@$(DIALS_PYTHON) -m venv --system-site-packages $(VENV)
	@$(PIP) --no-deps -e .
	@missing=$$($(BIN)/python -c "$$MISSING"); [ -z "$$missing" ] || $(PIP) $$missing
	@# bitshuffle, LZ4, Blosc and Zstandard; Debian's hdf5plugin comes without the plugins
	@$(BIN)/python -c 'import h5py, hdf5plugin; filters = 32001, 32004, 32008, 32015; \
	  raise SystemExit(not all(map(h5py.h5z.filter_avail, filters)))' \
	  || $(PIP) --ignore-installed --no-deps hdf5plugin
	@$(BIN)/python -c 'from ssx_mpi import dials_compat as d; raise SystemExit(d.lacks_gemmi())' || $(PIP) gemmi
	@$(BIN)/python -c 'from ssx_mpi import dials_compat as d; d.prepare(); print("-- DIALS", ".".join(map(str, d.dials_version())))'
	@touch $@

# a place for all users of a site: programs, job scripts and module files below PREFIX, without a link to this folder.
# MPI4PY=build makes mpi4py with the mpicc on the PATH, which must be that of the site's MPI
MPI4PY ?=
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' ssx_mpi/__init__.py)
SHARE := $(PREFIX)/share/ssx_mpi

install:
	@echo "== install: ssx_mpi $(VERSION) for $(DIALS_PYTHON) in $(PREFIX) =="
	@$(DIALS_PYTHON) -c 'import dials' || { echo "there is no DIALS: install it or load its module first"; exit 1; }
	@$(DIALS_PYTHON) -m venv --system-site-packages $(PREFIX)
	@[ -z "$(MPI4PY)" ] || $(PREFIX)/bin/pip install -q --no-cache-dir --force-reinstall --no-binary=mpi4py mpi4py
	@$(PREFIX)/bin/pip install -q --disable-pip-version-check --no-deps --force-reinstall .
	@missing=$$($(PREFIX)/bin/python -c "$$MISSING"); \
	  [ -z "$$missing" ] || $(PREFIX)/bin/pip install -q --disable-pip-version-check $$missing
	@mkdir -p $(SHARE)/jobscripts $(SHARE)/modulefiles/ssx_mpi
	@cp jobscripts/*.sh $(SHARE)/jobscripts/
	@for kind in lua tcl; do sed 's|@PREFIX@|$(abspath $(PREFIX))|g; s|@VERSION@|$(VERSION)|g' \
	  jobscripts/modulefiles/ssx_mpi.$$kind.in > $(SHARE)/modulefiles/ssx_mpi/$(VERSION)$$([ $$kind = tcl ] || echo .lua); done
	@$(PREFIX)/bin/python -c 'from ssx_mpi import dials_compat as d; d.prepare(); print("-- DIALS", ".".join(map(str, d.dials_version())))'
	@echo "-- module use $(abspath $(SHARE))/modulefiles; module load ssx_mpi/$(VERSION)"

# a lysozyme chip as a beamline might deliver it: 35% hits, the header's beam 0.36 mm and its distance 0.4 mm wrong
DEMO_IMAGES := n_images=160 hit_rate=0.35 seed=1 header.beam_offset=0.2,-0.3 header.distance_offset=0.4
DEMO_CRYSTAL := space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90

demo: setup
	@mkdir -p $(DEMO)/images
	@if [ -e $(DEMO)/images/truth.json ]; then echo "== demo: the images are there, in $(DEMO)/images =="; else \
	  echo "== demo: simulating a lysozyme chip in $(DEMO)/images =="; \
	  mpiexec -n $$(nproc) $(BIN)/ssx_mpi.simulate $(DEMO_IMAGES) $(DEMO_CRYSTAL) \
	    output.file=$(DEMO)/images/lysozyme.nxs output.overwrite=True; fi
	@echo "== demo: processing it on all cores, in $(DEMO)/run =="
	@$(BIN)/ssx_mpi image=$(DEMO)/images/lysozyme.nxs $(DEMO_CRYSTAL) output.directory=$(DEMO)/run
	@echo "== demo: the result beside the truth =="
	@$(BIN)/ssx_mpi.compare $(DEMO)/images $(DEMO)/run
	@echo "== demo: look at $(DEMO)/run/ssx_mpi.log and ssx_mpi.json; merged.mtz and the crystals are in $(DEMO)/run/DataFiles =="

cluster:
	@if command -v slurmctld >/dev/null && [ -d /usr/share/lmod ]; then :; \
	elif [ $$(id -u) = 0 ] && command -v apt-get >/dev/null; then \
	  echo "== test: installing with apt: $(CLUSTER_PACKAGES)"; \
	  (apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
	    $(CLUSTER_PACKAGES)) >/dev/null || echo "-- not to be had: the tests of Slurm and modules will be skipped"; \
	else echo "== test: no Slurm here: its tests will be skipped"; fi

test: setup cluster
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# the part of the tests that depends on DIALS, MPI, Python or NumPy, on the newest of each; where no such tree can be made
# the last line says so
test-newest:
	.ci/newest_dials.sh test

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# docs/parameters.md and its schema, of the declarations
parameters: setup
	$(BIN)/python -m ssx_mpi.command_line.parameter_documents docs

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info ssx_mpi/kernels/_loops*.so $(DEMO)
