# make demo: the five scripts on the embedded sample.   make test: the tests.   make setup: the environment alone.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
RUN := .venv/bin/python
DATA := data/sample
RESULTS := results/sample
# The sample's recipe; the scripts' own defaults are the published one.
RECIPE := --llm sample/qwen2 --num-queries 16 --batch-size 32 --gradient-accumulation-steps 1 --lr 2e-3 \
	--schedule cosine --warmup 0.05 --epochs 11

.PHONY: setup demo test lint clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: .venv/installed
	$(RUN) -m sample render --data $(DATA)
	$(RUN) preprocess_something_something_v2.py --data $(DATA) --splits train validation test \
		--encoder sample/vjepa2 --num-frames 8
	$(RUN) prepare_annotations.py --data $(DATA)
	$(RUN) train.py --data $(DATA) --checkpoint build/sample/checkpoint.pt --results $(RESULTS) $(RECIPE)
	$(RUN) evaluate.py --data $(DATA) --checkpoint build/sample/checkpoint.pt --results $(RESULTS) --split test \
		--actions --grounding --copy-videos
	$(RUN) infer.py --data $(DATA) --checkpoint build/sample/checkpoint.pt --results $(RESULTS) --num-samples 10 --gif --copy-videos
	@echo "Captions: $(RESULTS)/index.html   Ten clips: $(RESULTS)/inference/index.html   Scores: $(RESULTS)/evaluation.json"

test: .venv/installed-test
	.venv/bin/python -m pytest

lint: .venv/installed-test
	.venv/bin/ruff check --no-cache .
	.venv/bin/ruff format --no-cache --check .

clean:
	rm -rf build data/sample
