"""The restored folder is the decomposed one, byte for byte, however it was made and whatever interrupts it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pissa_hub import decompose, restore, verify
from pissa_hub.errors import OutputError, VerificationError
from pissa_hub.pipeline import workers

from ..conftest import SHARDED, Factory
from ..helpers import MANIFEST, files_of
from ..interrupted import snapshots_of, work_done_from

SHARDS = 4


def adapter_only(folder: Path, target: Path, *more: str) -> Path:
    """What is published without the residual: the manifest, the initial adapter and ``more``."""
    target.mkdir()
    for name in (MANIFEST, *more):
        shutil.copy(folder / name, target)
    shutil.copytree(folder / "pissa_init", target / "pissa_init")
    return target


@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        ("LlamaForCausalLM", torch.float32, {}),
        ("LlamaForCausalLM", torch.bfloat16, {}),
        ("LlamaForCausalLM", torch.float16, {"shard_size": SHARDED}),
        ("LlamaForCausalLM", torch.bfloat16, {"shard_size": SHARDED, "residual_dtype": "float32"}),
        ("LlamaForCausalLM", torch.float32, {"shard_size": SHARDED, "residual_dtype": "bfloat16"}),
        ("LlamaForCausalLM", torch.bfloat16, {"adapter_dtype": "bfloat16"}),
        ("LlamaForCausalLM", torch.bfloat16, {"use_rslora": True, "alpha": 7.0, "rank_pattern": {"q_proj": 2}}),
        ("LlamaForCausalLM", torch.float32, {"targets": "q_proj,v_proj", "svd": "randomized", "niter": 2}),
        ("GPT2LMHeadModel", torch.float32, {}),
        ("GPT2LMHeadModel", torch.bfloat16, {"residual_dtype": "float16", "alpha": 3.0}),
        ("BertModel", torch.float32, {}),
        ("T5ForConditionalGeneration", torch.bfloat16, {"adapter_dtype": "float16"}),
    ],
)
def test_bytes_are_those_of_the_decomposition(
    tiny_checkpoint: Factory, tmp_path: Path, architecture: str, dtype: torch.dtype, settings: dict[str, object]
) -> None:
    shard_size = settings.pop("shard_size", None)
    source = tiny_checkpoint(architecture, dtype=dtype, shard_size=shard_size)
    decomposed = tmp_path / "decomposed"
    decompose(source, decomposed, **{"rank": 4, **settings})
    init = adapter_only(decomposed, tmp_path / "init")
    restored = restore(source, init, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(decomposed)
    assert restored.manifest.to_bytes() == (decomposed / MANIFEST).read_bytes()
    assert not restored.was_finished


@pytest.fixture(scope="module")
def original(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with files beside it."""
    folder = tmp_path_factory.mktemp("original") / "model"
    shutil.copytree(tiny_checkpoint(shard_size=SHARDED, num_hidden_layers=1), folder)
    (folder / "tokenizer.json").write_text('{"tokens": []}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The original\n")
    assert len(list(folder.glob("*.safetensors"))) == SHARDS
    return folder


@pytest.fixture(scope="module")
def decomposed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("decomposed") / "out"
    decompose(original, output, rank=4)
    return output


@pytest.mark.parametrize("init", ["whole folder", "its pissa_init", "published", "published with its card", "link"])
def test_wherever_the_adapter_lies(original: Path, decomposed: Path, tmp_path: Path, init: str) -> None:
    folder = {
        "whole folder": lambda: decomposed,
        "its pissa_init": lambda: decomposed / "pissa_init",
        "published": lambda: adapter_only(decomposed, tmp_path / "init"),
        "published with its card": lambda: adapter_only(decomposed, tmp_path / "init", "README.md") / "pissa_init",
        "link": lambda: linked(tmp_path / "link", decomposed / "pissa_init"),
    }[init]()
    restore(original, folder, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(decomposed)


def linked(link: Path, target: Path) -> Path:
    link.symlink_to(target, target_is_directory=True)
    return link


def test_result_is_sound(original: Path, decomposed: Path, tmp_path: Path) -> None:
    restore(original, decomposed, tmp_path / "restored")
    assert verify(tmp_path / "restored", original, sample=-1).is_sound


def test_nothing_is_decomposed(
    original: Path, decomposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("an SVD")

    monkeypatch.setattr(workers, "truncated_svd", never)
    with pytest.raises(AssertionError, match="an SVD"):
        decompose(original, tmp_path / "again", rank=4)
    restore(original, decomposed, tmp_path / "restored")


def test_card_of_another_kind_in_the_init_folder_is_not_taken(original: Path, decomposed: Path, tmp_path: Path) -> None:
    """The publisher of an adapter may have written a card of their own."""
    init = adapter_only(decomposed, tmp_path / "init")
    (init / "README.md").write_text("# My adapter\n")
    restore(original, init, tmp_path / "restored")
    assert files_of(tmp_path / "restored") == files_of(decomposed)


def test_finished_folder_is_left_as_it_is(original: Path, decomposed: Path, tmp_path: Path) -> None:
    restore(original, decomposed, tmp_path / "restored")
    before = {name: (tmp_path / "restored" / name).stat().st_mtime_ns for name in files_of(tmp_path / "restored")}
    again = restore(original, decomposed, tmp_path / "restored")
    assert again.was_finished
    assert {name: (tmp_path / "restored" / name).stat().st_mtime_ns for name in before} == before


def test_folder_that_decompose_finished_counts_as_finished(original: Path, decomposed: Path, tmp_path: Path) -> None:
    init = adapter_only(decomposed, tmp_path / "init")
    assert restore(original, init, decomposed).was_finished
    assert decompose(original, decomposed, rank=4).was_finished


def test_damaged_finished_folder_is_not_called_finished(original: Path, decomposed: Path, tmp_path: Path) -> None:
    restore(original, decomposed, tmp_path / "restored")
    (tmp_path / "restored" / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match=r"tokenizer\.json is damaged or gone"):
        restore(original, decomposed, tmp_path / "restored")


def test_every_point_of_a_run_is_one_to_carry_on_from(original: Path, decomposed: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    snapshots = snapshots_of(lambda output: restore(original, decomposed, output), tmp_path / "snapshots")
    assert len(snapshots) > 2 * SHARDS

    def carry_on(output: Path) -> int:
        outcome = restore(original, decomposed, output)
        return SHARDS if outcome.was_finished else outcome.carried_over

    carried = work_done_from(snapshots, carry_on, files_of(decomposed), tmp_path)
    assert carried == sorted(carried)
    assert set(carried) == set(range(SHARDS + 1))


@pytest.mark.parametrize("other", ["decompose", "restore"])
def test_unfinished_work_of_another_kind_is_refused(
    original: Path, decomposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    output = tmp_path / "restored"
    stop_at(monkeypatch, 5, lambda: restore(original, decomposed, output))
    before = files_of(output)
    decompose(original, tmp_path / "other", rank=3)
    with pytest.raises(OutputError, match="unfinished work of another plan"):
        decompose(original, output, rank=4) if other == "decompose" else restore(original, tmp_path / "other", output)
    assert files_of(output) == before


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, run: Callable[[], object]) -> None:
    """Let the disk fail at the n-th file that is synced."""
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="no space left"):
            run()


def test_full_disk_keeps_what_is_done(
    original: Path, decomposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 10, lambda: restore(original, decomposed, tmp_path / "restored"))
    assert restore(original, decomposed, tmp_path / "restored").carried_over > 0
    assert files_of(tmp_path / "restored") == files_of(decomposed)


@pytest.mark.parametrize("stopped_at", [7, 25])
def test_nothing_is_left_if_the_source_changed_meanwhile(
    original: Path, decomposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Not even of the files that come after the shards."""
    source = Path(shutil.copytree(original, tmp_path / "source"))
    output = tmp_path / "restored"
    stop_at(monkeypatch, stopped_at, lambda: restore(source, decomposed, output))
    assert (output / "pissa_init").exists() == (stopped_at == 25)
    for path in source.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(VerificationError, match="is not the source of this decomposition"):
        restore(source, decomposed, output)
    assert not list(output.iterdir())
