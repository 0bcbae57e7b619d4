"""From finished shards to a finished folder: one adapter, configs, carried files, the card, and last the manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from pissa_hub import __version__
from pissa_hub.checkpoint.header import Header, read_header
from pissa_hub.checkpoint.reader import ShardReader
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter, copy_file_atomic, write_file_atomic
from pissa_hub.hub.card import residual_card
from pissa_hub.manifest import MANIFEST_NAME, Manifest, SourceRecord
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, ADAPTER_NAME, Plan
from pissa_hub.pipeline.receipts import Receipt, WorkFolder

CARD_NAME = "README.md"


def finish(plan: Plan, receipts: Sequence[Receipt], output: Path, work: WorkFolder, device: torch.device) -> Manifest:
    """Write all that is not a shard; the manifest, written last, makes the folder finished.

    Args:
        plan: what was done.
        receipts: one for every shard of the plan, in its order.
        output, work: the folders.
        device: that the factors were computed on.
    """
    checkpoint = plan.checkpoint
    (output / ADAPTER_FOLDER).mkdir(exist_ok=True)
    adapter = f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"
    parts = [work.adapter_part(receipt.shard) for receipt in receipts if receipt.adapter]
    files = {receipt.shard: receipt.output for receipt in receipts}
    files[adapter] = _assemble(parts, plan.adapter, output / adapter)
    for name, data in plan.generated.items():
        files[name] = write_file_atomic(output / name, data)
    for name in checkpoint.other_files:
        if name not in files:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = copy_file_atomic(checkpoint.files.path(name), output / name)
    manifest = Manifest(
        tool={"name": "pissa_hub", "version": __version__},
        source=SourceRecord(
            checkpoint.repo_id,
            checkpoint.revision,
            checkpoint.license,
            {receipt.shard: receipt.source for receipt in receipts},
        ),
        settings=plan.settings.as_dict(),
        weights=tuple(weight for receipt in receipts for weight in receipt.weights),
        files=files,
        environment=_environment(device),
    )
    files[CARD_NAME] = write_file_atomic(output / CARD_NAME, residual_card(plan, manifest).encode())
    write_file_atomic(output / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _assemble(parts: Sequence[Path], header: Header, target: Path) -> FileDigest:
    """One safetensors file from the shards' parts, a tensor at a time."""
    readers = {path: ShardReader(path, read_header(path)) for path in parts}
    try:
        places = {entry.name: (path, entry) for path in parts for entry in read_header(path).entries}
        with ShardWriter(target, header) as writer:
            for entry in header.entries:
                path, place = places[entry.name]
                data = memoryview(bytearray(entry.nbytes))
                readers[path].read_into(place, data)
                writer.write(entry.name, data)
            return writer.commit()
    finally:
        for reader in readers.values():
            reader.close()


def _environment(device: torch.device) -> Mapping[str, str | int]:
    """What the exact bytes depend on beside source and settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
