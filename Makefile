# make demo: train both stages on the built-in shapes, sample, interpolate and judge; everything lands in out/demo/
# make test: run the tests.      Both first make a virtual environment with the requirements.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/python demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q tests

lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) out runs
