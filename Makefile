# make setup | run | refresh | student | site | test | fast | harness | lab | lint | lock | newest
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
NOTEBOOKS = $(wildcard notebooks/*.ipynb notebooks/extra/*.ipynb)

.PHONY: setup run refresh student site test fast harness lab lint lock newest chromium

setup: $(VENV)/installed

# Made again only when the lock or the package's own settings change.
$(VENV)/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# Executed copies land in outputs/; the sources stay as they are.
run: setup
	$(BIN)/python tools/refresh.py --copies $(NOTEBOOKS)

# Executes the notebooks and writes them in place, with what they print and draw: what is committed.
# Some of them: make refresh NOTEBOOKS=notebooks/01_setup.ipynb (06 and the extras go on
# from the run of 03: name 03 with them, or they make a short run).
refresh: setup
	$(BIN)/python tools/refresh.py $(NOTEBOOKS)

# The notebooks without outputs and without solutions, for learners, in outputs/student/.
student: setup
	$(BIN)/python tools/student.py

# The course as pages that need no network: outputs/site/index.html.
site: setup
	$(BIN)/python tools/pages.py

# The browser for tests/test_jupyterlab.py and test_course.py, which are skipped without it (in CI they fail).
chromium:
	@command -v chromium >/dev/null || { \
	  test "$$(id -u)" = 0 || sudo="sudo -n"; \
	  $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends chromium; \
	} || echo "Chromium could not be installed."

# The notebooks get an output folder of their own, so that they train and do not load an earlier run.
test: setup chromium
	$(BIN)/python -m pytest --cov=helpers --durations=12
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  DPO_OUTPUT_DIR="$$folder" $(BIN)/python -m pytest --nbmake --timeout=3600 --nbmake-timeout=3600 --durations=0 notebooks

# Every helper without a training run, in two processes. nbmake, which this needs not, takes four seconds to load.
fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -p no:nbmake -n 2 --dist worksteal

# lm-evaluation-harness in an environment of its own, which sees the packages of .venv, and the test that needs it.
SITE = -c "import sysconfig; print(sysconfig.get_path('purelib'))"
harness: setup
	$(BIN)/python -m venv outputs/harness
	$(BIN)/python $(SITE) > "$$(outputs/harness/bin/python $(SITE))/venv.pth"
	outputs/harness/bin/python -m pip install --quiet --disable-pip-version-check lm_eval==0.4.13
	LM_EVAL_PYTHON=outputs/harness/bin/python $(BIN)/python -m pytest tests/after/test_retention.py -k harness

lab: setup
	$(BIN)/jupyter lab notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --output-format concise --error-on-warning

lock:
	test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv pip compile requirements.in --override requirements.overrides --python-version 3.11 --quiet \
	  --no-emit-index-url --no-header --no-annotate --generate-hashes --output-file requirements.lock

# What the newest versions break: an environment of their own in outputs/, the state of each patch, the fast tests, one
# short training.
newest: setup
	mkdir -p outputs/newest
	sed 's/==.*//' requirements.in > outputs/newest/requirements.in
	$(BIN)/uv pip compile outputs/newest/requirements.in --override requirements.overrides --upgrade --quiet \
	  --no-emit-index-url --no-header --no-annotate --output-file outputs/newest/requirements.txt
	@echo "Locked (<) and newest (>):"
	@grep -o '^[a-z0-9_.-]*==[^ ]*' requirements.lock | diff - outputs/newest/requirements.txt | grep '^[<>]' || echo "no difference"
	$(PYTHON) -m venv --clear outputs/newest/venv
	$(BIN)/uv pip install --quiet --python outputs/newest/venv/bin/python --no-deps -r outputs/newest/requirements.txt
	-outputs/newest/venv/bin/python -m helpers.patches
	outputs/newest/venv/bin/python -m pytest -m "not slow"
	outputs/newest/venv/bin/python -m pytest tests/test_way.py tests/train/test_rows.py
	outputs/newest/venv/bin/python -m pytest tests/train/test_dpo.py -k run_folder_is_complete
