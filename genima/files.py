"""Files are written whole or not at all, and what a person can mend is said in one sentence."""

import errno
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import h5py

LARGE = 200_000_000  # bytes of pictures in an episode that is not put together in memory


class UserError(Exception):
    """One sentence for the person at the keyboard: what is wrong, in which file, and what to do about it."""


def run_stage(main):
    """Run a stage's main() and end the process: errors that a person can mend are one sentence, without a traceback."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"The disk is full ({error}): make room and run the same command again; finished files are kept.",
            file=sys.stderr,
        )
        sys.exit(2)


@contextmanager
def write_whole(path):
    """Yield a temporary path beside `path`, which becomes `path` when the block succeeds: a crash leaves all of a file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.stem}.{os.getpid()}.tmp{path.suffix}"
    )  # some writers go by the suffix
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a failed write does not know it
        raise


@contextmanager
def write_hdf5(path, size=0):
    """Yield an HDF5 file to fill, which is written to `path` when the block succeeds. size: bytes of pictures, if they are many.

    It grows in memory: HDF5 cannot close a file whose disk is full, a plain write can fail cleanly. A large one grows on the disk,
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


@contextmanager
def read_hdf5(path, file_format):
    """Yield the HDF5 file at `path`; whatever is wrong with it becomes a UserError that names it."""
    try:
        with h5py.File(path, "r") as root:
            if root.attrs.get("format") != file_format:
                raise UserError(
                    f"{path}: attribute 'format' is not '{file_format}': another program or version wrote this file."
                )
            yield root
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (
        Exception
    ) as error:  # HDF5 reports a damaged file in many ways: OSError, KeyError, RuntimeError, ...
        reason = str(error.args[0] if error.args else error).strip("'\"")
        raise UserError(
            f"{path} cannot be read ({reason}): delete it and make it again."
        ) from error
