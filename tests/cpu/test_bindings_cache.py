"""The kernel cache: what it keeps, what it refuses, and that it is never in the way."""

import os
import stat
import threading
import warnings

import pytest

from megamoe_cuda import cache
from megamoe_cuda.cache import Cache

KEY, OTHER = "ab" * 32, "cd" * 32
META = {"entry": "kernel", "log": "a\nb"}
CUBIN = b"\x7fELF\n\0code\n"


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch):
    monkeypatch.setattr(cache, "_warned", set())


@pytest.fixture
def store(tmp_path):
    made = Cache(tmp_path / "root")
    assert made.save(KEY, META, CUBIN) == made.path(KEY)
    return made


def refused(store, reason: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"refused and compiled again: {reason}"):
        assert store.load(KEY) is None
    assert not os.path.lexists(store.path(KEY))


def test_an_entry_comes_back_and_an_absent_one_is_silent(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(KEY) == (META, CUBIN)
        assert store.load(OTHER) is None


def test_folder_and_entries_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        store = Cache(tmp_path / "root")
        store.save(KEY, META, CUBIN)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path(KEY).stat().st_mode) == 0o600
    assert [path.name for path in store.directory.iterdir()] == [store.path(KEY).name]


def test_a_folder_others_could_write_is_closed_to_them(store):
    store.directory.chmod(0o777)
    assert store.load(KEY) == (META, CUBIN)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("cut", [1, 30, len(CUBIN), 100])
def test_a_truncated_entry_is_refused(store, cut):
    data = store.path(KEY).read_bytes()
    store.path(KEY).write_bytes(data[:-cut])
    refused(store, "its digest does not match|it is not a kernel")


def test_a_changed_byte_is_refused(store):
    data = bytearray(store.path(KEY).read_bytes())
    data[-3] ^= 1
    store.path(KEY).write_bytes(data)
    refused(store, "its digest does not match")


@pytest.mark.parametrize("data", [b"", b"\x7fELF plain cubin", bytes(range(64))], ids=["empty", "cubin", "noise"])
def test_a_file_of_another_kind_is_refused(store, data):
    store.path(KEY).write_bytes(data)
    refused(store, "it is not a kernel cache entry")


def test_the_entry_of_another_key_is_refused(store):
    store.save(OTHER, META, CUBIN)
    os.rename(store.path(OTHER), store.path(KEY))
    refused(store, "it holds another kernel")


def test_an_entry_others_could_write_is_refused(store):
    store.path(KEY).chmod(0o666)
    refused(store, r"others may write it \(mode 666\)")


def test_an_entry_of_another_user_is_refused(store, monkeypatch):
    real = os.fstat

    def of_another_user(handle):
        status = real(handle)
        return os.stat_result((*status[:4], status.st_uid + 1, *status[5:])) if stat.S_ISREG(status.st_mode) else status

    monkeypatch.setattr(cache.os, "fstat", of_another_user)
    refused(store, f"it belongs to user {os.geteuid() + 1}")


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_link_or_a_fifo_under_the_name_is_refused(store, kind, tmp_path):
    data = store.path(KEY).read_bytes()
    store.path(KEY).unlink()
    if kind == "fifo":
        os.mkfifo(store.path(KEY), 0o600)
    else:
        (tmp_path / "elsewhere").write_bytes(data)
        store.path(KEY).symlink_to(tmp_path / "elsewhere")
    refused(store, ".*")


def warns_once_and_works_without(store):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert store.load(KEY) is None and store.save(KEY, META, CUBIN) is None
        assert Cache(store.directory.parent).save(OTHER, META, CUBIN) is None
    assert len(caught) == 1
    assert "cannot be used" in str(caught[0].message) and "MEGAMOE_CACHE_DIR" in str(caught[0].message)
    assert store.problem()


def test_a_folder_that_cannot_be_made_warns_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    warns_once_and_works_without(Cache(tmp_path / "file"))


def test_a_folder_of_another_user_is_not_used(store, monkeypatch):
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    warns_once_and_works_without(store)


def test_a_linked_folder_is_not_used(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "kernels").symlink_to(tmp_path / "theirs")
    warns_once_and_works_without(Cache(tmp_path / "root"))
    assert not list((tmp_path / "theirs").iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Cache(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "rename", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert store.save(KEY, META, CUBIN) is None
    assert not list(store.directory.iterdir())


def test_concurrent_writers_and_readers_see_whole_entries(tmp_path):
    store, seen = Cache(tmp_path), []
    cubins = {bytes([i]) * 100_000 for i in range(8)}
    threads = [threading.Thread(target=lambda cubin=cubin: (store.save(KEY, META, cubin), seen.append(store.load(KEY))))
               for cubin in cubins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and all(meta == META and cubin in cubins for meta, cubin in seen)
    assert len(list(store.directory.iterdir())) == 1


def test_the_folder_is_the_argument_then_the_variable_then_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MEGAMOE_CACHE_DIR", raising=False)
    assert cache.directory() == tmp_path / "home" / ".cache" / "megamoe" / "kernels"
    monkeypatch.setenv("MEGAMOE_CACHE_DIR", str(tmp_path / "named"))
    assert cache.directory() == tmp_path / "named" / "kernels"
    assert cache.directory(tmp_path / "given") == tmp_path / "given" / "kernels"
    assert not list(tmp_path.iterdir())
