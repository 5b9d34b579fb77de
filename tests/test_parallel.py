"""sims/parallel.py: jobs come back whatever becomes of the processes."""

import multiprocessing
import os
import signal
import threading

import pytest
from conftest import ROOT  # noqa: F401  (it makes the scripts importable)

from genima.files import UserError
from genima.parallel import run_in_parallel


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
