"""Model cards: of a decomposed checkpoint, of its initial adapter alone, of a converted adapter, of a merged model."""

from __future__ import annotations

import json

from pissa_hub.adapter.record import ConversionRecord
from pissa_hub.hub.card_data import Metadata, code, front_matter, is_hub_id, origin, prose, source_metadata
from pissa_hub.hub.card_text import (
    CITATION,
    HERE,
    SAME_WEIGHTS,
    TRAINING,
    Place,
    kinds,
    license_section,
    span,
    table,
)
from pissa_hub.manifest import Manifest, SourceRecord
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, Plan

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def residual_card(plan: Plan, manifest: Manifest) -> str:
    """README.md of a residual base with its adapter, as ``decompose`` writes it."""
    return decomposed_card(manifest, plan.layout.auto_class, source_metadata(plan.checkpoint.readme))


def decomposed_card(manifest: Manifest, auto_class: str, metadata: Metadata, place: Place = HERE) -> str:
    """README.md of a residual base with its adapter: what it is, how to load and train it, how exact it is.

    Args:
        manifest: of the folder.
        auto_class: transformers class that loads it.
        metadata: what the original's card hands on.
        place: where the reader has it.
    """
    source = manifest.source
    return f"""{_residual_front_matter(manifest, metadata)}
# PiSSA-ready checkpoint

The weights of {origin(source.repo_id, source.revision)}, split by [PiSSA](https://arxiv.org/abs/2404.02948) into a
residual base (this repository's root) and the principal low-rank part of {len(manifest.weights)} weights
(`{ADAPTER_FOLDER}/`). **The base alone is not a usable model**: load both, and they compute what the original computes.

```python
{_load_snippet(auto_class, place)}
```

{TRAINING}

## Convert

The trained adapter belongs to this residual base. As a standard LoRA it belongs to the original, which need not be
downloaded for it, or merged it is a full checkpoint (`pip install pissa_hub`):

```console
$ pissa-hub convert TRAINED_ADAPTER --init {place.argument} -o lora
$ pissa-hub merge {place.argument} TRAINED_ADAPTER -o merged
```

{_accuracy(manifest, place)}

`pissa_manifest.json` has these figures for every weight, and the hash of every file; `pissa-hub verify` checks them.

{license_section(metadata, source.license, SAME_WEIGHTS)}

{CITATION}
"""


def initial_adapter_card(manifest: Manifest, metadata: Metadata, place: Place) -> str:
    """README.md of an initial adapter without its residual base: how to make that from the original."""
    source = manifest.source
    known = is_hub_id(source.repo_id)
    original = f"{source.repo_id}@{source.revision or 'main'}" if known else "path/to/the/original"
    return f"""{_residual_front_matter(manifest, metadata)}
# PiSSA initial adapter

The principal low-rank part of {len(manifest.weights)} weights of {origin(source.repo_id, source.revision)}, split off
by [PiSSA](https://arxiv.org/abs/2404.02948), in `{ADAPTER_FOLDER}/`. **It does not fit the original as it is**: that
still holds this part. pissa_hub (`pip install 'pissa_hub[peft]'`) takes it out in memory:

```python
from pissa_hub import load

model = load({json.dumps(original)}, {json.dumps(place.argument)})
```

or writes the residual base, to the same bytes as when it was first made, for transformers and PEFT alone:

```console
$ pissa-hub restore {original} --init {place.argument} -o residual
```

{TRAINING}

## Convert

As a standard LoRA, the trained adapter belongs to the original:

```console
$ pissa-hub convert TRAINED_ADAPTER --init {place.argument} -o lora
```

{_accuracy(manifest, place)}

`pissa_manifest.json` has these figures for every weight, and the hash of every file of the restored folder.

{license_section(metadata, source.license, SAME_WEIGHTS)}

{CITATION}
"""


def load_snippet(plan: Plan, folder: str) -> str:
    """Python that loads a decomposed folder with transformers and PEFT, ready to train."""
    return _load_snippet(plan.layout.auto_class, Place(folder))


def lora_card(
    record: ConversionRecord, task_type: str | None, metadata: Metadata | None = None, place: Place = HERE
) -> str:
    """README.md of a converted adapter: for which base it is, how to load it, how exact it is."""
    auto_class = _AUTO_CLASSES.get(task_type or "", "AutoModel")
    base, modules, metadata = record.base, record.modules, metadata or {}
    named = is_hub_id(base["repo_id"])
    original = origin(base["repo_id"], base["revision"]) if named else "the original model"
    model = base["repo_id"] if named else "path/to/the/original/model"
    notes = "".join(f"- {prose(note)}\n" for note in record.notes)
    distance = "unknown" if base["deviation"] is None else f"{base['deviation']:.1e}"
    rows = {
        "rank": span([module.rank for module in modules]),
        "modules": f"{kinds([module.module for module in modules])} ({len(modules)})",
        "dtype": code(record.settings["dtype"]),
        "made for": code(record.settings["for"]),
        "largest relative error of a module's change": f"{record.largest_error:.1e}",
        "distance of residual + initial adapter from the original weights (relative Frobenius norm)": distance,
    }
    head = front_matter(
        library="peft",
        tags=["lora", "pissa"],
        relation="adapter",
        base=base["repo_id"],
        base_license=base["license"],
        metadata=metadata,
    )
    return f"""{head}
# LoRA adapter

A standard LoRA for {original}: load it on the original weights. It was trained with
[PiSSA](https://arxiv.org/abs/2404.02948) on a residual base and converted by pissa_hub; no residual base is needed.

```python
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained({json.dumps(model)})
model = PeftModel.from_pretrained(model, {place.arguments})
```

{table(rows)}

{notes}
`pissa_conversion.json` has the figures of every module and the hashes of what it was made from.

{license_section(metadata, base["license"], "It holds for what is made from the original, as this adapter is.")}

{CITATION}
"""


def merged_card(
    source: SourceRecord, auto_class: str | None = None, metadata: Metadata | None = None, place: Place = HERE
) -> str:
    """README.md of a base with an adapter merged into it."""
    metadata = metadata or {}
    head = front_matter(
        library="transformers",
        tags=["pissa", "merged"],
        relation="finetune",
        base=source.repo_id,
        base_license=source.license,
        metadata=metadata,
    )
    snippet = f"""
```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained({place.arguments})
```
"""
    return f"""{head}
# Fine-tuned model

The weights of {origin(source.repo_id, source.revision)}, fine-tuned with [PiSSA](https://arxiv.org/abs/2404.02948), the
adapter merged into them by pissa_hub. It loads as the original does; `pissa_merge.json` has the hashes of what it was
made from.
{snippet if auto_class else ""}
{license_section(metadata, source.license, "It holds for what is made from the original, as this model is.")}

{CITATION}
"""


def _load_snippet(auto_class: str, place: Place) -> str:
    return f"""from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained({place.arguments})
model = PeftModel.from_pretrained(model, {place.arguments}, subfolder="{ADAPTER_FOLDER}", is_trainable=True)"""


def _residual_front_matter(manifest: Manifest, metadata: Metadata) -> str:
    return front_matter(
        library="transformers",
        tags=["pissa", "lora", "residual"],
        relation="finetune",
        base=manifest.source.repo_id,
        base_license=manifest.source.license,
        metadata=metadata,
    )


def _accuracy(manifest: Manifest, place: Place) -> str:
    """Settings and the worst figures of all weights."""
    settings, weights = manifest.settings, manifest.weights
    energy = [weight.energy for weight in weights]
    sigma_errors = [weight.certificate.sigma_error for weight in weights]
    known = [error for error in sigma_errors if error is not None]
    scaling = "alpha / sqrt(r)" if settings["use_rslora"] else "alpha / r"
    failure = max(weight.certificate.failure_probability for weight in weights)
    rows = {
        "method": f"{code(settings['method'])}, SVD {code(settings['svd'])}, seed {settings['seed']}",
        "rank r": span([weight.rank for weight in weights]),
        "alpha": f"{span([weight.alpha for weight in weights])}, scaling {scaling}",
        "modules": f"{kinds([weight.module for weight in weights])} ({len(weights)} weights)",
        "residual dtype": code(settings["residual_dtype"]),
        "adapter dtype": code(settings["adapter_dtype"]),
        "share of a weight's energy in the adapter": f"{min(energy):.1%} to {max(energy):.1%}",
        "energy lost against the best factors, certified": "at most "
        f"{max(weight.certificate.energy_loss for weight in weights):.1e}",
        "relative error of a singular value, certified": f"at most {max(known):.1e}"
        if len(known) == len(weights)
        else "not certified for every weight",
        "probability that a certificate is wrong": f"at most {failure:.0e} each" if failure else "none",
        "deviation of residual + adapter from the original (relative Frobenius norm)": "at most "
        f"{max(weight.reconstruction.relative_frobenius for weight in weights):.1e}",
    }
    plot = f"\n\n![Leading singular values of the weights, per kind of module]({place.plot})" if place.plot else ""
    return f"## How exact\n\n{table(rows)}{plot}"
