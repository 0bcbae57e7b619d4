"""The parsers under test: what each one reads, valid examples of it, and what has to hold for what is accepted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from safetensors.torch import save

from pissa_hub.adapter.config import read_config
from pissa_hub.adapter.export import lora_config, module_specs, saved_specs
from pissa_hub.adapter.merge_plan import plan_merge
from pissa_hub.adapter.merge_record import MERGE_NAME, load_merge
from pissa_hub.adapter.pairs import matrices_of, pair_up
from pissa_hub.adapter.peft_files import CONVERSION_NAME, Adapter, open_adapter
from pissa_hub.adapter.record import load_conversion
from pissa_hub.adapter.servers import SERVERS, require_servable
from pissa_hub.checkpoint.ancillary import carried_over
from pissa_hub.checkpoint.files import Folder
from pissa_hub.checkpoint.header import DTYPES, TensorSpec, build_header, canonical, parse_header, read_header
from pissa_hub.checkpoint.index import INDEX_NAME
from pissa_hub.checkpoint.source import Checkpoint, read_checkpoint
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.errors import PissaHubError
from pissa_hub.hub.card import decomposed_card, initial_adapter_card, lora_card, merged_card
from pissa_hub.hub.card_data import Metadata, source_metadata
from pissa_hub.hub.card_text import Place
from pissa_hub.manifest import MANIFEST_NAME, SourceRecord, load_manifest
from pissa_hub.model.modules import ModelLayout, resolve_layout
from pissa_hub.model.targets import select_targets
from pissa_hub.pipeline.plan import make_plan
from pissa_hub.pipeline.receipts import WORK_FOLDER, WorkFolder, pinned_commits
from pissa_hub.pipeline.settings import Settings
from pissa_hub.recipes import load_recipe

from .contract import RefusedError
from .mutation import join, parts_of
from .world import CARD, MODULES, PLAN_DIGEST, World

_LENGTH_BYTES = 8
# Of a file of zeros that is laid out as its header asks.
_MOST_DATA = 1 << 20
_MOST_NAMES = b'["tokenizer.json", "2_Dense/model.safetensors", "onnx/model.onnx", "a/adapter_config.json"]'
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!\\)`[^`\n]*`")
_FOREIGN_LINK = re.compile(r"(?<!\\)\]\((?!https://)")
_RAW_HTML = re.compile(r"(?<!\\)<(?!https://[\w./:%+=&?~-]+>)")


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        seeds: valid documents.
        parse: gives it one; raises AssertionError if what is accepted is not what it should be, and RefusedError if
            nothing is.
    """

    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], None]


@dataclass(frozen=True)
class Entry:
    """A target in the list.

    Attributes:
        make: the target, in a world.
        share: of the inputs of a campaign: the cheap ones take the most.
    """

    make: Callable[[World], Target]
    share: int


def header(world: World) -> Target:
    """The JSON of a safetensors header, of a file as long as it says."""

    def parse(data: bytes) -> None:
        raw = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        found = parse_header(PurePosixPath("x.safetensors"), raw, len(raw) + _claimed_bytes(data))
        again = build_header([entry.spec for entry in found.entries], found.metadata)
        assert [entry.spec for entry in parse_header(PurePosixPath("y"), again.raw, again.file_size).entries] == [
            entry.spec for entry in found.entries
        ]

    real = read_header(next(iter(sorted(world.source.glob("*.safetensors")))))
    every = build_header([TensorSpec(f"t.{name}", name, (2, 4)) for name in DTYPES], {"format": "pt", "é": "ü"})
    odd = build_header([TensorSpec("a", "F32", ()), TensorSpec("b", "BF16", (0, 3)), TensorSpec("c", "U8", (5,))], {})
    return Target(tuple(made.raw[_LENGTH_BYTES:] for made in (real, every, odd)), parse)


def safetensors(world: World) -> Target:
    """The bytes of a small safetensors file on disk."""
    path = world.scratch.fill({}) / "x.safetensors"

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        with TensorFile(path) as file:
            for entry in file.header.entries:
                assert len(file.read_bytes(entry.name)) == entry.nbytes

    return Target((_zeros_file(), save({})), parse)


def index(world: World) -> Target:
    """model.safetensors.index.json beside its shards, up to the plans that write it anew."""
    layout, path = world.layout, world.source / INDEX_NAME
    valid, trained = path.read_bytes(), open_adapter(world.trained)

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        _plan(read_checkpoint(world.source), layout, trained)

    return Target((valid, json.dumps({"weight_map": json.loads(valid)["weight_map"]}).encode()), parse)


def config(world: World) -> Target:
    """config.json beside its weights, up to the plans that write it anew; what it describes is not built."""
    layout, path, trained = world.layout, world.source / "config.json", open_adapter(world.trained)

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = read_checkpoint(world.source)
        _plan(checkpoint, layout, trained)
        for server in SERVERS.values():
            _ignoring_refusal(partial(require_servable, server, trained, checkpoint.config or {}))

    return Target((path.read_bytes(), *world.configs, b'{"torch_dtype": "float16", "x": Infinity}'), parse)


def skeleton(world: World) -> Target:
    """config.json up to the modules of the model that it describes."""
    path, tensors = world.source / "config.json", world.tensors
    assert all(resolve_layout(json.loads(data), tensors).note is None for data in world.configs)

    def parse(data: bytes) -> None:
        path.write_bytes(data)
        layout = resolve_layout(read_checkpoint(world.source).config, tensors)
        assert layout.modules
        assert (layout.architecture is None) == (layout.note is not None)
        assert (layout.note or "").isprintable()
        assert select_targets(layout, rank=1)

    return Target(world.configs, parse)


def folder(world: World) -> Target:
    """A checkpoint's folder: weights, card, modules.json and the names of further files."""

    def parse(data: bytes) -> None:
        weights, readme, modules, names = parts_of(data, 4)
        files = {"model.safetensors": weights, "README.md": readme, "modules.json": modules}
        place = world.scratch.fill(files, names)
        found = read_checkpoint(place)
        assert not [name for name in found.other_files if not (place / name).is_file()]
        assert set(found.other_files) <= set(carried_over(place, [*found.other_files, "README.md"], modules or None))
        _check_merged(found.repo_id, found.license, source_metadata(found.readme))

    weights = _zeros_file()
    return Target((join([weights, CARD.encode(), MODULES, _MOST_NAMES]), join([weights, b"", b"", b"[]"])), parse)


def card(world: World) -> Target:
    """README.md of a source, up to the cards that hand on its metadata."""

    def parse(data: bytes) -> None:
        metadata = source_metadata(data.decode(errors="replace"))
        _check_merged("org/model", None, metadata)
        _check_merged(None, "apache-2.0", metadata)
        if not metadata:
            raise RefusedError

    plain = b"---\nlicense: apache-2.0\nlanguage: en\n---\n"
    several = b'---\r\nlicense: [mit, "gpl-3.0"]\r\nlanguage: ["en"]\r\nlicense_link: LICENSE\r\n---\r\n'
    return Target((CARD.encode(), plain, several), parse)


def manifest(world: World) -> Target:
    """pissa_manifest.json behind its seal, up to the cards that quote it."""

    def parse(data: bytes) -> None:
        found = load_manifest(world.scratch.fill({MANIFEST_NAME: _sealed(data)}))
        for weight in found.weights:
            found.scaling(weight)
        metadata: Metadata = {"license": "mit"}
        source = found.source
        _check_card(decomposed_card(found, "AutoModel", metadata), _expected(source, metadata, "finetune"))
        text = initial_adapter_card(found, metadata, Place("org/name", "main"))
        _check_card(text, _expected(source, metadata, "finetune"))
        assert load_manifest(world.scratch.fill({MANIFEST_NAME: found.to_bytes()})) == found

    return Target(_unsealed(world.decomposed / MANIFEST_NAME), parse)


def adapter_config(world: World) -> Target:
    """adapter_config.json of a LoRA, up to the one that a conversion writes."""
    modules = world.initial.adapter.modules

    def parse(data: bytes) -> None:
        found = read_config(world.scratch.fill({"adapter_config.json": data}))
        ranks = {name: found.rank_of(name) for name in modules}
        assert all(found.scaling_of(name) > 0 for name in modules)
        for for_peft in (True, False):
            json.dumps(lora_config(found.table, ranks, None, for_peft=for_peft), allow_nan=False).encode()

    return Target(_adapter_configs(world), parse)


def adapter(world: World) -> Target:
    """An adapter's folder, its tensors as its header says, up to the plans of a conversion and a merge."""
    initial, residual, layout = world.initial, world.residual, world.layout

    def parse(data: bytes) -> None:
        config, text, names = parts_of(data, 3)
        raw = len(text).to_bytes(_LENGTH_BYTES, "little") + text if text else b""
        weights = raw + bytes(min(_claimed_bytes(text), _MOST_DATA)) if text else b""
        place = world.scratch.fill({"adapter_config.json": config, "adapter_model.safetensors": weights}, names)
        found = open_adapter(place)
        ranks = {module.name: module.rank for module in found.modules.values()}
        lora_config(found.config.table, ranks, None, for_peft=True)
        specs = [spec for module in found.modules.values() for spec in module_specs(module, 3, "F32").values()]
        build_header(canonical([*specs, *saved_specs(found).values()]), {})
        with TensorFile(found.path, found.header) as file:
            for module in found.modules.values():
                for A, B in matrices_of(module, file):
                    assert A.shape == (module.rank, module.in_features)
                    assert B.shape == (module.out_features, module.rank)
        _ignoring_refusal(lambda: pair_up(found, initial))
        _ignoring_refusal(lambda: plan_merge(residual, layout, found, "bfloat16", {}))
        for server in SERVERS.values():
            _ignoring_refusal(partial(require_servable, server, found, residual.config or {}))

    real = read_header(world.trained / "adapter_model.safetensors").raw[_LENGTH_BYTES:]
    configs = _adapter_configs(world)
    seeds = [
        (configs[0], real, _MOST_NAMES),
        *((text, made, b"[]") for text, made in zip(configs, _adapters(), strict=False)),
    ]
    return Target(tuple(map(join, seeds)), parse)


def recipe(world: World) -> Target:
    """A recipe's TOML file."""

    def parse(data: bytes) -> None:
        path = world.scratch.fill({"r.toml": data or b"\n"}) / "r.toml"
        found = load_recipe(path)
        Settings(**found.settings)
        found.remarks(found.settings, 1)
        assert found.adapter_size(found.ranks[0]) > 0

    folder = Path(__file__).parent.parent.parent / "manifests"
    return Target(tuple(path.read_bytes() for path in sorted(folder.glob("*.toml"))), parse)


def receipt(world: World) -> Target:
    """A shard's receipt behind its seal: none counts that is not sound, and none raises."""
    output, shard = world.unfinished
    path = output / WORK_FOLDER / f"{shard}.receipt.json"
    seeds, work, source = _unsealed(path), WorkFolder(output, PLAN_DIGEST), Folder(world.source)
    real = work.receipt(shard, source)
    assert real is not None

    def parse(data: bytes) -> None:
        path.write_bytes(_sealed(data))
        found = _never_refusing(lambda: work.receipt(shard, source))
        if found is None:
            raise RefusedError
        assert (found.shard, found.source, found.output) == (shard, real.source, real.output)
        work.write(found)
        assert work.receipt(shard, source) == found

    return Target(seeds, parse)


def plan(world: World) -> Target:
    """.pissa/plan.json behind its seal: what cannot be read is as good as none."""
    output, _ = world.unfinished
    path = output / WORK_FOLDER / "plan.json"
    seeds, work = _unsealed(path), WorkFolder(output, PLAN_DIGEST)

    def parse(data: bytes) -> None:
        path.write_bytes(_sealed(data))
        commits = _never_refusing(lambda: pinned_commits(output))
        assert all(isinstance(text, str) for pair in commits.items() for text in pair)
        assert isinstance(_never_refusing(work.found_run), str | None)
        digest = _never_refusing(work.found_digest)
        if digest is None:
            raise RefusedError
        assert isinstance(digest, str)

    return Target(seeds, parse)


def conversion(world: World) -> Target:
    """pissa_conversion.json behind its seal, up to the card that quotes it."""

    def parse(data: bytes) -> None:
        found = load_conversion(world.scratch.fill({CONVERSION_NAME: _sealed(data)}))
        base = SourceRecord(found.base["repo_id"], None, found.base["license"], {})
        _check_card(lora_card(found, "CAUSAL_LM"), _expected(base, {}, "adapter"))
        assert load_conversion(world.scratch.fill({CONVERSION_NAME: found.to_bytes()})) == found

    return Target(_unsealed(world.converted / CONVERSION_NAME), parse)


def merge_record(world: World) -> Target:
    """pissa_merge.json behind its seal, up to the card that quotes it."""

    def parse(data: bytes) -> None:
        found = load_merge(world.scratch.fill({MERGE_NAME: _sealed(data)}))
        _check_merged(found.base["repo_id"], found.base["license"], {})
        assert load_merge(world.scratch.fill({MERGE_NAME: found.to_bytes()})) == found

    return Target(_unsealed(world.merged / MERGE_NAME), parse)


TARGETS: Mapping[str, Entry] = {
    "header": Entry(header, 200),
    "safetensors": Entry(safetensors, 100),
    "index": Entry(index, 12),
    "config": Entry(config, 12),
    "skeleton": Entry(skeleton, 1),
    "folder": Entry(folder, 12),
    "card": Entry(card, 25),
    "manifest": Entry(manifest, 12),
    "adapter_config": Entry(adapter_config, 30),
    "adapter": Entry(adapter, 12),
    "recipe": Entry(recipe, 30),
    "receipt": Entry(receipt, 20),
    "plan": Entry(plan, 40),
    "conversion": Entry(conversion, 12),
    "merge_record": Entry(merge_record, 12),
}


def _plan(checkpoint: Checkpoint, layout: ModelLayout, trained: Adapter) -> None:
    """Plans that change dtypes, and with them sizes, config and index."""
    assert make_plan(checkpoint, layout, Settings(rank=2, residual_dtype="float32")).digest
    assert make_plan(checkpoint, layout, Settings(rank=2, residual_dtype="float16")).digest
    plan_merge(checkpoint, layout, trained, "float16", {})


def _check_merged(repo_id: str | None, license: str | None, metadata: Metadata) -> None:
    source = SourceRecord(repo_id, None, license, {})
    _check_card(merged_card(source, "AutoModel", metadata), _expected(source, metadata, "finetune"))


def _expected(source: SourceRecord, metadata: Metadata, relation: str) -> dict[str, Any]:
    """What a card's front matter has to say, of what is not its own."""
    named = re.fullmatch(r"(?=.{,96}$)[\w-][\w.-]*/[\w-][\w.-]*", source.repo_id or "", re.ASCII)
    base = {"base_model": source.repo_id, "base_model_relation": relation} if named else {}
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", source.license or "")
    return {**base, **({"license": source.license} if plain else {}), **metadata}


def _check_card(text: str, expected: Mapping[str, Any]) -> None:
    """Front matter that YAML reads as it was meant, and no HTML or image but our own."""
    assert text.startswith("---\n")
    head, end, body = text.removeprefix("---\n").partition("\n---\n")
    assert end
    table = yaml.safe_load(head)
    assert isinstance(table.pop("library_name"), str)
    assert isinstance(table.pop("tags"), list)
    assert table == expected, (table, expected)
    prose = _INLINE.sub("", _FENCED.sub("", body))
    assert "```" not in prose
    assert not _RAW_HTML.search(prose), prose
    assert "![" not in prose
    assert not _FOREIGN_LINK.search(prose), prose
    text.encode()


def _ignoring_refusal(act: Callable[[], object]) -> None:
    """Its message is checked where it is the last word; here others are to be asked as well."""
    try:
        act()
    except PissaHubError as error:
        if not str(error).isprintable():
            raise


def _never_refusing(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except PissaHubError as error:
        raise AssertionError(f"raised {error}") from error


def _claimed_bytes(text: bytes) -> int:
    """Where the last tensor of a header ends."""
    try:
        entries = json.loads(text).values()
        ends = [entry["data_offsets"][1] for entry in entries if isinstance(entry, dict) and "data_offsets" in entry]
        return max((end for end in ends if isinstance(end, int) and 0 <= end < 2**63), default=0)
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return 0


def _zeros_file() -> bytes:
    made = build_header([TensorSpec("a.weight", "F32", (2, 3)), TensorSpec("b", "I64", ())], {"format": "pt"})
    return made.raw + bytes(made.file_size - made.data_start)


def _unsealed(path: Path) -> tuple[bytes]:
    """A record without its last key; :func:`_sealed` gives it that of whatever it has become."""
    table = json.loads(path.read_bytes())
    del table["sha256"]
    return (json.dumps(table).encode(),)


def _sealed(data: bytes) -> bytes:
    """The record with its seal, where it still ends like an object; see ``pissa_hub.seal``."""
    text = data.rstrip()
    if not text.endswith(b"}"):
        return data
    before, after = text[:-1] + b', "sha256": "', b'"\n}\n'
    return before + hashlib.sha256(before + b"0" * 64 + after).hexdigest().encode() + after


def _adapter_configs(world: World) -> tuple[bytes, ...]:
    """Ours, and PEFT's of several kinds."""
    plain = json.loads((world.trained / "adapter_config.json").read_bytes())
    whole = {
        **plain, "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models"},
        "base_model_name_or_path": "org/model", "layers_to_transform": [0, 1], "modules_to_save": ["lm_head"],
        "r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {"q_proj": 3.5}, "use_rslora": True,
        "target_modules": r".*\.(q|v)_proj", "init_lora_weights": "pissa_niter_4", "trainable_token_indices": [1, 2],
    }  # fmt: skip
    experts = {
        **plain, "r": 2, "rank_pattern": {}, "target_modules": ["q_proj"], "bias": "lora_only", "lora_bias": True,
        "target_parameters": ["mlp.experts.down_proj"], "trainable_token_indices": {"embed_tokens": [1]},
    }  # fmt: skip
    dora = {**plain, "use_dora": True, "ensure_weight_tying": True}
    return tuple(json.dumps(table).encode() for table in (plain, whole, experts, dora))


def _adapters() -> list[bytes]:
    """Headers of adapters that hold more than the factors of Linear modules; the first is of few of them."""
    layer = "base_model.model.model.layers.0"
    attention = f"{layer}.self_attn.q_proj"
    factors = [
        TensorSpec(f"{attention}.lora_A.weight", "F32", (2, 64)),
        TensorSpec(f"{attention}.lora_B.weight", "F32", (64, 2)),
    ]
    embedding = "base_model.model.model.embed_tokens"
    whole = [
        TensorSpec("base_model.model.lm_head.weight", "F32", (80, 64)),
        TensorSpec(f"{embedding}.lora_embedding_A", "F32", (2, 80)),
        TensorSpec(f"{embedding}.lora_embedding_B", "F32", (64, 2)),
        TensorSpec(f"{embedding}.base_layer.weight", "F32", (80, 64)),
        TensorSpec(f"{embedding}.token_adapter.trainable_tokens_delta", "F32", (2, 64)),
    ]
    experts = [
        TensorSpec(f"{layer}.mlp.experts.lora_A.weight", "BF16", (8, 16)),
        TensorSpec(f"{layer}.mlp.experts.lora_B.weight", "BF16", (24, 8)),
        TensorSpec(f"{attention}.lora_B.bias", "F32", (64,)),
    ]
    dora = [TensorSpec(f"{attention}.lora_magnitude_vector", "F32", (64,))]
    headers = (build_header(factors + more, {}) for more in ([], whole, experts, dora))
    return [made.raw[_LENGTH_BYTES:] for made in headers]
