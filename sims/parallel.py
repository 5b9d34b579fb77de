"""Jobs in several processes that may crash, as simulators do: a job whose process died is begun once more in a fresh one."""

import signal
import sys
import traceback
from multiprocessing import connection, get_context

from tqdm import tqdm

from episodes import UserError


def serve(pipe, other_end):
    """A worker's life: jobs (function, arguments...) in, (result, error) out, until there is None or nobody at the other end."""
    other_end.close()  # this process's copy of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business, not the workers'
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a half-written file is removed
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if job is None:
            return
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
    waiting, deaths, running = list(range(len(jobs)))[::-1], [0] * len(jobs), {}  # running: pipe -> (process, number of its job)
    bar = tqdm(total=len(jobs), desc=description, unit=unit)

    def begin(process, pipe):
        job = waiting.pop()
        if process is None:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, pipe), daemon=True)
            process.start()
            theirs.close()
        running[pipe] = process, job
        pipe.send(jobs[job])

    try:
        while waiting or running:
            while waiting and len(running) < workers:
                begin(None, None)
            for pipe in connection.wait(list(running)):
                process, job = running.pop(pipe)
                try:
                    result, error = pipe.recv()
                except (EOFError, ConnectionError):  # the process is dead
                    process.join()
                    deaths[job] += 1
                    if deaths[job] < 2:
                        waiting.append(job)
                        continue
                    result, error = None, None
                else:
                    if waiting and not error:
                        begin(process, pipe)
                    else:
                        pipe.send(None)
                        process.join(10)
                if error:
                    raise error
                bar.update()
                yield jobs[job], result
    finally:
        bar.close()
        for pipe, (process, _) in running.items():
            process.terminate()
        for pipe, (process, _) in running.items():
            process.join(10)
            process.kill()
