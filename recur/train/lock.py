"""One process at a time in a folder: `hold` locks it or names the process that has it."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recur.train.config import InputError

LOCK = "lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer


class Held:
    """A folder that this process holds until `release`, the end of a `with` block, of this object or of the process."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.release = weakref.finalize(self, _release, descriptor, path, os.getpid())

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def hold(folder: Path, say: Callable[[str], object] = warnings.warn) -> Held:
    """Lock `folder`, which is made if need be, for this process.

    The operating system's lock on the file FOLDER/lock decides (flock), so a process that was killed holds nothing. On
    a file system without such locks the process that the file names decides: one of this host must be alive, one of
    another host counts as alive. The file is removed when the folder is released.

    Args:
        folder: where the results of one process at a time go.
        say:    called with a line when a process of another host has not released the folder.

    Raises: InputError if `folder` is not a folder that takes files, or naming the process that holds it.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(descriptor):
                    remedy = f"wait until it ends, or choose another --out (the lock is {path})"
                    raise InputError(f"{folder} is in use by {_described(_holder(descriptor))}: {remedy}")
                if _is_at(descriptor, path):  # else its last holder removed it after it was opened here
                    left = _holder(descriptor)
                    if left.get("host", platform.node()) != platform.node():  # not every network file system locks
                        say(f"{path} was left behind by {_described(left)}: if that is still running, stop it")
                    _sign(descriptor)
                    return Held(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"cannot write to --out {folder}: {(error.strerror or str(error)).lower()}") from error


def _lock(descriptor: int) -> bool:
    """Whether this process has the lock now."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except ModuleNotFoundError:  # not a POSIX system
        return not _holder(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        holder = _holder(descriptor)
        return not holder or (holder.get("host") == platform.node() and not _alive(int(holder.get("pid", 0))))
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since})
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, content.encode())


def _holder(descriptor: int) -> dict[str, Any]:
    """Who wrote that it holds the lock; {} if nobody did."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        content = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _release(descriptor: int, path: Path, pid: int) -> None:
    """Remove the lock, unless this is a fork of the process that holds it."""
    if os.getpid() == pid:
        if _is_at(descriptor, path):
            path.unlink()
        _unlock(descriptor)
    os.close(descriptor)


def _unlock(descriptor: int) -> None:
    """Free the lock even where a fork still has the file open."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except (ModuleNotFoundError, OSError):  # no such locks here: nothing to free
        pass
