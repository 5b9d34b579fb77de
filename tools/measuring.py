"""Times, memory, and a report that keeps every number: for the benchmarks on a GPU."""

import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from genima.files import write_whole


class Report:
    """The numbers so far: printed, and written to a file, as soon as they are known."""

    def __init__(self, path: Path):
        self.path = path
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.numbers = {}

    def add(self, part: str, name: str, **values):
        self.numbers.setdefault(part, {})[name] = values
        shown = ", ".join(f"{key} {value}" for key, value in values.items())
        print(f"{part}: {name}: {shown}", flush=True)
        with write_whole(self.path) as path:
            path.write_text(json.dumps(self.numbers, indent=1))

    def print_table(self):
        """All numbers once more, a line each, in columns."""
        rows = []
        for part, measured in self.numbers.items():
            for name, values in measured.items():
                shown = ", ".join(f"{key} {value}" for key, value in values.items())
                rows.append((part, name, shown))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        for part, name, shown in rows:
            print(f"{part:<{widths[0]}}  {name:<{widths[1]}}  {shown}")


@contextmanager
def time_limit(seconds: int):
    """Raise TimeoutError inside after so many seconds."""

    def stop(number, frame):
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function, count: int = 20) -> float:
    """The median time of function(), from its call to the end of the GPU's work."""
    times = []
    for _ in range(count + 3):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(times[3:])), 3)


def peak_memory() -> float | None:
    """GB since the last start of counting."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def start_counting_memory():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
