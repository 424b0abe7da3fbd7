# The project's commands; continuous integration uses the same.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --disable-pip-version-check --constraint constraints.txt
DATA ?= data
CONFIG ?= training/configs/mnist.toml
DOCS := .venv-docs
MERMAID := 12.3.0

.PHONY: setup serve train test client-test browser-test container-test ray-test docs docs-test lint bench bench-against bench-bulk bench-capacity bench-overhead bench-sizes bench-photographs bench-roofline bench-training bench-beside house attack fuzz soak clean

serve: $(VENV)/.serve
	$(PYTHON) -m service

setup: $(VENV)/.test

train: $(VENV)/.test
	$(PYTHON) -m training fit $(CONFIG) --data $(DATA) --out models

test: lint
	$(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

client-test: $(VENV)/.test
	$(PYTHON) -m pytest -m clients tests/clients tests/client

# The page in Chromium; PICTURES=docs/pictures draws those of the documentation anew.
browser-test: $(VENV)/.test
	BROWSER_PICTURES=$(PICTURES) $(PYTHON) -m pytest -m browser tests/browser

container-test: $(VENV)/.test
	$(PYTHON) -m pytest -m container tests/container

# The documentation as one site, in .site/html; `python3 -m http.server -d .site/html` shows it.
docs: $(DOCS)/.ready
	$(DOCS)/bin/python docs/build.py

# Everything that needs Ray, in an environment of its own below .bench/; a Ray of this machine starts and ends with it.
ray-test: $(VENV)/.test
	$(PYTHON) -m pytest -m ray tests/ray

docs-test: $(VENV)/.test
	$(PYTHON) -m pytest -m site tests/site

lint: $(VENV)/.test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Beside other servers, in about 80 minutes: docs/results/serving.md. RESUME=1 continues after the last complete round.
bench: $(VENV)/.test
	$(PYTHON) -m benchmarks.serving $(if $(RESUME),--resume)

# Compares this working tree with the commit REF, both with this environment's packages.
bench-against: $(VENV)/.test
	$(PYTHON) -m benchmarks.against $(REF) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(LOADS),--loads $(LOADS))

# Rows a second of vae-bulk beside onnxruntime alone, without Ray and on it: docs/results/bulk.md.
bench-bulk: $(VENV)/.test
	$(PYTHON) -m benchmarks.bulk --data $(DATA) $(if $(ROUNDS),--rounds $(ROUNDS))

bench-sizes: $(VENV)/.test
	$(PYTHON) -m benchmarks.sizes $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS))

# Seconds, memory and megapixels a second of restored photographs: tables of docs/results/photographs.md. PARTS names some.
bench-photographs: $(VENV)/.test
	$(PYTHON) -m benchmarks.photographs $(if $(MODEL),--model $(MODEL)) $(if $(PARTS),--parts $(PARTS))

# How near to the limits of one core onnxruntime and the service are: docs/results/roofline.md.
bench-roofline: $(VENV)/.test
	$(PYTHON) -m benchmarks.roofline $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS))

bench-training: $(VENV)/.test
	$(PYTHON) -m benchmarks.training $(if $(wildcard $(DATA)/mnist),--data $(DATA))

bench-beside: $(VENV)/.test
	$(PYTHON) -m benchmarks.beside

bench-overhead: $(VENV)/.test
	$(PYTHON) -m benchmarks.overhead

# Predicted against measured throughput and latency of 1, 2 and 4 replicas, in about five minutes: docs/results/capacity.md.
bench-capacity: $(VENV)/.test
	$(PYTHON) -m benchmarks.capacity measure $(if $(SECONDS),--seconds $(SECONDS))

# Size and shape of the source tree, each figure beside its aim; nothing fails.
house: $(VENV)/.test
	$(PYTHON) -m benchmarks.house

attack: $(VENV)/.test
	$(PYTHON) -m benchmarks.attack $(if $(WORKERS),--workers $(WORKERS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(ATTACKS),--attacks '$(ATTACKS)') $(if $(OUT),--out $(OUT))

# Fuzzes every reader for FUZZ_S seconds, then sends generated requests from the OpenAPI document; a new seed each time.
FUZZ_S ?= 300
fuzz: $(VENV)/.test
	@for target in json npy raw image multipart urlencoded inference query manifest; do \
	  mkdir -p .fuzz/$$target && \
	  $(PYTHON) -m tests.fuzz.harness $$target .fuzz/$$target -max_total_time=$(FUZZ_S) -max_len=8192 -timeout=30 \
	    -rss_limit_mb=1024 -artifact_prefix=.fuzz/$$target- || exit 1; \
	done
	FUZZ_EXAMPLES=200 FUZZ_SEED=$$(date +%s) $(PYTHON) -m pytest tests/fuzz/test_openapi.py

soak: $(VENV)/.test
	$(PYTHON) -m benchmarks.soak $(if $(MINUTES),--minutes $(MINUTES))

clean:
	rm -rf $(VENV) $(DOCS) .site .fuzz .mypy_cache .ruff_cache .pytest_cache

# Make creates the environment once, and installs again only when pyproject.toml or constraints.txt changes.
$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: pyproject.toml client/pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[train,test]' --editable './client[all]'
	@touch $@ $(VENV)/.serve

# What builds the site, and the script that draws its diagrams.
$(DOCS)/.ready: docs/requirements.txt Makefile
	python3 -m venv $(DOCS)
	$(DOCS)/bin/pip install --disable-pip-version-check --requirement docs/requirements.txt
	npm pack --silent --pack-destination $(DOCS) mermaid@$(MERMAID) >/dev/null
	tar -xzf $(DOCS)/mermaid-$(MERMAID).tgz -C $(DOCS) package/dist/mermaid.min.js
	rm $(DOCS)/mermaid-$(MERMAID).tgz
	@touch $@
