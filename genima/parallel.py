"""Jobs in several processes that may crash, as simulators do: a job whose process died is begun once more in a fresh one."""

import os
import signal
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context

from tqdm import tqdm


def ignore_interrupt(_worker):
    """Ctrl-C is the first process's business. (A function of the module: macOS starts workers by name.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def usable_cores() -> int:
    """How many cores this process may use: a scheduler or taskset may leave it only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


worker = {}  # of a worker process: its context


def begin_worker(make_context):
    ignore_interrupt(0)
    if make_context:
        worker["context"] = make_context()


def call_with_context(function, *arguments):
    return function(worker["context"], *arguments)


def run_in_parallel(jobs, workers, description, unit, make_context=None, start=None):
    """Yield (job, result) for jobs (function, arguments...) as they are done, under a progress bar; result is None for a job that
    killed two processes. An exception in a job ends everything. make_context: called once in each worker process; its
    jobs get what it returns as first argument. start: how processes start (None: the system's way)."""
    waiting = [(job, False) for job in jobs][::-1]  # and whether it has killed a process
    pools, idle, running = (
        [],
        [],
        {},
    )  # pools of one process, for one that dies takes its pool along; future -> (pool, job, killed)
    try:
        with tqdm(total=len(waiting), desc=description, unit=unit) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    if not idle:
                        idle.append(
                            ProcessPoolExecutor(
                                1, get_context(start), begin_worker, (make_context,)
                            )
                        )
                        pools += idle
                    pool = idle.pop()
                    with suppress(
                        BrokenProcessPool
                    ):  # it died when it had nothing to do: the next one
                        job = waiting[-1][0]
                        if make_context:
                            job = (call_with_context, *job)
                        future = pool.submit(*job)
                        running[future] = pool, *waiting.pop()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    pool, job, killed = running.pop(future)
                    try:
                        result = future.result()
                        idle.append(pool)
                    except BrokenProcessPool:
                        if not killed:
                            waiting.append((job, True))
                            continue
                        result = None
                    bar.update()
                    yield job, result
    finally:
        for process in (
            active_children() if running else ()
        ):  # those with nothing to do end by themselves
            process.kill()
        for pool in pools:
            pool.shutdown()
