"""The notebooks run, and as files: short cells, three exercises, small pictures, and outputs that belong to the present code."""

import ast
import base64
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from run_notebooks import execute, imported_files, python_of, stamp, without_comments

NAMES = ["00_genima_in_ten_minutes", "01_joints_to_spheres", "02_controlnet_paints_targets", "03_act_follows_spheres",
         "04_closed_loop", "05_real_robot"]  # fmt: skip


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    """Every output that is stored: its mime type and its bytes, pictures decoded."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                yield (
                    kind,
                    base64.b64decode(data) if kind.startswith("image/") else str(data).encode(),
                )


@pytest.mark.parametrize("name", NAMES)
def test_outputs_belong_to_the_present_code(name):
    """When this fails: make notebooks, look at the pictures, commit."""
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), (
        "not run once from top to bottom"
    )
    assert notebook.metadata.get("stamp") == stamp(notebook), (
        "code, or the files in checkpoints/demo, changed: run make notebooks"
    )


@pytest.mark.parametrize("name", NAMES)
def test_reads_well_on_a_page(name):
    notebook = read(name)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for output in stored
    )
    pictures = [data for kind, data in outputs(notebook) if kind.startswith("image/")]
    assert len(pictures) >= 4
    assert max(map(len, pictures)) < 200_000
    assert all(
        len(data) < 300_000 for kind, data in outputs(notebook) if kind == "text/html"
    )  # a film
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_holds_no_model_data_or_geometry_of_its_own(name):
    notebook = read(name)
    tree = ast.parse(python_of(notebook))
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 36, cell.source.splitlines()[0]
            assert max(map(len, cell.source.splitlines())) <= 150
    imported = {path.stem for path in imported_files(python_of(notebook))}
    assert len(imported) >= 2, "calls the scripts' functions"
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"Module", "Linear", "Conv2d", "Dataset", "DataLoader"}


@pytest.mark.parametrize("name", NAMES)
def test_teaches(name):
    notebook = read(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert (
        notebook.cells[0].source.startswith(f"# {int(name[:2])} · ")
        and "You will see" in notebook.cells[0].source
    )
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert (
        "google.colab" in setup.source and "requirements.txt" in setup.source and not setup.outputs
    )
    exercises = notebook.cells[-1].source.split("## Exercises")[1]
    assert [line[:3] for line in exercises.splitlines() if line[:1].isdigit()] == [
        "1. ",
        "2. ",
        "3. ",
    ]
    assert exercises.count("*Hint: ") == 3 and "Fork the script" in exercises
    for script in set(re.findall(r"`(\w+)\.py`", text)):  # no file is named that does not exist
        assert (
            (ROOT / f"{script}.py").exists()
            or f"to `{script}.py`" in text
            or f"`{script}.py` to" in text
        ), script


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    """On a copy; each within two minutes on a quiet machine."""
    copy = Path(shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", tmp_path))
    execute(copy)
    stored, ran = read(name), nbformat.read(copy, as_version=4)
    for before, after in zip(
        stored.cells, ran.cells, strict=True
    ):  # the same kinds of output: text (in however many pieces), picture, film
        kinds = [
            {(output.output_type, *output.get("data", {})) for output in cell.get("outputs", [])}
            for cell in (before, after)
        ]
        assert kinds[0] == kinds[1], before.source.splitlines()[0]


def test_all_are_one_set():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES
    setups = {
        next(cell for cell in read(name).cells if cell.cell_type == "code").source for name in NAMES
    }
    assert len(setups) == 1


def test_the_stamp_sees_code_and_not_comments(tmp_path):
    assert without_comments("a = 1  # one\n\n# two\nb = '# three'\n") == "a = 1\nb = '# three'"
    files = {
        path.name for path in imported_files("from sims.mujoco_panda import PandaEnv\nimport numpy")
    }
    assert files == {"mujoco_panda.py", "mujoco_tasks.py", "episodes.py"}
    notebook = read(NAMES[1])
    before = stamp(notebook)
    notebook.cells[1].source += "\n\n# a comment"
    assert stamp(notebook) == before
    notebook.cells[1].source += "\nx = 1"
    assert stamp(notebook) != before


def test_a_failing_cell_is_one_sentence_and_leaves_the_file(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    path = tmp_path / "broken.ipynb"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    from genima.files import UserError

    with pytest.raises(
        UserError, match="broken.ipynb stopped with ZeroDivisionError: division by zero"
    ):
        execute(path)
    assert path.read_bytes() == before


def test_the_checkpoint_is_small_whole_and_documented():
    from genima.act import Controller
    from genima.episodes import find_episodes, read_episode
    from genima.painter import Painter

    folder = ROOT / "checkpoints/demo"
    assert (
        sum(
            path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and "robot" not in path.parts
        )
        <= 40e6
    )
    assert not [*folder.rglob("*.pt"), *folder.rglob("*.pkl"), *folder.rglob("*.bin")]
    Painter.load(folder / "controlnet"), Controller.load(folder / "act")
    assert {read_episode(path).task for path in find_episodes(folder / "episodes")} == {
        "reach_target",
        "push_button",
        "pick_and_lift",
    }
    assert "python checkpoints/pack.py" in (folder / "README.md").read_text()
