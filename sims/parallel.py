"""Jobs in several processes that may crash, as simulators do: a job whose process died is begun once more in a fresh one."""

import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing import connection, get_context

from tqdm import tqdm

from episodes import UserError


def serve(pipe, other_end):
    """A process's life: jobs (function, arguments...) in, (result, error) out, until nobody is at the other end."""
    other_end.close()  # this process's copy of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a half-written file is removed
    with suppress(EOFError):
        while True:
            function, *arguments = pipe.recv()
            try:
                answer = function(*arguments), None
            except (UserError, OSError) as error:
                answer = None, error
            except Exception as error:  # others may not survive the journey
                answer = None, RuntimeError("".join(traceback.format_exception(error)))
            pipe.send(answer)


def in_parallel(jobs, workers, description, unit, start=None):
    """Yield (job, result) for jobs (function, arguments...) as they are done, under a progress bar; result is None for a job that
    killed two processes. An exception in a job ends everything. start: how processes start (None: the system's way)."""
    context, waiting = get_context(start), [(job, 0) for job in jobs][::-1]  # with the number of processes that it has killed
    processes, idle, running = [], [], {}  # idle: pipes; running: pipe -> what it waits for
    try:
        with tqdm(total=len(waiting), desc=description, unit=unit) as bar:
            while waiting or running:
                while waiting and len(running) < workers:
                    if not idle:
                        ours, theirs = context.Pipe()
                        processes.append(context.Process(target=serve, args=(theirs, ours), daemon=True))
                        processes[-1].start()
                        theirs.close()
                        idle.append(ours)
                    pipe = idle.pop()
                    running[pipe] = waiting.pop()
                    with suppress(ConnectionError):  # a process that has died since will not answer
                        pipe.send(running[pipe][0])
                for pipe in connection.wait(list(running)):
                    job, killed = running.pop(pipe)
                    try:
                        result, error = pipe.recv()
                        idle.append(pipe)
                    except (EOFError, ConnectionError):  # the process is dead
                        if not killed:
                            waiting.append((job, 1))
                            continue
                        result, error = None, None
                    if error:
                        raise error
                    bar.update()
                    yield job, result
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)
            process.kill()
