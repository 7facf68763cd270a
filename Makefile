# make demo: the five scripts on the embedded sample.   make test: the tests.   make setup: the environment alone.
# make results: the committed results/sample again.     make clean: away with all that the demo made.

PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check
RUN := .venv/bin/python
DATA := data/sample
CHECKPOINT := build/sample/checkpoint.pt
RESULTS := build/sample/results
# The sample's recipe; the scripts' own defaults are the published one.
RECIPE := --llm sample/qwen2 --num-queries 16 --batch-size 32 --gradient-accumulation-steps 1 --lr 2e-3 \
	--schedule cosine --warmup 0.05 --epochs 11
WITH := --data $(DATA) --checkpoint $(CHECKPOINT)
EVALUATE := $(RUN) evaluate.py $(WITH) --split test --actions --grounding --attention 30 --copy-videos
INFER := $(RUN) infer.py $(WITH) --num-samples 10 --gif --attention --copy-videos

.PHONY: setup demo results test lint clean

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
	$(RUN) train.py $(WITH) --results $(RESULTS) $(RECIPE)
	$(EVALUATE) --results $(RESULTS)
	$(INFER) --results $(RESULTS)
	@echo "Captions: $(RESULTS)/index.html   Ten clips: $(RESULTS)/inference/index.html   Scores: $(RESULTS)/evaluation.json"

$(RESULTS)/losses.png:
	$(MAKE) demo

results: $(RESULTS)/losses.png
	$(EVALUATE) --results results/sample
	$(INFER) --results results/sample
	cp $(RESULTS)/losses.png results/sample/

test: .venv/installed-test
	.venv/bin/python -m pytest

lint: .venv/installed-test
	.venv/bin/ruff check --no-cache .
	.venv/bin/ruff format --no-cache --check .

clean:
	rm -rf build data/sample
