# make try         sets up; the shipped checkpoint drives the robot and leaves a film
# make demo        sets up, then runs the whole method on the smallest rung
# make base        sets up, then makes the painter and the controller that make demo starts from
# make scratch     as make demo, but from random weights and with 2,700 demonstrations
# make test        sets up, then runs lint and the fast tests
# make notebooks   sets up, then runs all notebooks and stores their outputs
# Another interpreter or folder: make setup PYTHON=python3.12, make demo RUN=runs/mine DEMOS=20

PYTHON = python3
RUN = runs/demo
DEMOS = 50
PY = .venv/bin/python
RUFF = .venv/bin/ruff

APT_GET = test "$$(id -u)" = 0 && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y
CAN_DRAW = $(PYTHON) -c 'from ctypes.util import find_library as find; \
	exit(not (find("EGL") and find("GL") or find("OSMesa")))'

# On Linux the plain PyTorch brings gigabytes of CUDA. uv knows where the CPU build is, and which
# build suits a GPU's driver.
TORCH = $(shell grep -o '^torch==[0-9.]*' requirements.txt)
TORCH_BACKEND = $(if $(shell command -v nvidia-smi 2>/dev/null),auto,cpu)
UV = UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 .venv/bin/uv
INSTALL_TORCH = $(UV) pip install -q --python $(PY) --torch-backend=$(TORCH_BACKEND) $(TORCH)

OLD_PYTHON = nanoGENIMA needs Python 3.10 or newer: install it, then make setup PYTHON=/path/to/it.
NO_VENV = Python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv).
NO_DRAWING = No library to draw with: install EGL or OSMesa \
	(Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6).
NO_UV = uv cannot fetch the $(TORCH_BACKEND) build of PyTorch here: pip takes the one it finds.

.PHONY: setup try demo base scratch lint format test test-slow notebooks clean

# the virtual environment with everything in requirements.txt
setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(OLD_PYTHON)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ $(APT_GET) python3-venv; } >/dev/null 2>&1 || { echo "$(NO_VENV)"; exit 1; }
ifeq ($(shell uname),Linux)
	@$(CAN_DRAW) || { $(APT_GET) libegl1 libgl1; $(APT_GET) libosmesa6; } >/dev/null 2>&1; \
		$(CAN_DRAW) || { echo "$(NO_DRAWING)"; exit 1; }
endif
	$(PYTHON) -m venv .venv
	@# the pip that comes with Python 3.10 searches for minutes through the versions of `pin`
	$(PY) -m pip install -q pip==26.3
ifeq ($(shell uname),Linux)
	@$(PY) -m pip install -q uv==0.13.9 && $(INSTALL_TORCH) 2>/dev/null || echo "$(NO_UV)"
endif
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

# the shipped checkpoint at work: two episodes of each of its tasks
try: setup
	$(PY) evaluate.py --run checkpoints/demo --episodes 2 --language 0 --videos 2 --out runs/try
	@echo "Films: $$(echo runs/try/*_people.mp4)"

# the five stages, one after the other, on any laptop; DEMOS demonstrations of each task
demo: setup
	$(PY) collect_demos.py --run $(RUN) --demos $(DEMOS)
	$(PY) render_spheres.py --run $(RUN) --preview
	$(PY) pretrain_painter.py --out runs/scenes --scenes 1500 --steps 0
	$(PY) train_controlnet.py --run $(RUN) --rehearse runs/scenes --backgrounds
	$(PY) train_act.py --run $(RUN)
	$(PY) evaluate.py --run $(RUN)

# the base, from nothing: a painter of random scenes, and a controller of random motions
base: setup
	$(PY) pretrain_painter.py --out runs/base-1
	$(PY) pretrain_painter.py --base runs/base-1 --out runs/base-2 --seed 1 \
		--first-scene 100000 --scenes 16000 --steps 1000 --learning-rate 5e-4
	$(PY) pretrain_painter.py --base runs/base-2 --out runs/base-3 --seed 2 \
		--first-scene 200000 --scenes 16000 --steps 1200 --learning-rate 5e-4
	$(PY) pretrain_painter.py --base runs/base-3 --out runs/base --seed 3 \
		--first-scene 300000 --scenes 60000 --steps 2007 --batch-size 256
	$(PY) collect_demos.py --run runs/motions --tasks move_around --demos 800
	$(PY) render_spheres.py --run runs/motions
	$(PY) train_act.py --run runs/motions --base none --steps 4000 --batch-size 64

# the five stages without the base: every object of 300 scenes, and eight times the training
scratch: setup
	$(PY) collect_demos.py --run runs/scratch --scenes 300
	$(PY) render_spheres.py --run runs/scratch --preview
	$(PY) train_controlnet.py --run runs/scratch --base none
	$(PY) train_act.py --run runs/scratch --base none
	$(PY) evaluate.py --run runs/scratch

# faults and layout of every Python file; changes nothing
lint: setup
	@$(RUFF) check . || \
		{ echo "Lint: ruff check found the faults above. Some of them: make format."; exit 1; }
	@$(RUFF) format --check . || \
		{ echo "Lint: the files above are not laid out by ruff format: make format."; exit 1; }
	@echo "Lint: no faults."

# mends what ruff can mend
format: setup
	$(RUFF) check --fix .
	$(RUFF) format .

# what should pass after every change
test: setup lint
	$(PY) -m pytest -q tests -m "not slow"

# the tests that train or drive for minutes
test-slow: setup
	$(PY) -m pytest -q tests -m slow

# all notebooks, their outputs stored in them
notebooks: setup
	$(PY) tools/run_notebooks.py

# what setup and test made; runs/ stays, with everything that was recorded
clean:
	rm -rf .venv .pytest_cache .ruff_cache
	find . -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
