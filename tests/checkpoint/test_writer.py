"""Files appear whole or not at all, byte-identical to safetensors' own, with their digest."""

import errno
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub.checkpoint import writer
from pissa_hub.checkpoint.header import Header, TensorSpec, build_header, read_header
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter, copy_file_atomic, make_folder, write_file_atomic
from pissa_hub.errors import CheckpointError, OutputError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux's system calls")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="no permission bits")


def digest_of(path: Path) -> FileDigest:
    return FileDigest(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["in file order", "shuffled"])
def shuffled(request: pytest.FixtureRequest) -> bool:
    return request.param == "shuffled"


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.fixture
def tensors() -> dict[str, memoryview]:
    values = {
        "a": torch.randn(70, 50),
        "b": torch.randn(3, 5),
        "none": torch.empty(0),
        "scalar": torch.ones(()),
    }
    return {name: memoryview(value.numpy()) for name, value in values.items()}


@pytest.fixture
def header(tensors: dict[str, memoryview]) -> Header:
    return build_header([TensorSpec(name, "F32", data.shape) for name, data in tensors.items()], {"format": "pt"})


def test_bytes_are_those_of_save_file(
    tmp_path: Path, tensors: dict[str, memoryview], shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_WRITE_BYTES", 1000)
    monkeypatch.setattr(writer, "_WRITE_BACK_BYTES", 5000)
    expected = tmp_path / "expected.safetensors"
    save_file({name: torch.from_numpy(data.obj) for name, data in tensors.items()}, expected, {"format": "pt"})
    target = tmp_path / "model.safetensors"
    names = list(tensors)
    if shuffled:
        random.Random(0).shuffle(names)
        assert names != list(tensors)
    with ShardWriter(target, read_header(expected)) as shard:
        for name in names:
            shard.write(name, tensors[name])
            assert not target.exists()
        digest = shard.commit()
    assert target.read_bytes() == expected.read_bytes()
    assert digest == digest_of(target)
    assert names_in(tmp_path) == ["expected.safetensors", "model.safetensors"]
    assert torch.equal(load_file(target)["b"], torch.from_numpy(tensors["b"].obj))


def test_an_unfinished_file_is_full_size_and_does_not_parse(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview]
) -> None:
    with ShardWriter(tmp_path / "model.safetensors", header) as shard:
        for name, data in tensors.items():
            shard.write(name, data)
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith("model.safetensors.")
        assert partial.suffix == ".partial"
        assert partial.stat().st_size == header.file_size
        assert partial.read_bytes()[:8] == bytes(8)
    assert names_in(tmp_path) == []


def test_two_writers_of_one_target_do_not_meet(tmp_path: Path, header: Header, tensors: dict[str, memoryview]) -> None:
    target = tmp_path / "model.safetensors"
    with ShardWriter(target, header) as first, ShardWriter(target, header) as second:
        for name, data in tensors.items():
            first.write(name, data)
            second.write(name, data)
        assert first.commit() == second.commit() == digest_of(target)
    assert names_in(tmp_path) == ["model.safetensors"]


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, header: Header) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), ShardWriter(target, header):
        raise KeyboardInterrupt
    assert names_in(tmp_path) == ["model.safetensors"]
    assert target.read_bytes() == b"before"


def test_commit_needs_every_tensor(tmp_path: Path, header: Header, tensors: dict[str, memoryview]) -> None:
    with ShardWriter(tmp_path / "model.safetensors", header) as shard:
        for name in ("a", "b", "none"):
            shard.write(name, tensors[name])
        with pytest.raises(ValueError, match="1 tensors were not written, 'scalar' among them"):
            shard.commit()
    assert names_in(tmp_path) == []


def test_only_the_tensors_of_the_header(tmp_path: Path, header: Header, tensors: dict[str, memoryview]) -> None:
    with ShardWriter(tmp_path / "model.safetensors", header) as shard:
        with pytest.raises(KeyError):
            shard.write("c", tensors["a"])
        with pytest.raises(ValueError, match="60 bytes for the 14000 of 'a'"):
            shard.write("a", tensors["b"])
        shard.write("a", tensors["a"])
        with pytest.raises(ValueError, match="'a' is written twice"):
            shard.write("a", tensors["a"])


@posix_only
def test_modes_follow_the_umask(tmp_path: Path, header: Header, tensors: dict[str, memoryview], umask: int) -> None:
    with ShardWriter(tmp_path / "shard", header) as shard:
        for name, data in tensors.items():
            shard.write(name, data)
        shard.commit()
    write_file_atomic(tmp_path / "small", b"{}")
    (tmp_path / "small").chmod(0o600)
    copy_file_atomic(tmp_path / "small", tmp_path / "copy")
    assert (tmp_path / "shard").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="cannot allocate ahead")
def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as caught:
        ShardWriter(tmp_path / "model.safetensors", header)
    assert f"model.safetensors: no space left for {header.file_size} bytes (" in str(caught.value)
    assert " free); free some space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_works_where_nothing_can_be_allocated_ahead(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    target = tmp_path / "model.safetensors"
    digests = set()
    for missing in (False, True):
        if missing:
            for name in ("posix_fallocate", "posix_fadvise", "copy_file_range"):
                monkeypatch.delattr(os, name, raising=False)
        else:
            monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
        with ShardWriter(target, header) as shard:
            for name, data in tensors.items():
                shard.write(name, data)
            digests.add(shard.commit())
        assert copy_file_atomic(target, tmp_path / "copy") in digests
    assert digests == {digest_of(target)}


def test_short_writes_are_carried_on(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reluctant(writer.FileIO):
        def write(self, data: memoryview) -> int:
            return super().write(data[:100])

    monkeypatch.setattr(writer, "FileIO", Reluctant)
    target = tmp_path / "model.safetensors"
    with ShardWriter(target, header) as shard:
        for name, data in tensors.items():
            shard.write(name, data)
        assert shard.commit() == digest_of(target)
    assert read_header(target) == header
    assert target.read_bytes()[header["a"].start : header["a"].stop] == tensors["a"].tobytes()


def test_missing_folder(tmp_path: Path, header: Header) -> None:
    with pytest.raises(OutputError, match=r"model\.safetensors cannot be written: No such file.*; check the folder"):
        ShardWriter(tmp_path / "absent" / "model.safetensors", header)


@pytest.mark.parametrize("data", [b"", b"{}", bytes(range(256)) * 1000])
def test_write_file_atomic(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"before")
    assert write_file_atomic(path, data) == digest_of(path)
    assert path.read_bytes() == data
    assert names_in(tmp_path) == ["config.json"]


@linux_only
def test_long_files_are_written_back_early(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: ranges.append((start, size)))
    monkeypatch.setattr(writer, "_WRITE_BYTES", 1000)
    monkeypatch.setattr(writer, "_WRITE_BACK_BYTES", 4000)
    with ShardWriter(tmp_path / "model.safetensors", header) as shard:
        shard.write("a", tensors["a"])
    assert ranges == [(header["a"].start + start, 4000) for start in (0, 4000, 8000)]


@linux_only
def test_files_and_folder_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112  # of an open file
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_file_atomic(tmp_path / "x", b"1")
    assert events == ["file", "replace", "folder"]


@linux_only
def test_copies_are_reflinks_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        return os.write(target, os.pread(source, 1000, 0))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(writer, "_copy_in_kernel", lambda *_: pytest.fail("copied"))
    (tmp_path / "source").write_bytes(b"shared")
    assert copy_file_atomic(tmp_path / "source", tmp_path / "target") == digest_of(tmp_path / "source")


@pytest.mark.parametrize("way", ["best", "no reflink", "within memory"])
def test_copy_file_atomic(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "best":
        monkeypatch.setattr(writer, "_reflink", lambda *_: False)
    if way == "within memory":
        monkeypatch.setattr(writer, "_copy_in_kernel", lambda *_: None)
    source, target = tmp_path / "source", tmp_path / "target"
    for data in (b"", b"x" * 3_000_001):
        source.write_bytes(data)
        assert copy_file_atomic(source, target) == digest_of(source)
        assert target.read_bytes() == data
    with source.open("r+b") as file:
        file.write(b"changed")
    assert target.read_bytes() == data, "the copy is independent of the source"
    assert names_in(tmp_path) == ["source", "target"]


def test_copy_carries_on_where_the_kernel_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def halfway(source: int, target: int, count: int) -> int:
        if calls:
            raise OSError(errno.EIO, "Input/output error")
        calls.append(count)
        return os.write(target, os.read(source, 1000))

    monkeypatch.setattr(writer, "_reflink", lambda *_: False)
    monkeypatch.setattr(os, "copy_file_range", halfway, raising=False)
    (tmp_path / "source").write_bytes(os.urandom(2500))
    assert copy_file_atomic(tmp_path / "source", tmp_path / "target") == digest_of(tmp_path / "source")
    assert calls


def test_copy_of_a_file_that_changes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"0" * 1000)

    def growing(original: writer.FileIO, _: writer.FileIO) -> bool:
        with source.open("ab") as file:
            file.write(b"more")
        return False

    monkeypatch.setattr(writer, "_reflink", growing)
    with pytest.raises(CheckpointError, match="source changed while being copied"):
        copy_file_atomic(source, tmp_path / "target")
    assert names_in(tmp_path) == ["source"]


def test_copy_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="source cannot be read: No such file"):
        copy_file_atomic(tmp_path / "source", tmp_path / "target")
    (tmp_path / "source").write_bytes(b"1")
    with pytest.raises(OutputError, match="target cannot be written: No such file"):
        copy_file_atomic(tmp_path / "source", tmp_path / "absent" / "target")


@linux_only
def test_folders_are_made_durable_each_in_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert synced[-3:] == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path / "a" / "b"], "whoever made it may have been killed before that"


def test_a_folder_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OutputError, match=f"^{tmp_path / 'a'} cannot be written: "):
            make_folder(folder)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_synced_are_left_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(path: Path, *rest: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    assert write_file_atomic(tmp_path / "x", b"1") == digest_of(tmp_path / "x")


@pytest.mark.skipif(sys.platform == "win32", reason="no folder is synced")
def test_a_folder_that_fails_to_sync_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(path: Path, *rest: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "open", failed)
    with pytest.raises(OutputError, match="x cannot be written: Input/output error; check the folder, its permissions"):
        write_file_atomic(tmp_path / "x", b"1")


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "disk quota exceeded")])
def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str) -> None:
    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=rf"x: {said} \(\d+ free\); free some space or choose another output folder"):
        write_file_atomic(tmp_path / "x", b"1")
    assert names_in(tmp_path) == []


def test_the_first_error_is_the_one_that_is_told(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that can no longer be written gives up the unfinished file only with an error of its own."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    shard = ShardWriter(tmp_path / "model.safetensors", header)
    for name, data in tensors.items():
        shard.write(name, data)
    with pytest.raises(OutputError, match=r"model\.safetensors cannot be written: Read-only file system"), shard:
        shard.commit()


def test_what_cannot_be_read_back_is_an_error_of_the_output(
    tmp_path: Path, header: Header, tensors: dict[str, memoryview], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(writer.FileIO):
        def readinto(self, buffer: memoryview) -> int:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "source").write_bytes(b"1")
    monkeypatch.setattr(writer, "FileIO", Failing)
    shard = ShardWriter(tmp_path / "model.safetensors", header)
    for name in reversed(tensors):
        shard.write(name, tensors[name])
    with pytest.raises(OutputError, match=r"model\.safetensors cannot be written: Input/output error"), shard:
        shard.commit()
    with pytest.raises(OutputError, match="copy cannot be written: Input/output error"):
        copy_file_atomic(tmp_path / "source", tmp_path / "copy")
    assert names_in(tmp_path) == ["source"]
