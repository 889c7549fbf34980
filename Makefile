# make demo: train both stages on the built-in shapes, sample, interpolate and evaluate; everything lands in out/demo/
# make test: run the tests; nothing is downloaded
# make sample: generate every class from the checkpoint that comes with the repository, before any training
# make test-page: the page's tests, in Chromium where there is one
# make test-weights: fetch the pretrained weights (111 MB, once) and run the tests that take them
# Each first makes a virtual environment with the requirements.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo sample test test-page weights test-weights lint clean

demo: $(VENV)/.installed
	$(BIN)/python demo.py

sample: $(VENV)/.installed
	$(BIN)/python sample.py --ckpt docs/live/shapes.pt --guidance 1

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "not weights and not browser" tests

test-page: $(VENV)/.installed
	-$(BIN)/python -m pip install -q playwright wasmtime
	$(BIN)/python -m pytest -q -rs tests/test_page.py

weights: $(VENV)/.installed
	$(BIN)/python fvd.py --get-weights

test-weights: weights
	$(BIN)/python -m pytest -q -m weights tests

lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q ruff codespell
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/codespell -L ans,caf $$(git ls-files '*.py' '*.md' '*.js' '*.toml' '*.txt' '*.csv' Makefile)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) out runs
