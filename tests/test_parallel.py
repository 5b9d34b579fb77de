"""genima/parallel.py: jobs come back whatever becomes of the processes, and none outlives us."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from genima.files import UserError
from genima.parallel import run_in_parallel, usable_cores


def square(number):
    return number * number


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def answer_and_die(number):
    threading.Timer(0.05, die, [0]).start()
    return number


def fail(error):
    raise error


def test_a_job_that_kills_its_process_is_none_and_the_others_are_done():
    jobs = [(square, 1), (die, 2), (square, 3), (die, 4), (square, 5)]
    assert sorted((job[1], result) for job, result in run_in_parallel(jobs, 2, "jobs", "job")) == [
        (1, 1),
        (2, None),
        (3, 9),
        (4, None),
        (5, 25),
    ]
    assert not multiprocessing.active_children()


def test_a_process_that_dies_between_two_jobs_is_replaced():
    numbers = []
    for _, result in run_in_parallel(
        [(answer_and_die, number) for number in range(6)], 2, "jobs", "job"
    ):
        numbers.append(result)
        threading.Event().wait(0.1)
    assert len(numbers) == 6


@pytest.mark.parametrize(
    "error, kind",
    [
        (UserError("a sentence"), UserError),
        (OSError(28, "full"), OSError),
        (ValueError("x"), ValueError),
    ],
)
def test_an_error_ends_everything(error, kind):
    with pytest.raises(kind):
        list(run_in_parallel([(square, 1), (fail, error), *[(square, 2)] * 50], 2, "jobs", "job"))
    assert not multiprocessing.active_children()


def test_an_error_shows_where_it_was_raised():
    with pytest.raises(ValueError) as caught:
        list(run_in_parallel([(fail, ValueError("x"))], 1, "jobs", "job"))
    assert "test_parallel.py" in str(caught.value.__cause__) and "in fail" in str(
        caught.value.__cause__
    )


class Context:
    def __init__(self):
        self.jobs = 0


def count(context, number):
    context.jobs += 1
    return number, os.getpid(), context.jobs


def count_or_die(context, number):
    if number == 2:
        die(number)
    return count(context, number)


@pytest.mark.parametrize("start", [None, "spawn"])
def test_each_process_makes_its_context_once(start):
    jobs = [(count, number) for number in range(8)]
    results = [result for _, result in run_in_parallel(jobs, 2, "jobs", "job", Context, start)]
    assert sorted(number for number, _, _ in results) == list(range(8))
    for process in {process for _, process, _ in results}:
        counted = [jobs for _, its, jobs in results if its == process]
        assert sorted(counted) == list(range(1, len(counted) + 1))


def test_a_process_after_a_crash_has_a_context_too():
    jobs = [(count_or_die, number) for number in range(5)]
    results = dict(
        (job[1], result) for job, result in run_in_parallel(jobs, 1, "jobs", "job", Context)
    )
    assert results[2] is None
    assert [results[number][2] for number in (0, 1, 3, 4)] == [1, 2, 1, 2]


def no_context():
    raise UserError("There are no networks.")


def test_an_error_in_a_context_ends_everything():
    with pytest.raises(UserError, match="no networks"):
        list(run_in_parallel([(count, 1)] * 3, 2, "jobs", "job", no_context))
    assert not multiprocessing.active_children()


def test_leaving_the_loop_ends_the_workers():
    for _ in run_in_parallel([(time.sleep, 0.01 * i) for i in range(200)], 2, "jobs", "job"):
        break
    assert not multiprocessing.active_children()


def test_usable_cores(monkeypatch):
    assert 1 <= usable_cores() <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert usable_cores() == 1  # taskset -c 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()


# ------------------------------------------------------------------------------ nobody is orphaned
ORPHANS = """
import hashlib, os, sys, time
from pathlib import Path
from genima.parallel import run_in_parallel

folder, start = Path(sys.argv[1]), sys.argv[2]

def write(number):
    while True:  # busy: each digest is some milliseconds in C
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 10_000)
        with (folder / f"{os.getpid()}").open("a") as file:
            file.write(".")

if __name__ == "__main__":
    # one worker has a job, and one waits for the next
    jobs = [(time.sleep, 0), (write, 1), (write, 2)]
    for _ in run_in_parallel(jobs, 3, "jobs", "job", None, start):
        pass
"""


def children(process):
    """Its children and theirs, from /proc."""
    found = []
    for stat in os.listdir("/proc"):
        if stat.isdigit():
            try:
                parent = int(open(f"/proc/{stat}/stat").read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == process:
                found += [int(stat), *children(int(stat))]
    return found


def is_running(process):
    try:
        return open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path, start, number):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    written = tmp_path / "written"
    written.mkdir()
    parent = subprocess.Popen(
        [sys.executable, script, written, start],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    for _ in range(600):
        time.sleep(0.1)
        if len(list(written.iterdir())) == 2 and all(
            path.stat().st_size > 3 for path in written.iterdir()
        ):
            break
    workers = children(parent.pid)
    assert len(workers) >= 2 and all(map(is_running, workers))
    parent.send_signal(number)
    parent.wait(10)
    for _ in range(20):
        time.sleep(0.1)
        if not any(map(is_running, workers)):
            break
    assert not [worker for worker in workers if is_running(worker)]
    sizes = {path: path.stat().st_size for path in written.iterdir()}
    time.sleep(0.3)
    assert sizes == {path: path.stat().st_size for path in written.iterdir()}
