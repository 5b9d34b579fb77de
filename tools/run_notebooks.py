"""Run the notebooks and store their outputs in them, stamped with the code and data they came from.

python notebooks/execute.py                  all of them (make notebooks)
python notebooks/execute.py 01 03            some, by the beginning of their names
"""

import ast
import hashlib
import io
import sys
import time
import tokenize
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
ROOT = FOLDER.parent
LONGEST = 1800  # seconds for one cell, on however busy a machine; on two quiet cores the slowest takes about half a minute

sys.path.insert(0, str(ROOT))
from genima.files import UserError, run_stage, write_whole


def python_of(notebook):
    """The code cells as one Python text, Jupyter's ! and % lines translated."""
    transform = TransformerManager().transform_cell
    return "\n".join(transform(cell.source) for cell in notebook.cells if cell.cell_type == "code")


def imported_files(code):
    """The repository's modules that a Python text imports, and those that these import, sorted."""
    found, open_texts = set(), [code]
    while open_texts:
        for node in ast.walk(ast.parse(open_texts.pop())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
                path = ROOT / f"{(name or '').replace('.', '/')}.py"
                if path.exists() and path not in found:
                    found.add(path)
                    open_texts.append(path.read_text())
    return sorted(found)


def without_comments(text):
    """A Python text without comments and empty lines: what is left decides what the code does."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def stamp(notebook):
    """A hash of what the outputs depend on: the code cells, the modules they use, and the files under checkpoints/demo."""
    code, numbers = python_of(notebook), hashlib.sha256()
    for path in imported_files(code):
        numbers.update(path.name.encode() + without_comments(path.read_text()).encode())
    data = ROOT / "checkpoints/demo"
    for path in sorted(
        path
        for part in ("act", "controlnet", "episodes", "spheres")
        for path in (data / part).rglob("*")
    ):
        if path.suffix in (".safetensors", ".json", ".hdf5"):
            numbers.update(path.relative_to(data).as_posix().encode() + path.read_bytes())
    return hashlib.sha256(numbers.digest() + without_comments(code).encode()).hexdigest()


def execute(path):
    """Run one notebook as Jupyter would, in its own folder, and store the outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=LONGEST, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False,
                            extra_arguments=["--IPKernelApp.log_level=ERROR"])  # fmt: skip
    try:
        client.execute()
    except CellExecutionError as error:
        raise UserError(f"{path.name} stopped with {error.ename}: {error.evalue}") from error
    for cell in notebook.cells:  # progress bars are for the one who waits
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}, "stamp": stamp(notebook)})  # fmt: skip
    with write_whole(path) as temporary:
        nbformat.write(notebook, temporary)


def main():
    wanted = sys.argv[1:] or [""]
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(wanted))]
    if not paths:
        raise UserError(
            f"There is no notebook in {FOLDER} whose name begins with {' or '.join(wanted)}."
        )
    begin = time.perf_counter()
    for path in paths:
        start = time.perf_counter()
        print(f"{path.name} ...", end=" ", flush=True)
        execute(path)
        print(
            f"{time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True
        )
    print(f"{len(paths)} notebooks in {time.perf_counter() - begin:.0f} s.")


if __name__ == "__main__":
    run_stage(main)
