# The two commands of the first minute: `make run` and `make test`. `make help` lists the rest.
#
# PYTHON       the interpreter that the virtual environment is made with (3.11 or newer)
# TORCH_INDEX  a package index or a folder with the torch build you want: a CPU index keeps gigabytes of CUDA packages
#              away, a CUDA one brings them. See docs/packaging.md, "Which torch".
# LOCK         the locked versions that `make setup` installs; empty: the newest that pyproject.toml allows

PYTHON ?= python3
TORCH_INDEX ?=
LOCK ?= packaging/requirements.lock

# What the Debian package and the container have of sortd.
SERVICE_EXTRAS := notify,onnx,review,train

# For make floors: a version of torch in place of the minimum (2.13.0+cpu), and the tests to run.
FLOORS_TORCH ?=
FLOORS_TESTS ?= tests

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
WHEEL := dist/sortd_images-$(VERSION)-py3-none-any.whl
SDIST := dist/sortd_images-$(VERSION).tar.gz
TESTS ?= tests/test_config.py tests/test_docs.py tests/test_sample_data.py tests/test_architecture.py tests/core tests/store

comma := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_FROM := $(if $(TORCH_INDEX),$(if $(wildcard $(TORCH_INDEX)),--find-links $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)))

.DEFAULT_GOAL := help
.PHONY: help setup lock wheel sdist deb deb-test container container-test floors run test test-repeat slow lint docs bench faults bulk-faults powercuts mutants soak overflow hostile long clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(STAMP) ## make .venv with sortd, its dependencies and the tools of its tests

$(STAMP): pyproject.toml constraints.txt packaging/requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sortd needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	packaging/install_locked $(BIN)/python "$(LOCK)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_FROM) 'torch>=2.7'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_FROM) --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_FROM) --no-build-isolation --editable '.[review,train]'
	@if $(BIN)/python -m pip list 2>/dev/null | grep -q '^nvidia-'; then \
	  echo "CUDA packages came along with torch; make clean setup TORCH_INDEX=... chooses a CPU build (docs/packaging.md, Which torch)"; fi
	touch $(STAMP)

lock: setup ## renew packaging/*.lock: the newest versions of everything but torch, with hashes
	packaging/lock $(BIN)/uv packaging/requirements.lock --all-extras --group dev
	packaging/lock $(BIN)/uv packaging/service.lock $(patsubst %,--extra %,$(subst $(comma), ,$(SERVICE_EXTRAS))) --constraint packaging/requirements.lock

wheel: setup ## build a wheel in dist/, install it in an environment of its own and try it
	$(BIN)/python -m hatchling build --target wheel --directory dist
	packaging/environment build/wheel $(PYTHON) $(WHEEL) $(SERVICE_EXTRAS) "$(TORCH_INDEX)"
	cd build && wheel/bin/python ../packaging/smoke.py

sdist: setup ## build a source archive in dist/ and run tests from it (TESTS=tests: all)
	$(BIN)/python -m hatchling build --target sdist --directory dist
	rm -rf build/sdist && mkdir -p build/sdist && tar --extract --file $(SDIST) --directory build/sdist --strip-components 1
	cd build/sdist && $(abspath $(BIN))/python -m pytest -q $(TESTS)

deb: setup ## build a Debian package in dist/ (on Debian, with python3-venv)
	$(BIN)/python -m hatchling build --target wheel --directory dist
	packaging/build_deb $(WHEEL) $(VERSION) $(SERVICE_EXTRAS) "$(TORCH_INDEX)"

deb-test: deb ## install the Debian package in a Debian of its own, use it, remove it (root, mmdebstrap)
	$(BIN)/python -m pytest -m long --timeout 3600 tests/test_packages.py -k deb

container: ## build the container sortd with podman (README, Install)
	podman build --build-arg TORCH_INDEX="$(TORCH_INDEX)" --tag sortd .

container-test: setup ## build the container on a Debian made by mmdebstrap and use it (root, podman, buildah)
	$(BIN)/python -m pytest -m long --timeout 3600 tests/test_packages.py -k container

floors: setup ## run the tests with the minimum versions of pyproject.toml (FLOORS_TORCH, FLOORS_TESTS)
	packaging/floors $(BIN)/uv $(PYTHON) build/floors "$(FLOORS_TORCH)" "$(TORCH_INDEX)"
	build/floors/bin/python -m pytest --numprocesses auto --dist loadfile $(FLOORS_TESTS)

run: setup ## run the daemon on the sample data, with the model that needs no download
	$(BIN)/python Data/draw.py incoming
	$(BIN)/sortd run --config Data/sample.yaml

test: setup ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-repeat: setup ## run the tests 20 times on a bare clone, ten of them beside four busy loops (hours)
	$(BIN)/python -m tests.repeat

slow: setup ## run the tests that take long by computing: a training, an export, thousands of files
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

lint: setup ## format and types, as the tests check them; known vulnerabilities, where the database can be reached
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	-$(BIN)/python packaging/audit.py

docs: setup ## build the documentation as a site in site/, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

bench: setup ## measure: the daemon's start, latency and idling, the encoder, decoding
	$(BIN)/python -m benchmarks.daemon startup latency idle
	$(BIN)/python -m benchmarks.encoder
	$(BIN)/python -m benchmarks.decoding

faults: setup ## thousands of kills and errors at every system call of a move (needs strace)
	$(BIN)/python -m tests.faults.sweep --thin 9 --doubles 25
	$(BIN)/python -m tests.faults.sweep --action copy --thin 9 --doubles 10 --grounds memory,disk
	$(BIN)/python -m tests.faults.sweep --action hardlink --thin 7 --doubles 10 --grounds memory,disk
	$(BIN)/python -m tests.faults.sweep --action symlink --thin 7 --doubles 10 --grounds memory,disk
	$(BIN)/python -m tests.faults.sweep --action keywords --thin 19 --doubles 10 --grounds memory,disk

bulk-faults: setup ## hundreds of kills of `sortd bulk apply`, on files and on a store (needs strace)
	$(BIN)/python -m tests.faults.bulk_apply

powercuts: setup ## hundreds of power cuts on loop-mounted disks (needs root, xfsprogs)
	$(BIN)/python -m tests.faults.powercuts

mutants: setup ## take each safeguard of a move away and see a test turn red
	$(BIN)/python -m tests.faults.mutants

soak: setup ## 200,000 files from four writers while sortd is killed and started (an hour or more)
	$(BIN)/python -m tests.faults.soak

overflow: setup ## 50,000 files arrive while sortd is stopped by SIGSTOP
	$(BIN)/python -m tests.faults.overflow

hostile: setup ## images that are made to harm, and the memory that they take
	$(BIN)/python -m tests.faults.hostile

long: setup ## shorter forms of the eight runs above, and larger ones of slow tests (an hour)
	$(BIN)/python -m pytest -m long --timeout 3600

clean: ## remove the virtual environment, packages and caches; your data stays
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
