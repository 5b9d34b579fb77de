"""Run the notebooks and store their outputs in them, stamped with the code and data behind them.

In:   notebooks/*.ipynb, the modules that they import, checkpoints/demo
Out:  the same notebooks with new outputs, and a stamp in their metadata

    python tools/run_notebooks.py             all of them (make notebooks)
    python tools/run_notebooks.py 01 03       some, by the beginning of their names

The stamp is a hash of all that the outputs depend on. A test compares it with the present code, so
a notebook never shows the outputs of code that is no longer there. Comments do not count.

The repository's address stands here and nowhere else: the first code cell (SET_UP) and the link to
Colab are written into every notebook.
"""

import ast
import base64
import hashlib
import io
import re
import sys
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from genima.files import UserError, run_stage, write_whole

NOTEBOOKS = ROOT / "notebooks"
CHECKPOINT = ROOT / "checkpoints/demo"
CELL_TIMEOUT = 1800  # seconds; on two free cores the slowest cell takes about half a minute
REPOSITORY = "OWNER/nanogenima"  # on GitHub: a fork writes its own here, then `make notebooks`
BRANCH = "main"
LARGE = 180_000  # bytes of a picture
SET_UP = f"""\
# In Colab: fetch the repository, install what Colab lacks. Elsewhere: go to its folder.
import os
import sys

if "google.colab" in sys.modules and not os.path.exists("episodes.py"):
    !apt-get -qq install libegl1 libosmesa6 > /dev/null
    !git clone -q https://github.com/{REPOSITORY} nanogenima
    os.chdir("nanogenima")
    !grep -vE "^(torch|numpy|pillow|matplotlib|jupyterlab|ipykernel|nb)" \\
        requirements.txt | pip install -q -r /dev/stdin
elif not os.path.exists("episodes.py"):
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import matplotlib.pyplot as plt

%matplotlib inline
plt.style.use("notebooks/genima.mplstyle")"""


def notebook_code(notebook) -> str:
    """The code cells of a notebook as one Python text, Jupyter's ! and % lines translated."""
    transform = TransformerManager().transform_cell
    cells = [transform(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return "\n".join(cells)


def imported_names(code: str) -> Iterator[str]:
    """Every name that a Python text imports and that can be a module: `a.b` and `a.b.c` for
    `from a.b import c`.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def imported_files(code: str, root: Path = ROOT) -> list[Path]:
    """The modules below root that a Python text imports, and those that these import, sorted.

    A package stands for its __init__.py, which Python runs before any module inside it.
    """
    found = set()
    texts = [code]
    while texts:
        for name in imported_names(texts.pop()):
            parts = name.split(".")
            folders = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
            candidates = [folder / "__init__.py" for folder in folders]
            candidates.append(folders[-1].with_suffix(".py"))
            for path in candidates:
                if path.exists() and path not in found:
                    found.add(path)
                    texts.append(path.read_text())
    return sorted(found)


def without_comments(code: str) -> str:
    """A Python text without comments and empty lines: what is left decides what the code does."""
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def checkpoint_files() -> list[Path]:
    """The weights, settings and episodes of checkpoints/demo, sorted."""
    paths = []
    for part in ("act", "controlnet", "episodes", "spheres"):
        for suffix in ("safetensors", "json", "hdf5"):
            paths += (CHECKPOINT / part).rglob(f"*.{suffix}")
    return sorted(paths)


def stamp(notebook) -> str:
    """A hash of what the outputs depend on: code cells, imported modules, the packed checkpoint."""
    code = notebook_code(notebook)
    numbers = hashlib.sha256()
    for path in imported_files(code):
        numbers.update(path.relative_to(ROOT).as_posix().encode())
        numbers.update(without_comments(path.read_text()).encode())
    for path in checkpoint_files():
        numbers.update(path.relative_to(CHECKPOINT).as_posix().encode())
        numbers.update(path.read_bytes())
    numbers.update(without_comments(code).encode())
    return numbers.hexdigest()


def write_address(notebook, name: str):
    """Put the link to Colab below the title, and SET_UP into the first code cell."""
    title, code = notebook.cells[:2]
    address = f"https://colab.research.google.com/github/{REPOSITORY}/blob/{BRANCH}/notebooks"
    heading, _, text = title.source.partition("\n")
    text = re.sub(r"^\s*\[Open in Colab\]\(.*\)", "", text).lstrip()
    title.source = f"{heading}\n\n[Open in Colab]({address}/{name})\n\n{text}"
    code.source = SET_UP


def store_smaller(output):
    """Compress an output's picture as far as PNG can, without its transparency.

    A large one keeps 256 colours, chosen so that none is far off: a median cut, the default, takes
    cyan and green for one.
    """
    data = output.get("data", {})
    if "image/png" not in data:
        return
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    file = io.BytesIO()
    picture = picture.convert("RGB")
    picture.save(file, "PNG", optimize=True)
    if file.tell() > LARGE:
        file = io.BytesIO()
        few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, 1, dither=Image.Dither.NONE)
        few.save(file, "PNG", optimize=True)
    data["image/png"] = base64.b64encode(file.getvalue()).decode()


def execute(path: Path):
    """Run one notebook as Jupyter would, in its own folder, and store the outputs.

    A cell that fails raises UserError and leaves the file as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    if notebook.cells[0].cell_type == "markdown":
        write_address(notebook, path.name)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise UserError(f"{path.name} stopped with {error.ename}: {error.evalue}") from error
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars go to stderr: a page does not need them
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                store_smaller(output)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "stamp": stamp(notebook),
    }
    notebook.metadata = nbformat.from_dict(metadata)
    with write_whole(path) as temporary:
        nbformat.write(notebook, temporary)


def find_notebooks(beginnings: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of these; all of them if none is given."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    if not beginnings:
        return paths
    chosen = [path for path in paths if path.name.startswith(tuple(beginnings))]
    if not chosen:
        names = " or ".join(beginnings)
        raise UserError(f"There is no notebook in {NOTEBOOKS} whose name begins with {names}.")
    return chosen


def main():
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return
    begin = time.perf_counter()
    paths = find_notebooks(sys.argv[1:])
    for path in paths:
        start = time.perf_counter()
        print(f"{path.name} ...", end=" ", flush=True)
        execute(path)
        seconds = time.perf_counter() - start
        print(f"{seconds:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)
    print(f"{len(paths)} notebooks in {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    run_stage(main)
