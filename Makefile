# make demo    the whole pipeline on the demo data, in an environment of its own
# make test    everything that must hold before a commit
# make readme  README.md from nbs/index.ipynb
# make slides  the lecture as one page of slides: site/lecture.html
# make outputs execute every chapter on the demo, and keep in its file what its cells have shown
# make site    all chapters, results, how-to pages and the reference as pages: site/index.html
# make screens what a browser shows of the demo and the site, as pictures: figures/screens, and runs/screens
# make mutants plant faults in the modules that compute and count those that tests and chapters notice (an hour or two)
# make busy    the demo on idle cores and beside busy processes, timed and compared (ten minutes or more)
# make gpu     what a GPU has to show, in parts, with the torch of the machine (eight minutes; docs/gpu.md: MODELS, DATA, STUDY)
# make soak    kill the demo again and again, and compare what it ends with with a run left alone (an hour or two; SMALL=1: less)
# Needs Python 3.11 or later; another interpreter: make demo PYTHON=/path/to/python

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
META := settings.ini setup.py .ci/constraints.txt # not pyproject.toml, which nbdev-export writes anew each time
README := $(BIN)/jupyter nbconvert --log-level=ERROR --to markdown --RegexRemovePreprocessor.patterns='\#\|\s*hide' --output-dir=. --output=README nbs/index.ipynb

# $(call same,COMMAND) runs a command that should find nothing to do, and fails if a file has changed.
STATE := find nbs ganprompt README.md -type f ! -path '*/.*' ! -path '*/__pycache__/*' -exec cksum {} + | sort
same = @echo "$(firstword $(notdir $(1)))"; before=$$($(STATE)); $(1) >/dev/null || exit 1; after=$$($(STATE)); \
	[ "$$before" = "$$after" ] || { echo "out of sync, and now corrected; look at the difference and commit it"; exit 1; }

# Chapters and tests run side by side, each on half of the cores; the chapters, which end first, take the tests LATE
# along. A run that these and the others both need is made once, in a folder that they share.
HALF := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 1 ? n/2 : 1)))
LATE := tests/test_processes.py tests/test_beside.py tests/test_gpu.py tests/test_board.py tests/test_wheel.py

.PHONY: demo test chapters tests readme outputs slides site screens mutants busy soak gpu
demo: .venv/.demo-stamp
	$(BIN)/ganprompt run

test: .venv/.dev-stamp
	$(call same,$(BIN)/nbdev-export)
	$(call same,$(BIN)/nbdev-clean)
	$(call same,$(README))
	$(BIN)/ruff check .
	home=$$(mktemp -d); trap "rm -r $$home" EXIT; \
		TESTS_SHARE=$$home OMP_NUM_THREADS=$(HALF) $(MAKE) -j2 chapters tests

chapters:
	$(BIN)/nbdev-test --n-workers 1 --do-print --cell-timeout 3600
	$(BIN)/pytest --durations=12 $(LATE)

tests:
	$(BIN)/pytest --durations=25 $(LATE:%=--ignore=%)

readme: .venv/.dev-stamp
	$(README)

slides: .venv/.demo-stamp
	$(BIN)/python -c "from ganprompt.site import make_slides; print(make_slides())"

outputs: .venv/.dev-stamp
	$(BIN)/ganprompt run
	$(BIN)/python -c "from ganprompt.outputs import make_outputs; make_outputs()"
	$(BIN)/nbdev-clean

site: .venv/.dev-stamp
	$(BIN)/python -c "from ganprompt.site import make_site; print(make_site())"

screens: site
	$(BIN)/ganprompt run
	$(BIN)/pytest -q tests/screens.py

mutants: .venv/.dev-stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

busy: .venv/.demo-stamp
	$(BIN)/python tests/busy.py

# In no environment of its own: the machine's torch is the one that knows its GPU
MINUTES ?= 8
gpu:
ifdef STUDY
	PYTHONPATH=. GANPROMPT_REAL=$(MODELS) $(PYTHON) -c "from ganprompt.cli import main; main()" tables $(STUDY) \
		--data-dir "$(DATA)" --minutes $(MINUTES) $(GPU)
else
	PYTHONPATH=. $(PYTHON) -c "from ganprompt.gpu import gpu_command; gpu_command()" --minutes $(MINUTES) \
		$(if $(MODELS),--models $(MODELS)) $(if $(DATA),--data $(DATA)) $(GPU)
endif

soak: .venv/.dev-stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --out runs/soak $(if $(SMALL),--small) $(SOAK)

.venv/.demo-stamp: $(META)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c .ci/constraints.txt -e .
	@touch $@

.venv/.dev-stamp: .venv/.demo-stamp
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[dev,baselines,test]'
	@mkdir -p .venv/etc/jupyter && cp .ci/jupyter_server_config.json .venv/etc/jupyter # a chapter is cleaned as it is saved; no news
	@touch $@
