"""The tool that makes the table of policies: its commands exist, its cells count, it goes on."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

from genima.files import UserError
from tools import compare_policies as table


def outcome(successes, episodes):
    return {"outcomes": [{"success": i < successes} for i in range(episodes)]}


def write_report(folder, name="evaluation.json", successes=3, episodes=4):
    folder.mkdir(parents=True)
    tasks = {task: outcome(successes, episodes) for task in table.TASKS}
    (folder / name).write_text(json.dumps({"tasks": tasks}))


def test_a_finished_cell_is_read_and_another_size_is_refused(tmp_path):
    folder = tmp_path / "results/act/table"
    write_report(folder, "evaluation_act_table.json")
    policy = table.POLICIES["act"]
    results = table.evaluate(policy, tmp_path, folder, "table", 4)
    assert results == {task: [True, True, True, False] for task in table.TASKS}
    with pytest.raises(UserError, match="has 4 episodes a task, not 5"):
        table.evaluate(policy, tmp_path, folder, "table", 5)


def test_a_cell_counts_all_tasks_and_seeds():
    runs = [{"a": [True, False], "b": [True, True]}, {"a": [True, True], "b": [True, True]}]
    assert table.describe_cell(runs) == "7 of 8 (53 to 98 %)"
    assert table.describe_cell([]) == ""


def test_the_table_has_a_row_for_each_policy_and_count(tmp_path, capsys):
    settings = table.Settings(policies=("genima", "act"), demos=(20,), out=tmp_path)
    cells = {("act", 20, "light"): [{"reach_target": [True] * 4}]}
    table.write_table(tmp_path, cells, settings)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 4
    assert {len(line.split("|")) for line in lines} == {2 + 2 + len(table.CONDITIONS)}
    assert "4 of 4" in lines[3] and "4 of 4" not in lines[2]


@pytest.mark.parametrize("name", table.POLICIES)
def test_the_commands_are_those_of_the_stages(name, tmp_path):
    policy = table.POLICIES[name]
    commands = [*policy.training, f"evaluate.py {policy.options}"]
    for command in commands:
        script, *options = command.format(seed=tmp_path, scenes=tmp_path).split()
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        settings = tyro.cli(module.Settings, args=[*options, "--run", "data", "--seed", "3"])
        assert settings.run == Path("data") and settings.seed == 3


@pytest.mark.parametrize("options", [["--policies", "other"], ["--conditions", "rain"]])
def test_unknown_names_are_one_sentence(options):
    command = [sys.executable, "tools/compare_policies.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().startswith(f"{options[0]} {options[1]}: choose from")
