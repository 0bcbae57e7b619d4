"""From finished shards to a finished folder: one adapter, configs, carried files, the card, and last the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pissa_hub import __version__
from pissa_hub.checkpoint.writer import copy_file_atomic, make_folder, write_file_atomic
from pissa_hub.hub.card import residual_card
from pissa_hub.manifest import MANIFEST_NAME, Manifest, SourceRecord
from pissa_hub.pipeline.pieces import assemble, factor_part
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, ADAPTER_NAME, Plan
from pissa_hub.pipeline.receipts import Receipt, WorkFolder, joint_environment

CARD_NAME = "README.md"


def finish(plan: Plan, receipts: Sequence[Receipt], output: Path, work: WorkFolder) -> Manifest:
    """Write all that is not a shard; the manifest, written last, makes the folder finished.

    Args:
        plan: what was done.
        receipts: one for every shard of the plan, in its order.
        output, work: the folders.
    """
    checkpoint = plan.checkpoint
    make_folder(output / ADAPTER_FOLDER)
    adapter = f"{ADAPTER_FOLDER}/{ADAPTER_NAME}"
    made = zip(plan.shards, receipts, strict=True)
    parts = [part for shard, receipt in made if (part := factor_part(shard, receipt, work))]
    files = {receipt.shard: receipt.output for receipt in receipts}
    files[adapter] = assemble(parts, plan.adapter, output / adapter)
    for name, data in plan.generated.items():
        files[name] = write_file_atomic(output / name, data)
    for name in checkpoint.other_files:
        if name not in files:
            make_folder((output / name).parent)
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
        environment=joint_environment(receipts),
    )
    files[CARD_NAME] = write_file_atomic(output / CARD_NAME, residual_card(plan, manifest).encode())
    write_file_atomic(output / MANIFEST_NAME, manifest.to_bytes())
    return manifest
