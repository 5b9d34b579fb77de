"""The notebooks run; and as files: short cells, three exercises with solutions, small pictures, and
outputs that belong to the present code.
"""

import ast
import base64
import io
import re
import shutil

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from genima.files import UserError
from tools.run_notebooks import (
    REPOSITORY,
    SET_UP,
    execute,
    find_notebooks,
    imported_files,
    notebook_code,
    stamp,
    store_smaller,
    without_comments,
    write_address,
)

NAMES = [
    "00_genima_in_ten_minutes",
    "01_joints_to_spheres",
    "02_controlnet_paints_targets",
    "03_act_follows_spheres",
    "04_closed_loop",
    "05_real_robot",
]


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stored_outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def stored_data(notebook):
    """Every piece of output data that is stored: its mime type and its bytes, pictures decoded."""
    for output in stored_outputs(notebook):
        for kind, data in output.get("data", {}).items():
            if kind.startswith("image/"):
                yield kind, base64.b64decode(data)
            else:
                yield kind, str(data).encode()


def output_kinds(cell):
    """The kinds of a cell's outputs: text (in however many pieces), picture, film."""
    return {(output.output_type, *output.get("data", {})) for output in cell.get("outputs", [])}


@pytest.mark.parametrize("name", NAMES)
def test_outputs_belong_to_the_present_code(name):
    """When this fails: make notebooks, look at the pictures, commit."""
    notebook = read(name)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "not run once from top to bottom"
    assert notebook.metadata.get("stamp") == stamp(notebook), (
        "code, or the files in checkpoints/demo, changed: run make notebooks"
    )


@pytest.mark.parametrize("name", NAMES)
def test_reads_well_on_a_page(name):
    notebook = read(name)
    for output in stored_outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    pictures = [data for kind, data in stored_data(notebook) if kind.startswith("image/")]
    assert len(pictures) >= 4
    assert max(map(len, pictures)) < 200_000
    for kind, data in stored_data(notebook):
        if kind == "text/html":  # a film
            assert len(data) < 300_000
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_opens_with_what_you_will_see(name):
    """Before the first section there is a figure or a film."""
    kinds = set()
    for cell in read(name).cells:
        if "\n## " in f"\n{cell.source}":
            break
        for output in cell.get("outputs", []):
            kinds |= set(output.get("data", {}))
    assert kinds & {"image/png", "text/html"}


@pytest.mark.parametrize("name", [NAMES[0], *NAMES[3:]])
def test_has_a_film(name):
    assert "text/html" in {kind for kind, _ in stored_data(read(name))}


@pytest.mark.parametrize("name", NAMES)
def test_holds_no_model_data_or_geometry_of_its_own(name):
    notebook = read(name)
    tree = ast.parse(notebook_code(notebook))
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [node for node in ast.walk(tree) if isinstance(node, definitions)]
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= 36, lines[0]
        assert max(map(len, lines)) < 90, max(lines, key=len)
    imported = imported_files(notebook_code(notebook))
    assert len({path.stem for path in imported} - {"__init__"}) >= 2, "calls the scripts' functions"
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"Module", "Linear", "Conv2d", "Dataset", "DataLoader"}


@pytest.mark.parametrize("name", NAMES)
def test_teaches(name):
    notebook = read(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    first = notebook.cells[0].source
    assert first.startswith(f"# {int(name[:2])} · ")
    assert "You will see" in first
    setup = code_cells(notebook)[0]
    assert "google.colab" in setup.source
    assert "requirements.txt" in setup.source
    assert not setup.outputs
    assert f"solutions/{name[:2]}.md" in text
    exercises = notebook.cells[-1].source.split("## Exercises")[1]
    numbers = [line[:3] for line in exercises.splitlines() if line[:1].isdigit()]
    assert numbers == ["1. ", "2. ", "3. "]
    assert exercises.count("*Hint: ") == 3
    assert "Fork the script" in exercises
    for script in set(re.findall(r"`([\w/]+\.py)`", text)):  # no file that does not exist
        to_be_made = f"to `{script}`" in text or f"`{script}` to" in text
        assert (ROOT / script).exists() or to_be_made, script


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    """On a copy; each within two minutes on a quiet machine."""
    copy = tmp_path / f"{name}.ipynb"
    shutil.copy(ROOT / "notebooks" / copy.name, copy)
    execute(copy)
    ran = nbformat.read(copy, as_version=4)
    for before, after in zip(read(name).cells, ran.cells, strict=True):
        assert output_kinds(before) == output_kinds(after), before.source.splitlines()[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_exercises_have_solutions(name):
    text = (ROOT / f"notebooks/solutions/{name[:2]}.md").read_text()
    assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == ["1", "2", "3"]
    assert max(map(len, text.splitlines())) <= 100
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_all_are_one_set():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES
    assert {code_cells(read(name))[0].source for name in NAMES} == {SET_UP}


@pytest.mark.parametrize("name", NAMES)
def test_the_address_comes_from_one_place(name):
    """The link to Colab opens this notebook; nothing but the link and SET_UP names the address."""
    sources = [cell.source for cell in read(name).cells]
    link = (
        f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb)"
    )
    assert sources[0].splitlines()[2] == f"[Open in Colab]{link}"
    assert sum(REPOSITORY in source for source in sources) == 2
    assert not any("OWNER" in source.replace(REPOSITORY, "") for source in sources)


def test_an_old_address_is_replaced():
    title = nbformat.v4.new_markdown_cell(
        "# 0 · A\n\n[Open in Colab](https://old)\n\nYou will see."
    )
    notebook = nbformat.v4.new_notebook(cells=[title, nbformat.v4.new_code_cell("old")])
    for _ in range(2):  # the second time changes nothing
        write_address(notebook, "a.ipynb")
    lines = title.source.splitlines()
    assert lines[0] == "# 0 · A"
    assert lines[2].startswith("[Open in Colab](https://colab.research.google.com/")
    assert lines[2].endswith("/notebooks/a.ipynb)")
    assert lines[3:] == ["", "You will see."]
    assert notebook.cells[1].source == SET_UP


def test_pictures_are_laid_out_as_the_painter_tiles_them():
    from notebooks.figures import pick, repeat, stack, tiled

    views = {name: np.full((2, 2, 3), i, np.uint8) for i, name in enumerate("abcd")}
    picture = tiled(views)  # two rows of two, a white pixel around each view
    assert picture.shape == (8, 8, 3)
    corners = picture[[1, 1, 5, 5], [1, 5, 1, 5], 0]
    assert corners.tolist() == [0, 1, 2, 3]
    assert (picture[0] == 255).all()
    batch = stack([views, pick(repeat(views, 3), 2)])
    assert batch["d"].shape == (2, 2, 2, 3)
    assert (batch["d"] == 3).all()


def test_some_are_chosen_by_the_beginning_of_their_names():
    assert [path.stem for path in find_notebooks([])] == NAMES
    assert [path.stem for path in find_notebooks(["03", "00"])] == [NAMES[0], NAMES[3]]
    with pytest.raises(UserError, match="whose name begins with 07 or x"):
        find_notebooks(["07", "x"])


def test_a_stored_picture_keeps_cyan_and_green_apart():
    """Of 256 colours, however little of a picture a sphere covers."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(90, 190, (500, 500, 3)).astype(np.uint8)  # too many colours to keep
    spheres = {"cyan": (0, 255, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
    for i, colour in enumerate(spheres.values()):
        pixels[:12, 20 * i : 20 * i + 12] = colour
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    output = {"data": {"image/png": base64.b64encode(file.getvalue()).decode()}}
    store_smaller(output)
    stored = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
    assert stored.mode == "P"
    kept = np.asarray(stored.convert("RGB")).astype(int)
    for i, colour in enumerate(spheres.values()):
        assert np.abs(kept[:12, 20 * i : 20 * i + 12] - colour).max() < 30


def test_imported_files_are_followed(tmp_path):
    """A package's __init__.py counts, `from package import module` too, and nothing else."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house/__init__.py").write_text("")
    (tmp_path / "house/room.py").write_text("import stairs\nimport numpy")
    (tmp_path / "house/attic.py").write_text("")
    (tmp_path / "stairs.py").write_text("import house.room")
    expected = [tmp_path / name for name in ("house/__init__.py", "house/room.py", "stairs.py")]
    assert imported_files("from house import room", tmp_path) == expected
    assert imported_files("from house.room import chair", tmp_path) == expected
    assert imported_files("import stairs", tmp_path) == expected
    assert imported_files("import h5py", tmp_path) == []
    files = {path.name for path in imported_files("from sims.mujoco_panda import PandaEnv")}
    assert files >= {"__init__.py", "mujoco_panda.py", "mujoco_tasks.py", "episodes.py"}


def test_the_stamp_sees_code_and_not_comments():
    assert without_comments("a = 1  # one\n\n# two\nb = '# three'\n") == "a = 1\nb = '# three'"
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
    message = "broken.ipynb stopped with ZeroDivisionError: division by zero"
    with pytest.raises(UserError, match=message):
        execute(path)
    assert path.read_bytes() == before


def test_the_checkpoint_is_small_whole_and_documented():
    from genima.act import Controller
    from genima.episodes import find_episodes, read_episode
    from genima.painter import load_painter

    folder = ROOT / "checkpoints/demo"
    files = [path for path in folder.rglob("*") if path.is_file() and "robot" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert not [path for path in files if path.suffix in (".pt", ".pkl", ".bin")]
    load_painter(folder / "controlnet")
    Controller.load(folder / "act")
    tasks = {read_episode(path).task for path in find_episodes(folder / "episodes")}
    assert tasks == {"reach_target", "push_button", "pick_and_lift"}
    assert "python tools/pack_checkpoint.py" in (folder / "README.md").read_text()
