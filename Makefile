# make demo: train both stages on the built-in shapes, sample, interpolate and judge; everything lands in out/demo/
# make test: run the tests; nothing is downloaded
# make test-weights: fetch the pretrained weights (111 MB, once) and run the tests that take them
# Each first makes a virtual environment with the requirements.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test weights test-weights lint clean

demo: $(VENV)/.installed
	$(BIN)/python demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2 -m "not weights" tests

weights: $(VENV)/.installed
	$(BIN)/python fvd.py --get-weights

test-weights: weights
	$(BIN)/python -m pytest -q -m weights tests

lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) out runs
