"""What README.md says of the files is so."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_every_file_is_on_the_map_with_its_length():
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE))
    paths = {
        str(path.relative_to(ROOT))
        for folder in (".", "sims", "variations")
        for path in (ROOT / folder).glob("*.py")
    }
    assert set(rows) == paths
    for name, lines in rows.items():
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(actual - int(lines)) <= 0.05 * actual, f"{name} has {actual} lines, not {lines}"


def test_what_it_points_at_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    for script in re.findall(r"python ([\w/]+\.py)", README):
        assert script == "variations/train_X.py" or (ROOT / script).exists(), script
