"""Jobs in several processes, any of which may crash, as simulators do.

    for job, result in run_in_parallel([(square, 2), (square, 3)], 2, "squares", "number"):
        print(job, result)

Each process does one job after another. With `make_context` it first makes an object of its own
(networks, environments), and every job of the process gets that as its first argument. A job whose
process died starts once more in a new one. Workers end with their parent, even if it was killed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import wait

from tqdm import tqdm


def usable_cores() -> int:
    """How many cores this process may use: a scheduler or taskset may leave it only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def ignore_interrupt(_worker=None):
    """Ctrl-C reaches all processes of a terminal; the parent alone answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def depend_on_parent(_worker=None):
    """For a new process: it leaves Ctrl-C to its parent, and ends when its parent has ended."""
    ignore_interrupt()
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_in_parallel(
    jobs: list[tuple],
    workers: int,
    description: str,
    unit: str,
    make_context: Callable | None = None,
    start: str | None = None,
) -> Iterator[tuple]:
    """Yield (job, result) in the order in which jobs finish, under a progress bar.

    A job is (function, arguments...). The result is None for a job that killed two processes; an
    exception in a job ends everything and is raised here. make_context: called once in each
    process. start: how processes start ("fork", "spawn"), None for the system's way.
    """
    waiting = deque(range(len(jobs)))
    killers = set()  # jobs that have killed a process
    everyone = []
    idle = []
    running = {}  # pipe -> (worker, number of its job)
    try:
        with tqdm(total=len(jobs), desc=description, unit=unit) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    if not idle:
                        idle.append(Worker(make_context, start))
                        everyone.append(idle[-1])
                    worker = idle.pop()
                    with suppress(OSError):  # it died while it had nothing to do: take the next
                        worker.pipe.send(jobs[waiting[0]])
                        running[worker.pipe] = worker, waiting.popleft()
                for pipe in wait(running):
                    worker, number = running.pop(pipe)
                    result = None
                    try:
                        result, error, trace = pipe.recv()
                        idle.append(worker)
                    except (EOFError, OSError):  # the process died
                        error = None
                        if number not in killers:
                            killers.add(number)
                            waiting.appendleft(number)
                            continue
                    if error is not None:
                        raise error from WorkerTraceback(trace)
                    bar.update()
                    yield jobs[number], result
    finally:
        for worker in everyone:
            worker.end(kill=bool(running))


class Worker:
    """A process that does one job at a time, as the parent's side sees it."""

    def __init__(self, make_context, start):
        context = multiprocessing.get_context(start)
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=work, args=(far_end, make_context), daemon=True)
        self.process.start()
        far_end.close()

    def end(self, kill):
        """kill: at once; else the process ends as usual, so that simulators can shut down."""
        if kill:
            self.process.kill()
        with suppress(OSError):  # it may have died
            self.pipe.send(None)
        self.process.join()
        self.pipe.close()


class WorkerTraceback(Exception):
    """Shows where in the worker an exception was raised."""

    def __str__(self):
        return "\n" + self.args[0]


def work(pipe, make_context):
    """The whole life of a worker: jobs come in, (result, error, traceback) goes out."""
    depend_on_parent()
    try:
        context = []
        if make_context:
            context.append(make_context())
        for function, *arguments in iter(pipe.recv, None):
            pipe.send((function(*context, *arguments), None, None))
    except BaseException as error:
        with suppress(OSError):  # the parent is gone
            pipe.send((None, error, traceback.format_exc()))


def end_with_parent():
    """Wait until the parent process has ended, however it did, and end this process at once."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
