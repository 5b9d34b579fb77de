# make demo    sets up, then runs the whole method on the smallest rung
# make test    sets up, then runs the fast tests
# make notebooks   sets up, then runs all notebooks and stores their outputs
# Another interpreter or folder: make setup PYTHON=python3.12, make demo RUN=runs/mine

PYTHON = python3
RUN = runs/demo
PY = .venv/bin/python
APT_GET = test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y
CAN_DRAW = $(PYTHON) -c 'from ctypes.util import find_library as f; exit(not (f("EGL") and f("GL") or f("OSMesa")))'

# On Linux the plain PyTorch brings gigabytes of CUDA. uv knows where the CPU build lives, and which build suits a GPU's driver.
TORCH = $(shell grep -o '^torch==[0-9.]*' requirements.txt)
TORCH_BACKEND = $(if $(shell command -v nvidia-smi 2>/dev/null),auto,cpu)
UV = UV_HTTP_TIMEOUT=20 UV_HTTP_RETRIES=1 .venv/bin/uv

.PHONY: setup demo test test-slow notebooks clean

# the virtual environment with everything in requirements.txt
setup: .venv/.installed

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "nanoGENIMA needs Python 3.10 or newer: install one and run make setup PYTHON=/path/to/it."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(APT_GET) python3-venv; } >/dev/null 2>&1 || \
		{ echo "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)."; exit 1; }
ifeq ($(shell uname),Linux)
	@$(CAN_DRAW) || { $(APT_GET) libegl1 libgl1; $(APT_GET) libosmesa6; } >/dev/null 2>&1; $(CAN_DRAW) || \
		{ echo "No library to draw with: install EGL or OSMesa (Debian, Ubuntu: apt-get install libegl1 libgl1 libosmesa6)."; exit 1; }
endif
	$(PYTHON) -m venv .venv
	@# the pip that comes with Python 3.10 searches for minutes through the versions of `pin`
	$(PY) -m pip install -q pip==26.3
ifeq ($(shell uname),Linux)
	@$(PY) -m pip install -q uv==0.13.9 && $(UV) pip install -q --python $(PY) --torch-backend=$(TORCH_BACKEND) $(TORCH) 2>/dev/null || \
		echo "uv cannot fetch the $(TORCH_BACKEND) build of PyTorch here: pip takes the one it finds."
endif
	$(PY) -m pip install -q -r requirements.txt
	@touch $@

# the five stages, one after the other, on any laptop
demo: setup
	$(PY) collect_demos.py --run $(RUN)
	$(PY) render_spheres.py --run $(RUN) --preview
	$(PY) train_controlnet.py --run $(RUN)
	$(PY) train_act.py --run $(RUN)
	$(PY) evaluate.py --run $(RUN)

# what should pass after every change
test: setup
	$(PY) -m pytest -q tests -m "not slow"

# the tests that train or drive for minutes
test-slow: setup
	$(PY) -m pytest -q tests -m slow

# all notebooks, their outputs stored in them
notebooks: setup
	$(PY) notebooks/execute.py

# what the targets above made; other runs stay
clean:
	rm -rf .venv .pytest_cache runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
