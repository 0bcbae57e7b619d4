"""Headers: byte-exact against safetensors, and strict against everything else."""

import json
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from pissa_hub.checkpoint.header import (
    CANONICAL_ORDER,
    DTYPES,
    TORCH_DTYPES,
    Header,
    TensorSpec,
    build_header,
    canonical,
    read_header,
)
from pissa_hub.errors import HeaderError

GOLDEN = (
    b"\xc8\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"\xc3\xa9":{"dtype":"F32","shape":[],"data_offsets":[8,12]},'
    b'"a":{"dtype":"BF16","shape":[0,3],"data_offsets":[12,12]}}'
    b"   "
)
# safetensors 0.6, the oldest that is supported, lacks these; what every version knows is left to judge by.
NEWER = {"C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
SPECS = st.lists(
    st.builds(
        TensorSpec,
        NAMES,
        st.sampled_from([name for name, bits in DTYPES.items() if bits >= 8 and name not in NEWER]),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


def store(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(start: int, stop: int, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def refusal(path: Path) -> str:
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000 + len(str(path))
    assert caught.value.remedy
    return message


def test_golden_bytes() -> None:
    specs = [TensorSpec("b", "F32", (2,)), TensorSpec("é", "F32", ()), TensorSpec("a", "BF16", (0, 3))]
    header = build_header(specs, {"format": "pt"})
    assert header.raw == GOLDEN
    assert header.data_start == len(GOLDEN)
    assert header.file_size == len(GOLDEN) + 12
    assert [(entry.start, entry.stop) for entry in header.entries] == [(208, 216), (216, 220), (220, 220)]


def test_golden_empty() -> None:
    assert build_header([], {}).raw == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "


def storable_dtypes() -> list[tuple[str, torch.dtype]]:
    """Those that the installed safetensors can save; old versions lack the newest."""
    storable = []
    for name, dtype in TORCH_DTYPES.items():
        with suppress(KeyError):
            save({"tensor": torch.zeros(1).to(dtype)})
            storable.append((name, dtype))
    assert len(storable) >= 15
    return storable


def test_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    tensors = {f"{name}.{n}": torch.zeros(n, 2).to(dtype) for name, dtype in storable_dtypes() for n in (2, 1)}
    tensors |= {'quoted "name"\\': torch.zeros(()), "empty": torch.zeros(0, 5), "ünïcode": torch.ones(3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt\n"})
    dtype_names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [TensorSpec(name, dtype_names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    built = build_header(canonical(specs), {"format": "pt\n"})
    assert built.raw == path.read_bytes()[: built.data_start]
    assert built.file_size == path.stat().st_size
    assert read_header(path) == built


def test_canonical_order_covers_every_dtype() -> None:
    assert set(CANONICAL_ORDER) == set(DTYPES)
    assert CANONICAL_ORDER[0] == "U64"
    assert CANONICAL_ORDER[-1] == "BOOL"


def test_lookup_by_name() -> None:
    header = build_header([TensorSpec("a", "F16", (3, 2)), TensorSpec("b", "F4", (4,))], {})
    assert header["a"].nbytes == 12
    assert header["b"].spec == TensorSpec("b", "F4", (4,))
    assert header["b"].nbytes == header["b"].spec.nbytes == 2
    assert "a" in header
    assert "c" not in header
    with pytest.raises(KeyError):
        header["c"]


def test_build_refuses_one_name_twice() -> None:
    with pytest.raises(ValueError, match="share a name"):
        build_header([TensorSpec("a", "F16", (1,)), TensorSpec("a", "F32", (1,))], {})


@settings(max_examples=60, deadline=None)
@given(specs=SPECS, metadata=st.dictionaries(NAMES, NAMES, max_size=3))
def test_round_trip_and_safetensors_agrees(
    tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec], metadata: dict[str, str]
) -> None:
    header = build_header(specs, metadata)
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    path.write_bytes(header.raw + bytes(header.file_size - header.data_start))
    again = read_header(path)
    assert (again.raw, again.metadata, again.file_size) == (header.raw, metadata, header.file_size)
    assert {entry.name: entry for entry in again.entries} == {entry.name: entry for entry in header.entries}
    with safe_open(path, "np") as judge:
        assert set(judge.keys()) == {spec.name for spec in specs}
        assert (judge.metadata() or {}) == metadata
        for spec in specs:
            assert tuple(judge.get_slice(spec.name).get_shape()) == spec.shape


def test_entries_are_in_file_order(tmp_path: Path) -> None:
    table = {"z": tensor(4, 6), "a": tensor(0, 4), "none": tensor(4, 4)}
    header = read_header(store(tmp_path / "x.safetensors", table, bytes(6)))
    assert [entry.name for entry in header.entries] == ["a", "none", "z"]
    assert header["z"].start == header.data_start + 4


def test_unpadded_header_is_read(tmp_path: Path) -> None:
    path = store(tmp_path / "x.safetensors", b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x")
    assert read_header(path)["a"].nbytes == 1


def test_no_file(tmp_path: Path) -> None:
    assert "is not a file" in refusal(tmp_path / "x.safetensors")
    assert "is not a file" in refusal(tmp_path)


def test_short_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x08\0\0\0")
    assert "too short for a safetensors file (4 bytes)" in refusal(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(path)


def test_claimed_header_length_is_checked_before_use(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "a header of 9223372036854775808 bytes is claimed" in refusal(path)
    path.write_bytes(struct.pack("<Q", 20_000_000) + b"{}")
    assert "19999998 bytes of its header are missing" in refusal(path)


def test_truncated_and_trailing_data(tmp_path: Path) -> None:
    path = store(tmp_path / "x.safetensors", {"a": tensor(0, 100)}, bytes(63))
    assert "is truncated: 37 bytes are missing; download" in refusal(path)
    store(path, {"a": tensor(0, 100)}, bytes(105))
    assert "has 5 bytes after its last tensor" in refusal(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "does not begin with '{'"),
        (b" {}", "does not begin with '{'"),
        (b"[]", "does not begin with '{'"),
        (b'{"a":"\xff"}', "is not UTF-8 (byte 6)"),
        (b"{", "is not valid JSON"),
        (b"{}{}", "is not valid JSON"),
        (b"{}\0", "is not valid JSON"),
        (b'{"a":' * 50_000, "is nested too deeply"),
        (b'{"a":NaN}', "holds NaN"),
        (b'{"a":{},"b":{},"a":{}}', "repeats the key 'a'"),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', "repeats the key 'dtype'"),
        (b'{"' + b"x" * 5000 + b'":0,"' + b"x" * 5000 + b'":0}', "repeats the key 'xxx"),
        (b'{"__metadata__":[]}', "__metadata__ is not an object"),
        (b'{"__metadata__":null}', "__metadata__ is not an object"),
        (b'{"__metadata__":{"k":1}}', "__metadata__ 'k' is not a string"),
        (b'{"__metadata__":{"k":"\\ud800"}}', "half of a surrogate pair, which is not valid Unicode"),
        (b'{"\\udc00":0}', "half of a surrogate pair, which is not valid Unicode"),
    ],
)
def test_malformed_json(tmp_path: Path, text: bytes, expected: str) -> None:
    assert expected in refusal(store(tmp_path / "x.safetensors", text, b"0"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (1, "exactly dtype, shape and data_offsets"),
        ({"dtype": "U8", "shape": [1]}, "exactly dtype, shape and data_offsets"),
        (tensor(0, 1) | {"extra": 1}, "exactly dtype, shape and data_offsets"),
        (tensor(0, 1, "E4M3"), "unknown dtype 'E4M3'"),
        (tensor(0, 1, "X" * 9999), "unknown dtype 'XXX"),
        (tensor(0, 1, ["U8"]), "no dtype name"),
        (tensor(0, 1, shape=1), "at most 32 sizes"),
        (tensor(0, 1, shape=[-1]), "at most 32 sizes"),
        (tensor(0, 1, shape=[True]), "at most 32 sizes"),
        (tensor(0, 1, shape=[1.0]), "at most 32 sizes"),
        (tensor(0, 1, shape=[2**64]), "at most 32 sizes"),
        (tensor(0, 1, shape=[1] * 33), "at most 32 sizes"),
        (tensor(0, 1, shape=[2**32, 2**32]), "overflows"),
        (tensor(0, 0, shape=[2**62, 2**62, 0]), "overflows"),
        (tensor(0, 1) | {"data_offsets": [1, 0]}, "not [begin, end]"),
        (tensor(0, 1) | {"data_offsets": [0]}, "not [begin, end]"),
        (tensor(0, 1) | {"data_offsets": [False, 1]}, "not [begin, end]"),
        (tensor(0, 1) | {"data_offsets": [-1, 0]}, "not [begin, end]"),
        (tensor(0, 1, "F16", [1, 1]), "spans 1 bytes, but F16 [1, 1] takes 2"),
        (tensor(0, 1, "F4", [3]), "spans 1 bytes, but F4 [3] takes 1.5"),
        (tensor(1, 2), "leaves a hole"),
    ],
)
def test_malformed_tensor(tmp_path: Path, fields: object, expected: str) -> None:
    message = refusal(store(tmp_path / "x.safetensors", {"model.weight": fields}, bytes(2)))
    assert expected in message
    assert "'model.weight'" in message


@pytest.mark.parametrize("name", ["", "a\0b", "line\nbreak", "\x7f", "\u0085", "\u2028", "\u202e", "x" * 257])
def test_bad_name(tmp_path: Path, name: str) -> None:
    assert "has a name that is" in refusal(store(tmp_path / "x.safetensors", {name: tensor(0, 1)}, b"0"))


def test_overlap_and_hole_name_the_tensor(tmp_path: Path) -> None:
    path = store(tmp_path / "x.safetensors", {"a": tensor(0, 4), "b": tensor(3, 6)}, bytes(6))
    assert "tensor 'b' overlaps" in refusal(path)
    store(path, {"a": tensor(0, 4), "b": tensor(5, 6)}, bytes(6))
    assert "tensor 'b' leaves a hole" in refusal(path)


def test_many_tensors_are_read_quickly_enough(tmp_path: Path) -> None:
    header = build_header([TensorSpec(f"layers.{n}.weight", "F32", ()) for n in range(20_000)], {})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header.raw + bytes(80_000))
    assert read_header(path) == header


def survives(path: Path, data: bytes) -> Header | None:
    path.write_bytes(data)
    try:
        return read_header(path)
    except HeaderError:
        return None


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_only_raise_header_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    survives(path, data)
    survives(path, struct.pack("<Q", len(data)) + data)
    survives(path, struct.pack("<Q", len(data) + 2) + b"{" + data + b"}")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(list(DTYPES)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(table=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), JSON_VALUES, max_size=3))
def test_random_tables_only_raise_header_error(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, object]
) -> None:
    text = json.dumps(table).encode()
    survives(tmp_path_factory.getbasetemp() / "table.safetensors", struct.pack("<Q", len(text)) + text + bytes(4))


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, len(GOLDEN) + 11), value=st.integers(0, 255), cut=st.booleans())
def test_mutations_are_refused_or_read_as_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: bool
) -> None:
    data = bytearray(GOLDEN + bytes(12))
    data[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    header = survives(path, bytes(data[:position] if cut else data))
    if header is not None:
        with safe_open(path, "np") as judge:
            assert set(judge.keys()) == {entry.name for entry in header.entries}


def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for table, data in [
        ({"a": tensor(0, 2)}, b"1"),
        ({"a": tensor(0, 2)}, b"123"),
        ({"a": tensor(0, 2), "b": tensor(1, 3)}, b"123"),
        ({"a": tensor(0, 2, "F64")}, b"12"),
    ]:
        store(path, table, data)
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass
        refusal(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no permission bits")
def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(tmp_path / "x.safetensors", {})

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert "cannot be read: Permission denied" in refusal(path)
