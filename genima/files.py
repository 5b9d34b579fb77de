"""Files are written whole or not at all, and what a person can mend is said in one sentence.

run_stage(main)           runs a stage: errors become one sentence, signals stop it
write_whole(path)         a temporary file that becomes `path` when it is complete
name_full_disk(path)      a full disk is one and the same error, whatever library meets it
write_hdf5, read_hdf5     the same for HDF5 files, with a check of their format
check_number              what a stage is asked for
"""

import errno
import glob
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

LARGE = 20_000_000  # bytes of images; a file above is written to disk frame by frame
# What the system says. Libraries pass it on in exceptions of many types, often as text alone:
# safetensors, PyTorch, shutil, and the DataLoader of PyTorch from one of its processes.
DISK_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
TOO_MANY = [os.strerror(number) for number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN)]
TOO_MANY.append("ancdata")  # PyTorch could not pass an open file to another process
NO_MEMORY = ("out of memory", "can't allocate memory", os.strerror(errno.ENOMEM))


class UserError(Exception):
    """One sentence for the user: what is wrong, in which file, and what to do about it."""


# ------------------------------------------------------------------------------------------- stages
def run_stage(main: Callable[[], None]):
    """Run a stage's main(). Exit code 2 and a sentence for the user's errors, 130 when stopped.

    SIGTERM (a scheduler's stop) and SIGHUP (the terminal is gone) stop a stage as Ctrl-C does.
    Other exceptions are errors of this program, and keep their traceback.
    """
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII only
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = describe(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        sys.exit(2)


def describe(error: Exception) -> str | None:
    """One sentence about an error of the user or the machine; None for one of this program."""
    if isinstance(error, UserError):
        return str(error)
    reason = shorten(str(error))
    if says(error, ["shared memory"]):
        return (
            "There is not enough shared memory (/dev/shm) for the processes that prepare batches: "
            "make it larger, in Docker by --shm-size=1g, and run the same command again."
        )
    if says(error, DISK_FULL):
        return (
            f"The disk is full ({reason}): "
            "make room and run the same command again; finished files are kept."
        )
    if says(error, TOO_MANY):
        return f"The system's limit is reached ({reason}): use fewer --workers, or see `ulimit -a`."
    if isinstance(error, MemoryError) or says(error, NO_MEMORY):
        return (
            f"There is not enough memory ({reason}): ask for smaller images, a smaller "
            "--batch-size or fewer --workers."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check this path and its permissions."
    return None


def says(error: BaseException, phrases: Sequence[str]) -> bool:
    """Whether an error, or one that it came from, has any of these phrases in its message."""
    while error is not None:
        message = str(error)
        if any(phrase in message for phrase in phrases):
            return True
        error = error.__context__
    return False


def shorten(text: str) -> str:
    """Its first words, in one line."""
    return " ".join(text.split())[:200]


def check_number(name: str, value: float, low: float, high: float | None = None):
    """Raise a UserError unless low <= value <= high. name: as the user writes it, --horizon."""
    if high is None:
        if not low <= value:
            raise UserError(f"{name} must be {low} or more, not {value}.")
    elif not low <= value <= high:
        raise UserError(f"{name} must be from {low} to {high}, not {value}.")


# ------------------------------------------------------------------------------------------ writing
@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` when the block succeeds.

    A crash leaves either the whole file or the old one. Raises OSError that names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    # The suffix stays, because some writers go by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with name_full_disk(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
            error.filename2 = None
        raise


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """If the disk is full in the block, raise the system's own OSError, which names `path`."""
    try:
        yield
    except Exception as error:
        if not says(error, DISK_FULL):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def remove_abandoned(path: Path):
    """Remove temporary files for `path` that a process left behind when it was killed."""
    name = glob.escape(path.stem)
    for temporary in path.parent.glob(f".{name}.*.tmp{glob.escape(path.suffix)}"):
        number = temporary.name.removesuffix(path.suffix).split(".")[-2]
        if number.isdecimal() and not is_running(int(number)):
            temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if os.name != "posix":
        return True  # there is no harmless way to ask
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def write_hdf5(path: Path, size: int = 0) -> Iterator[h5py.File]:
    """Yield an HDF5 file to fill, which is written to `path` when the block succeeds.

    A small file is put together in memory, because HDF5 cannot close a file when the disk is full,
    whereas a plain write fails cleanly. size: bytes of images; a large file grows on the disk,
    which must have room for it.
    """
    with write_whole(path) as temporary:
        if size < LARGE:
            with h5py.File(str(path), "w", driver="core", backing_store=False) as root:
                yield root
                root.flush()
                temporary.write_bytes(root.id.get_file_image())
        else:
            if shutil.disk_usage(temporary.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with h5py.File(temporary, "w") as root:
                yield root


# ------------------------------------------------------------------------------------------ reading
@contextmanager
def read_hdf5(path: Path, file_format: str) -> Iterator[h5py.File]:
    """Yield the HDF5 file at `path`. Whatever is wrong with it becomes a UserError that names it.

    file_format: what its attribute `format` must be.
    """
    try:
        with h5py.File(path, "r") as root:
            if root.attrs.get("format") != file_format:
                raise UserError(
                    f"{path}: attribute 'format' is not '{file_format}': "
                    "another program or version wrote this file."
                )
            yield root
    except (UserError, MemoryError):
        raise
    except Exception as error:  # HDF5 reports damage in many ways: OSError, KeyError, RuntimeError
        raise UserError(f"{path} {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Why an HDF5 file cannot be read: in the system's words if it refuses, else in HDF5's."""
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        return "does not exist"
    if number in (errno.EAGAIN, errno.EACCES) and "lock" in str(error):
        return f"is open in another program ({os.strerror(number)})"
    if number:
        return f"cannot be read: {os.strerror(number)}"
    words = str(error.args[0]) if error.args else str(error)
    return "cannot be read: " + shorten(words.strip("'\""))
