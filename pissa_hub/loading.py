"""``load``: the original base and its initial adapter as one trainable model, without a residual on disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pissa_hub.adapter.initial import INITIAL_FILES, open_decomposed
from pissa_hub.checkpoint.encoding import is_plain
from pissa_hub.checkpoint.header import TORCH_DTYPES
from pissa_hub.checkpoint.source import Checkpoint
from pissa_hub.checkpoint.tensor_file import TensorFile
from pissa_hub.comparison import FACTOR_ROUNDING, factors_of, require_source
from pissa_hub.errors import MatrixError, PlanError, VerificationError
from pissa_hub.factorization.methods import deviation_of, subtract
from pissa_hub.factorization.workspace import Workspace
from pissa_hub.hub.pull import pull_folder, pull_original
from pissa_hub.manifest import Manifest, WeightRecord, lora_names
from pissa_hub.model.skeleton import UnknownModelError, build_skeleton
from pissa_hub.progress import Silent

if TYPE_CHECKING:
    from peft import PeftModel

_DTYPES = {TORCH_DTYPES[name]: name for name in TORCH_DTYPES if is_plain(name)}
# What transformers reads of a folder besides configuration and weights.
_GENERATION_CONFIG = "generation_config.json"
# What the fp32 arithmetic of a decomposition leaves open of the share of energy that it captures.
_ENERGY_NOISE = 1e-6


def load(base: Any, init: str | Path, *, is_trainable: bool = True, **options: Any) -> PeftModel:
    """Original base and initial adapter -> a PEFT model that computes what the base computes and trains as PiSSA does.

    Each decomposed weight W becomes, in its own memory and dtype, the residual W - s B A that ``decompose`` stores for
    that dtype, to the bit. Where the base is not in memory yet, W is taken from its files, so that a narrower dtype in
    memory rounds once only.

    Args:
        base: the original checkpoint, a folder or ``org/name[@revision]`` on the Hub; or the model itself as
            transformers loads it, which is changed.
        init: a folder or repository with ``pissa_manifest.json`` and ``pissa_init/``, or that ``pissa_init`` folder.
        is_trainable: whether A and B require gradients.
        options: for ``from_pretrained`` of the transformers class that fits; the dtype is that of the checkpoint
            unless they say otherwise.

    Raises:
        CheckpointError, ManifestError: base or init cannot be read.
        HubError: the Hub does not give them.
        AdapterError: the adapter is not what the manifest's decomposition made.
        VerificationError: base is not what it was made of. Known from the hashes of the files; of a model, from its
            shapes and the share of every weight's energy that A and B capture, and the model is left as it was.
        MatrixError: a weight is quantised, not in memory, or its residual does not fit its dtype.
        PlanError: PEFT is missing, the model has an adapter already, or an option cannot be used.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise PlanError(f"peft cannot be imported ({error})", "run `pip install 'pissa_hub[peft]'`") from None
    initial, manifest = open_decomposed(pull_folder(init, INITIAL_FILES).folder)
    with TensorFile(initial.adapter.path, initial.adapter.header) as adapter, torch.no_grad():
        if isinstance(base, str | Path):
            checkpoint = pull_original(base)
            require_source(checkpoint, manifest, Silent())
            model = _load_base(checkpoint, options)
            _subtract_stored(_parameters(model, manifest), checkpoint, manifest, adapter)
        elif options:
            raise PlanError(f"{min(options)} cannot be set for a loaded model", "load the model with it")
        else:
            model = base
            _subtract_in_place(_parameters(model, manifest), manifest, adapter)
    return PeftModel.from_pretrained(model, str(initial.adapter.folder), is_trainable=is_trainable)


def _load_base(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    import transformers

    try:
        skeleton = build_skeleton(checkpoint.config or {}, len(list(checkpoint.tensors())))
    except UnknownModelError as error:
        raise PlanError(f"{checkpoint.place} cannot be loaded: {error}", "load the model and give that") from None
    checkpoint.files.find(_GENERATION_CONFIG)
    if not {"dtype", "torch_dtype"} & options.keys():
        options = {"dtype": "auto", **options}
    return getattr(transformers, skeleton.auto_class).from_pretrained(checkpoint.root, **options)


def _parameters(model: Any, manifest: Manifest) -> dict[str, Tensor]:
    """Tensor name in the checkpoint -> the weight in memory, of every weight that is to be changed."""
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise PlanError("the model has an adapter already", "give the original base model, freshly loaded")
    if not isinstance(model, torch.nn.Module):
        raise PlanError(f"base is a {type(model).__name__}", "give a folder or a transformers model")
    named = dict(model.named_parameters(remove_duplicate=False))
    users = Counter(id(parameter) for parameter in named.values())
    found = {}
    for record in manifest.weights:
        name = f"{record.module}.weight"
        weight = named.get(name)
        if weight is None:
            raise VerificationError(
                f"the model has no weight {name}", "give the model that the manifest's source is loaded as"
            )
        if weight.dtype not in _DTYPES or weight.is_meta:
            state = "not in memory" if weight.is_meta else f"stored as {weight.dtype}".replace("torch.", "")
            raise MatrixError(f"{name} of the model is {state}", "load the model unquantised, without offloading")
        shape = record.shape[::-1] if record.is_transposed else record.shape
        if weight.shape != shape:
            raise VerificationError(
                f"{name} of the model has shape {list(weight.shape)}, not {list(shape)}",
                "give the original model, unquantised",
            )
        if users[id(weight)] > 1:
            raise PlanError(
                f"{name} of the model is tied to another weight", "load the model as the source's config.json says"
            )
        found[record.tensor] = weight.detach()
    return found


def _subtract_stored(
    parameters: dict[str, Tensor], checkpoint: Checkpoint, manifest: Manifest, adapter: TensorFile
) -> None:
    """Residuals of what the checkpoint's files hold."""
    workspace = Workspace()
    records = {record.tensor: record for record in manifest.weights}
    for shard in checkpoint.shards:
        with TensorFile(checkpoint.files.path(shard.name), shard.header) as stored:
            for entry in shard.header.entries:
                if entry.name in records:
                    weight = parameters[entry.name]
                    matrix = stored.read(entry.name).to(weight.device)
                    _subtract(matrix, weight, records[entry.name], manifest, adapter, workspace)


def _subtract_in_place(parameters: dict[str, Tensor], manifest: Manifest, adapter: TensorFile) -> None:
    """Residuals of what the model holds, once all of it is known to be the original."""
    workspace = Workspace()
    for record in manifest.weights:
        _require_original(parameters[record.tensor], record, manifest, adapter, workspace)
    for record in manifest.weights:
        weight = parameters[record.tensor]
        _subtract(weight.float(), weight, record, manifest, adapter, workspace)


def _subtract(
    matrix: Tensor,
    weight: Tensor,
    record: WeightRecord,
    manifest: Manifest,
    adapter: TensorFile,
    workspace: Workspace,
) -> None:
    factors = factors_of(record, adapter, manifest.scaling(record)).to(matrix.device)
    subtract(matrix, factors, weight, name=record.tensor, workspace=workspace)


def _require_original(
    weight: Tensor, record: WeightRecord, manifest: Manifest, adapter: TensorFile, workspace: Workspace
) -> None:
    """Raises unless A and B capture of this weight what they captured of the original, and the residual fits."""
    factors = factors_of(record, adapter, manifest.scaling(record)).to(weight.device)
    nothing = torch.zeros((), device=weight.device).expand(weight.shape)
    residual = deviation_of(weight.float(), factors, nothing, workspace=workspace)
    captured = 1 - residual.relative_frobenius**2
    if not abs(captured - record.energy) <= _energy_tolerance(weight.dtype, record, adapter):
        raise VerificationError(
            f"A and B hold {captured:.6%} of the model's {record.module}.weight, of the source's {record.energy:.6%}",
            "give the base model that the manifest names, not its residual or a model tuned from it",
        )
    if not residual.max_abs <= torch.finfo(weight.dtype).max:
        raise MatrixError(
            f"the residual of {record.tensor} does not fit the range of {weight.dtype}",
            "load the model in a wider dtype",
        )


def _energy_tolerance(dtype: torch.dtype, record: WeightRecord, adapter: TensorFile) -> float:
    """What rounding A and B, and W where the model's dtype is narrower than the source's, moves the share by."""
    rounding = FACTOR_ROUNDING[adapter.spec(lora_names(record.module)[0]).dtype]
    is_exact = dtype in (torch.float32, TORCH_DTYPES[record.source_dtype])
    return _ENERGY_NOISE + rounding**2 + (0.0 if is_exact else torch.finfo(dtype).eps)
