"""``convert``: a trained PiSSA adapter as a standard LoRA for the original base, from files alone.

Two passes over the modules, so that the result's header is known before a byte is written and memory does not grow
with their number: the first finds the singular values of every change, from which the ranks follow; the second writes
the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa_hub import __version__
from pissa_hub.adapter.config import CONFIG_NAME, to_json
from pissa_hub.adapter.export import lora_config, module_specs, saved_specs
from pissa_hub.adapter.initial import INITIAL_FILES, Initial, hub_id, open_initial
from pissa_hub.adapter.pairs import Pair, pair_up, require_descent
from pissa_hub.adapter.peft_files import (
    ADAPTER_FILES,
    CONVERSION_NAME,
    WEIGHTS_NAME,
    Adapter,
    open_adapter,
    read_finite,
)
from pissa_hub.adapter.record import ConversionRecord, ModuleRecord, load_conversion
from pissa_hub.adapter.servers import Server, find_server, require_servable
from pissa_hub.adapter.settings import AUTO, EXACT, ConversionSettings
from pissa_hub.adapter.workers import Spectrum, Worker, in_order, team_of
from pissa_hub.checkpoint.encoding import is_plain
from pissa_hub.checkpoint.folder import folder_that_appears_whole
from pissa_hub.checkpoint.header import TORCH_DTYPES, build_header, canonical
from pissa_hub.checkpoint.reader import sha256_file
from pissa_hub.checkpoint.strict_json import parse_object
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.checkpoint.writer import FileDigest, ShardWriter, write_file_atomic
from pissa_hub.errors import AdapterError, OutputError
from pissa_hub.hub.card import lora_card
from pissa_hub.hub.pull import pull_folder
from pissa_hub.pipeline.device import pick_device
from pissa_hub.pipeline.settings import ADAPTER_DTYPES
from pissa_hub.pipeline.threads import Team
from pissa_hub.progress import Progress, Silent

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Conversion:
    """What a call of :func:`convert` did: the record of the result, and whether it had been there before."""

    record: ConversionRecord
    was_finished: bool


def convert(
    adapter: str | Path,
    init: str | Path,
    output: str | Path,
    *,
    trust_init: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Conversion:
    """Convert a trained PiSSA adapter to a standard LoRA for the original base.

    Per module Delta W = s' B' A' - s B A (PiSSA, arXiv 2404.02948, appendix C), recompressed; see ``adapter.delta``.

    Args:
        adapter: folder that the trainer saved. It and ``init`` may be ``org/name[@revision]`` on the Hub.
        init: what it started from; see ``adapter.initial.open_initial``.
        output: folder to write; absent, empty, or of the same conversion.
        trust_init: skip the check that the adapter descends from ``init`` by its content.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        progress: told how far it is.
        settings: fields of :class:`ConversionSettings`, e.g. ``rank=16``.

    Raises:
        PissaHubError: see ``errors``; nothing is left behind.
    """
    chosen = ConversionSettings(**settings)
    server = find_server(chosen.server)
    trained = open_adapter(pull_folder(adapter, {*ADAPTER_FILES, CONVERSION_NAME}).folder)
    initial = open_initial(pull_folder(init, INITIAL_FILES).folder)
    output = Path(output).resolve()
    pairs = pair_up(trained, initial)
    notes = require_servable(server, trained, _base_config(initial))
    job = _Job(trained, initial, pairs, chosen, server, progress or Silent())
    found = _finished(output, job)
    if found is not None:
        return Conversion(found, was_finished=True)
    job.progress.expect(2 * sum(module.lora_A.nbytes + module.lora_B.nbytes for module in trained.modules.values()))
    with team_of(trained, initial.adapter, pick_device(device), job.progress) as team:
        if not trust_init:
            require_descent(
                list(in_order(team, [partial(Worker.cosines, pair=pair) for pair in job.continued])), initial
            )
        spectra = list(in_order(team, [partial(Worker.spectrum, pair=pair) for pair in pairs]))
        ranks = job.ranks(spectra)
        with folder_that_appears_whole(output) as folder:
            record = job.write(folder, team, spectra, ranks, [*notes, *job.notes(spectra)])
    return Conversion(record, was_finished=False)


@dataclass(frozen=True)
class _Job:
    """One conversion: what goes in and what was asked for."""

    trained: Adapter
    initial: Initial
    pairs: tuple[Pair, ...]
    settings: ConversionSettings
    server: Server
    progress: Progress = field(repr=False)

    @property
    def is_uniform(self) -> bool:
        """Whether all modules get one rank; patterns cannot name parameters by what their adapter's file says."""
        return self.server.is_uniform or bool(self.trained.config.target_parameters)

    @property
    def continued(self) -> list[Pair]:
        """The pairs that have an initial state."""
        return [pair for pair in self.pairs if pair.initial is not None]

    @property
    def base_model(self) -> str | None:
        """Hub id of the original model, if anything says it."""
        known = self.settings.base_model or self.initial.base_model
        if known is None and self.initial.manifest is None:
            known = hub_id(self.trained.config.table.get("base_model_name_or_path"))
        return known

    def ranks(self, spectra: Sequence[Spectrum]) -> list[int]:
        """The rank of every module. Raises AdapterError if the server has none that is large enough."""
        if self.settings.rank == AUTO:
            needed = [spectrum.rank_within(self.settings.largest_tail) for spectrum in spectra]
        else:
            limit = math.inf if self.settings.rank == EXACT else int(self.settings.rank)
            needed = [int(min(spectrum.exact_rank, limit)) for spectrum in spectra]
        needed = [max(rank, 1) for rank in needed]
        return [self.server.rank_for(max(needed))] * len(needed) if self.is_uniform else needed

    def notes(self, spectra: Sequence[Spectrum]) -> Iterator[str]:
        """What whoever uses the result should know."""
        if not any(spectrum.norm for spectrum in spectra):
            yield "nothing was trained: adapter and initial state are the same, and the result changes nothing"
        for pair in self.pairs:
            if pair.initial is not None and not math.isclose(pair.trained.scaling, pair.initial.scaling, rel_tol=1e-6):
                yield (
                    f"{pair.trained.name} is scaled by {pair.trained.scaling:g} where its initial state was by "
                    f"{pair.initial.scaling:g}: the conversion follows both configs as they are"
                )
                break
        if self.base_model is None:
            yield "the original model's id is not known: base_model_name_or_path is left empty (--base-model sets it)"
        if self.initial.manifest is None:
            narrow = {pair.initial.lora_A.dtype for pair in self.pairs if pair.initial} - {"F32"}
            if narrow:
                yield (
                    f"the initial factors are stored in {'/'.join(sorted(narrow))}: PEFT took its residual from wider "
                    "ones, so what their rounding lost is not in this adapter"
                )
        if any(pair.trained.experts > 1 for pair in self.pairs):
            yield "fused experts are adapted: PEFT before 0.20 does not load that"
        if self.trained.base_weights:
            yield f"copies of base weights were left out: {', '.join(self.trained.base_weights)}"

    def write(
        self,
        folder: Path,
        team: Team[Worker],
        spectra: Sequence[Spectrum],
        ranks: Sequence[int],
        notes: Sequence[str],
    ) -> ConversionRecord:
        """All files of the result."""
        dtype = ADAPTER_DTYPES[self.settings.dtype]
        specs = [module_specs(pair.trained, rank, dtype) for pair, rank in zip(self.pairs, ranks, strict=True)]
        saved = saved_specs(self.trained)
        header = build_header(
            canonical([*(spec for parts in specs for spec in parts.values()), *saved.values()]), {"format": "pt"}
        )
        jobs = [
            partial(Worker.factors, pair=pair, rank=rank, dtype=TORCH_DTYPES[dtype])
            for pair, rank in zip(self.pairs, ranks, strict=True)
        ]
        records: list[ModuleRecord] = []
        with ShardWriter(folder / WEIGHTS_NAME, header) as writer:
            for pair, parts, spectrum, written in zip(self.pairs, specs, spectra, in_order(team, jobs), strict=True):
                for part, tensor in written.tensors.items():
                    writer.write(parts[part].name, _bytes(tensor))
                records.append(_record(pair, ranks[len(records)], spectrum, written.error))
            with TensorFile(self.trained.path, self.trained.header) as source:
                for stored, spec in saved.items():
                    if is_plain(spec.dtype):
                        read_finite(source, stored)
                    writer.write(spec.name, source.read_bytes(stored))
            files = {WEIGHTS_NAME: writer.commit()}
        self._require_within(records)
        rank_of = {pair.trained.name: rank for pair, rank in zip(self.pairs, ranks, strict=True)}
        config = lora_config(self.trained.config.table, rank_of, self.base_model, for_peft=self.server.name == "peft")
        files[CONFIG_NAME] = write_file_atomic(folder / CONFIG_NAME, to_json(config))
        record = ConversionRecord(
            tool={"name": "pissa_hub", "version": __version__},
            settings=self.settings.as_dict(),
            adapter=_digests(self.trained),
            init=self.initial.digest,
            base=self._base(),
            modules=tuple(records),
            notes=tuple(notes),
            files=files,
        )
        files[CARD_NAME] = write_file_atomic(
            folder / CARD_NAME, lora_card(record, self.trained.config.table.get("task_type")).encode()
        )
        write_file_atomic(folder / CONVERSION_NAME, record.to_bytes())
        return record

    def _require_within(self, records: Sequence[ModuleRecord]) -> None:
        worst = max(records, key=lambda record: record.error)
        if self.settings.max_error is not None and worst.error > self.settings.max_error:
            raise AdapterError(
                f"{worst.module} misses its change by {worst.error:.2e}, mostly by rounding to {self.settings.dtype}",
                "choose a wider --dtype or a larger --max-error",
            )

    def _base(self) -> dict[str, Any]:
        manifest = self.initial.manifest
        if manifest is None:
            return {"repo_id": self.base_model, "revision": None, "license": None, "files": {}, "deviation": None}
        source = manifest.source
        return {
            "repo_id": self.base_model,
            "revision": source.revision,
            "license": source.license,
            "files": {name: {"size": digest.size, "sha256": digest.sha256} for name, digest in source.files.items()},
            "deviation": max(weight.reconstruction.relative_frobenius for weight in manifest.weights),
        }


def _record(pair: Pair, rank: int, spectrum: Spectrum, error: float) -> ModuleRecord:
    module = pair.trained
    return ModuleRecord(
        module=module.name,
        shape=(module.out_features, module.in_features),
        rank=rank,
        exact_rank=spectrum.exact_rank,
        update=spectrum.norm / spectrum.initial_norm if spectrum.initial_norm else None,
        error=error / spectrum.norm if spectrum.norm else 0.0,
    )


def _finished(output: Path, job: _Job) -> ConversionRecord | None:
    """The record, if ``output`` holds this very conversion, whole; None if it may be written. Raises OutputError."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise OutputError(f"{output} is not a folder", "choose another one")
    if not any(output.iterdir()):
        if output == Path.cwd():
            raise OutputError(f"{output} is the current folder", "give a new one")
        return None
    try:
        record = load_conversion(output)
    except AdapterError:
        raise OutputError(f"{output} is not empty", "choose another folder") from None
    asked = (job.settings.as_dict(), _digests(job.trained), job.initial.digest)
    if (record.settings, record.adapter, record.init) != asked:
        raise OutputError(f"{output} holds another conversion", "choose another folder or remove it")
    for name, digest in record.files.items():
        path = output / name
        if not path.is_file() or FileDigest(*sha256_file(path)) != digest:
            raise OutputError(
                f"{output} was finished, but {name} is damaged or gone", "remove the folder and start again"
            )
    return record


def _digests(adapter: Adapter) -> dict[str, FileDigest]:
    return {name: FileDigest(*sha256_file(adapter.folder / name)) for name in (WEIGHTS_NAME, CONFIG_NAME)}


def _base_config(initial: Initial) -> dict[str, Any]:
    """The residual's config.json, where there is one."""
    try:
        return parse_object((initial.root / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
