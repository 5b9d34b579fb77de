"""Jobs in several processes that may crash, as simulators do: a job whose process died is begun once more in a fresh one."""

import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing import connection, get_context

from tqdm import tqdm

from episodes import UserError


def serve(pipe, other_end):
    """A worker's life: jobs (function, arguments...) in, (result, error) out, until there is None or nobody at the other end."""
    other_end.close()  # this process's copy of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business, not the workers'
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a half-written file is removed
    with suppress(EOFError):
        while job := pipe.recv():
            try:
                answer = job[0](*job[1:]), None
            except (UserError, OSError) as error:
                answer = None, error
            except Exception as error:  # others may not survive the journey
                answer = None, RuntimeError("".join(traceback.format_exception(error)))
            pipe.send(answer)


def in_parallel(jobs, workers, description, unit, start=None):
    """Yield (job, result) for jobs (function, arguments...) as they are done, under a progress bar; result is None for a job that
    killed two processes. An exception in a job ends everything. start: how processes start (None: the system's way)."""
    context, jobs = get_context(start), list(jobs)
    waiting, deaths = list(range(len(jobs)))[::-1], [0] * len(jobs)  # numbers of jobs
    running, idle = {}, []  # pipe -> (process, number of its job); (pipe, process)
    bar = tqdm(total=len(jobs), desc=description, unit=unit)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                if idle:
                    pipe, process = idle.pop()
                else:
                    pipe, theirs = context.Pipe()
                    process = context.Process(target=serve, args=(theirs, pipe), daemon=True)
                    process.start()
                    theirs.close()
                running[pipe] = process, waiting.pop()
                with suppress(ConnectionError):  # a process that has died since will not answer
                    pipe.send(jobs[running[pipe][1]])
            for pipe in connection.wait(list(running)):
                process, job = running.pop(pipe)
                try:
                    result, error = pipe.recv()
                    idle.append((pipe, process))
                except (EOFError, ConnectionError):  # the process is dead
                    process.join()
                    deaths[job] += 1
                    if deaths[job] < 2:
                        waiting.append(job)
                        continue
                    result, error = None, None
                if error:
                    raise error
                bar.update()
                yield jobs[job], result
    finally:
        bar.close()
        for process, _ in running.values():
            process.terminate()
        for pipe, _ in idle:
            with suppress(ConnectionError):
                pipe.send(None)
        for process in [process for process, _ in running.values()] + [process for _, process in idle]:
            process.join(10)
            process.kill()
