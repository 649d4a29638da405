"""The compiled kernels' disk cache: private to one user, atomic, every entry checked before it is believed.

A cubin is code that runs with the user's rights, so an entry counts only if nobody else could have written it (folder
and file belong to this user, no write bit for others) and if its own digest matches (not cut short, not another key's).
Whatever fails that is removed where possible and compiled again.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import threading
import warnings
from pathlib import Path

FORMAT = "megamoe-kernel-2"
_MAGIC = FORMAT.encode() + b"\n"
_DIR_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_warned: set[str] = set()
_warned_lock = threading.Lock()


def directory(cache_dir: str | os.PathLike | None = None) -> Path:
    """`cache_dir`, else $MEGAMOE_CACHE_DIR, else ~/.cache/megamoe; entries lie in its private subfolder ``kernels``, so
    that a shared folder may be named. Creates nothing."""
    named = cache_dir or os.environ.get("MEGAMOE_CACHE_DIR")
    try:
        root = Path(named).expanduser() if named else Path.home() / ".cache" / "megamoe"
    except RuntimeError:  # no home directory: the folder below cannot be made, and the cache says so
        root = Path("/nonexistent/.cache/megamoe")
    return root.absolute() / "kernels"


class Cache:
    """One cache folder. Never raises for a folder or file it cannot use: it warns once a process and folder, and the
    caller's in-memory copy has to do."""

    def __init__(self, cache_dir: str | os.PathLike | None = None):
        self.directory = directory(cache_dir)

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.kernel"

    def problem(self) -> str | None:
        """None when entries can be kept here, else why not. Creates the folder."""
        try:
            os.close(self._open_directory())
        except OSError as error:
            return str(error)
        return None if os.access(self.directory, os.W_OK | os.X_OK) else f"{self.directory} is not writable"

    def load(self, key: str) -> tuple[dict, bytes] | None:
        """The entry's (meta, cubin), or None when there is none to be trusted."""
        try:
            folder = self._open_directory()
        except OSError as error:
            self._warn(error)
            return None
        try:
            return _decode(key, self._read_private(folder, self.path(key).name))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._discard(folder, self.path(key).name, error)
            return None
        finally:
            os.close(folder)

    def save(self, key: str, meta: dict, cubin: bytes) -> Path | None:
        """Writes beside and renames: a reader sees the old entry, the new one or none, and of several writers one wins.
        The entry's path, or None when it could not be kept."""
        temporary = f".{key[:16]}.{os.getpid()}.{secrets.token_hex(8)}.tmp"
        folder = None
        try:
            folder = self._open_directory()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(_encode(key, meta, cubin))
            os.rename(temporary, self.path(key).name, src_dir_fd=folder, dst_dir_fd=folder)
            return self.path(key)
        except OSError as error:
            if folder is not None:
                _unlink(folder, temporary)
            self._warn(error)
            return None
        finally:
            if folder is not None:
                os.close(folder)

    def _open_directory(self) -> int:
        # By descriptor from here on: whoever can rename the folder cannot swap it between the check and the use.
        os.makedirs(self.directory.parent, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.directory, mode=0o700)
        folder = os.open(self.directory, _DIR_FLAGS)
        try:
            status = os.fstat(folder)
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{self.directory} belongs to user {status.st_uid}, not to {os.geteuid()}")
            if stat.S_IMODE(status.st_mode) & 0o077:
                os.fchmod(folder, 0o700)
        except OSError:
            os.close(folder)
            raise
        return folder

    def _read_private(self, folder: int, name: str) -> bytes:
        # O_NONBLOCK: a fifo under this name must not hang the open.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_uid != os.geteuid():
                raise ValueError(f"it belongs to user {status.st_uid}")
            if stat.S_IMODE(status.st_mode) & 0o022:
                raise ValueError(f"others may write it (mode {stat.S_IMODE(status.st_mode):o})")
            return file.read()

    def _discard(self, folder: int, name: str, reason: Exception) -> None:
        _unlink(folder, name)
        warnings.warn(
            f"kernel cache: {self.directory / name} refused and compiled again: {reason}", RuntimeWarning, stacklevel=4
        )

    def _warn(self, reason: Exception) -> None:
        with _warned_lock:
            if str(self.directory) in _warned:
                return
            _warned.add(str(self.directory))
        warnings.warn(
            f"kernel cache: {self.directory} cannot be used ({reason}); kernels are compiled anew in every "
            "process. Set MEGAMOE_CACHE_DIR to a folder you can write.",
            RuntimeWarning,
            stacklevel=4,
        )


def _encode(key: str, meta: dict, cubin: bytes) -> bytes:
    head = json.dumps({"key": key, "cubin_bytes": len(cubin), **meta}).encode() + b"\n"
    digest = hashlib.sha256(head + cubin).hexdigest().encode()
    return _MAGIC + digest + b"\n" + head + cubin


def _decode(key: str, data: bytes) -> tuple[dict, bytes]:
    if not data.startswith(_MAGIC):
        raise ValueError("it is not a kernel cache entry")
    digest, _, body = data[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its digest does not match: cut short or changed")
    head, _, cubin = body.partition(b"\n")
    meta = json.loads(head)
    if meta.pop("key") != key or meta.pop("cubin_bytes") != len(cubin):
        raise ValueError("it holds another kernel")
    return meta, cubin


def _unlink(folder: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)
