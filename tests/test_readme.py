"""What README.md and docs/ say is so: links, commands, their flags, the map; and a page that reads.

Every command in a document is compared with the `--help` of its script, so a flag that is renamed
and not followed in the documents fails here, with the document's name.
"""

import contextlib
import io
import re
import runpy
import sys

import pytest
from conftest import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "checkpoints/demo/README.md", *PAGES]
FOLDERS = ("genima", "sims", "robot", "variations", "tools")
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\([^)]*\)")
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
SCRIPT = r"((?:[a-z_]+/)*[a-z_]+\.py)((?: +[^\s#]+)*)"
TEST_COMMAND = re.compile(r"pytest (?:-q )?(tests/\w+\.py)(.*)")
OPTION = re.compile(r"^(?:│| ) (?:-\w, )?(--[\w-]+)(?:, (--[\w-]+))?", re.MULTILINE)
# What belongs to a tracker of issues, or to one machine, and not to a reader of this project.
FOREIGN = re.compile(
    r"\bsessions?\b(?!\.py)|\bissues? #?\d|(?<!\w)#\d|(?<![\w.~])/(?:work|tmp|home|root)/"
)


def read(name):
    return (ROOT / name).read_text()


def code_blocks(text):
    """The fenced blocks of a page."""
    return FENCE.findall(text)


def block_lines(text):
    """Every line of a page's fenced blocks; a line that ends with a backslash takes in the next."""
    lines = []
    for block in code_blocks(text):
        lines += block.replace("\\\n", " ").splitlines()
    return [line.split("#")[0] for line in lines]


def inline_code(text):
    """Every piece of inline code of a page outside links, on one line each."""
    text = LINK.sub("", FENCE.sub("", text))
    return [" ".join(code.split()) for code in INLINE.findall(text)]


def commands(name):
    """Every (script, words after it) that a document names; the words may be none."""
    found = []
    text = read(name)
    for line in block_lines(text):
        found += re.findall(rf"(?:python|launch) {SCRIPT}", line)
    for line in inline_code(text):
        if "pytest" not in line:
            found += re.findall(rf"(?<![\w/]){SCRIPT}", line)
    return [(script, words.split()) for script, words in found]


def show_help(script, words):
    """What `python <script> <words> --help` prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words, "--help"])
        patch.syspath_prepend((ROOT / script).parent)
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return printed.getvalue()


class Helps:
    """The flags that scripts take, by their own `--help`, each printed once."""

    def __init__(self):
        self.texts = {}

    def text(self, script, subcommand=()):
        key = (script, *subcommand)
        if key not in self.texts:
            self.texts[key] = show_help(script, subcommand)
        return self.texts[key]

    def subcommands(self, script):
        """The words that may follow the script's name, as in `real_robot.py run`; often none."""
        usage = self.text(script).split("\n\n")[0]
        choice = re.search(r"\{([\w,-]+)\}", usage)
        return choice.group(1).split(",") if choice else []

    def flags(self, script, words):
        """The flags of a script, or of its subcommand if the words begin with one."""
        subcommand = [word for word in words[:1] if word in self.subcommands(script)]
        pairs = OPTION.findall(self.text(script, subcommand))
        return {flag for pair in pairs for flag in pair if flag}


@pytest.fixture(scope="module")
def helps():
    return Helps()


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist_with_their_flags(name, helps):
    for script, words in commands(name):
        assert (ROOT / script).exists(), f"{name} names {script}, which does not exist"
        for word in words:
            if word.startswith("--") and word != "--help":
                assert word in helps.flags(script, words), f"{name}: {script} has no {word}"


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_named_alone_belongs_to_some_stage(name, helps):
    known = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("variations/train_*.py")]:
        script = str(path.relative_to(ROOT))
        known |= helps.flags(script, [])
        for subcommand in helps.subcommands(script):
            known |= helps.flags(script, [subcommand])
    for code in inline_code(read(name)):
        if code.startswith("--"):
            for flag in re.findall(r"--[\w-]+", code):
                assert flag in known | {"--help"}, f"{name}: no stage has {flag}"


@pytest.mark.parametrize("name", NAMES)
def test_tests_and_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    text = read(name)
    for line in block_lines(text) + inline_code(text):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", line):
            assert target in targets, f"{name}: make {target}"
        for path, rest in TEST_COMMAND.findall(line):
            assert (ROOT / path).exists(), f"{name}: {path}"
            for word in re.findall(r"-k (\w+)", rest):
                assert re.search(rf"def test_\w*{word}", read(path)), f"{name}: {path} -k {word}"


def anchors(path):
    """The anchors of a page's headings, as they are made on the web page of a repository."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    text = FENCE.sub("", read(name))
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = ROOT / name
        if file:
            path = path.parent / file
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{name} links to {target}"


def test_every_page_and_notebook_is_one_click_away():
    links = set(re.findall(r"\]\(([^)#]+)", README.read_text()))
    for path in [*PAGES, *(ROOT / "notebooks").glob("*.ipynb")]:
        assert str(path.relative_to(ROOT)) in links


def test_every_picture_of_docs_is_shown():
    shown = set()
    for name in NAMES:
        for target in re.findall(r"\]\(([^)]+\.(?:png|gif))\)", read(name)):
            shown.add(((ROOT / name).parent / target).resolve())
    for suffix in ("png", "gif"):
        for path in (ROOT / "docs").glob(f"*.{suffix}"):
            assert path in shown, path.name


def listed(path, heading):
    """The files and folders in the lists of a section, as paths from the root."""
    section = path.read_text().split(f"## {heading}")[1].split("\n## ")[0]
    entries = []
    for line in section.splitlines():
        if line.startswith("- "):
            name, target = re.fullmatch(r"- \[`([^`]+)`\]\(([^)]+)\): .+", line).groups()
            assert target.endswith(name), line
            entries.append(target.removeprefix("../"))
    assert len(set(entries)) == len(entries)
    return set(entries)


def test_every_file_of_the_root_is_on_the_map():
    expected = {"Makefile", "LICENSE"}
    for folder in (*FOLDERS, "notebooks", "docs", "tests", "checkpoints"):
        expected.add(f"{folder}/")
    for pattern in ("*.py", "*.md", "*.txt", "*.toml"):
        expected |= {path.name for path in ROOT.glob(pattern) if path != README}
    on_map = listed(README, "The map of the house")
    assert expected - on_map == set(), "not on README's map"
    assert on_map - expected == set(), "on README's map, and not there"


def test_every_file_of_the_folders_is_on_the_map():
    expected = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            if path.read_text().strip():  # an empty __init__.py is no place to look for anything
                expected.add(str(path.relative_to(ROOT)))
    on_map = listed(ROOT / "docs/house.md", "The files")
    assert expected - on_map == set(), "not on the map of docs/house.md"
    assert on_map - expected == set(), "on the map of docs/house.md, and not there"


def test_readme_is_one_page():
    lines = README.read_text().splitlines()
    assert 150 <= len(lines) <= 230
    first_screens = "\n".join(lines[:60])
    for stage in ("collect_demos", "render_spheres", "train_controlnet", "train_act", "evaluate"):
        assert f"python {stage}.py" in first_screens
    assert "source .venv/bin/activate" in first_screens


def table_rows(text):
    """The rows of a page's tables, each a list of cells, without the lines below the headings."""
    rows = []
    for line in FENCE.sub("", text).splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif re.fullmatch(r"\|(\s*\|)+\s*", line):
            rows.append([])
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_reads_well_as_a_page(name):
    text = read(name)
    for row in table_rows(text):
        assert any(row), f"{name}: an empty row"
        assert len(row) <= 4, f"{name}: too wide: {row}"
    for block in code_blocks(text):
        for line in block.splitlines():
            assert len(line) <= 80, f"{name}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_speaks_of_the_project_alone(name):
    text = read(name)
    assert not FOREIGN.search(text), FOREIGN.search(text)
    assert "delete it" not in text.lower()
