"""Model cards: of a decomposed checkpoint, and of an adapter converted from one."""

from __future__ import annotations

import json
import re

from pissa_hub.adapter.record import ConversionRecord
from pissa_hub.manifest import Manifest, SourceRecord
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, Plan

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")


def residual_card(plan: Plan, manifest: Manifest) -> str:
    """README.md of a residual base with its adapter: what it is, how to load it, how exact it is."""
    source, settings = manifest.source, manifest.settings
    weights = manifest.weights
    loss = max(weight.certificate.energy_loss for weight in weights)
    deviation = max(weight.reconstruction.relative_frobenius for weight in weights)
    ranks = sorted({weight.rank for weight in weights})
    kinds = sorted({weight.module.rpartition(".")[2] for weight in weights})
    origin = f"`{source.repo_id}` at commit `{source.revision}`" if source.repo_id else "a local checkpoint"
    return f"""{_front_matter(manifest)}
# PiSSA-ready checkpoint

The weights of {origin}, split by [PiSSA](https://arxiv.org/abs/2404.02948) into a residual base (this folder) and the
principal low-rank part of {len(weights)} weights (`{ADAPTER_FOLDER}/`). **The base alone is not a usable model**: load
both, and they compute what the original computes.

```python
{load_snippet(plan, ".")}
```

Train it as any PEFT adapter; the paper's learning rate is 2e-5, ten times below the usual one of LoRA.

| | |
|---|---|
| method | {settings["method"]}, SVD `{settings["svd"]}` |
| rank | {", ".join(map(str, ranks))} |
| modules | {", ".join(f"`{kind}`" for kind in kinds)} |
| residual dtype | {settings["residual_dtype"]} |
| adapter dtype | {settings["adapter_dtype"]} |
| energy lost against the best factors, certified | at most {loss:.1e} |
| deviation of residual + adapter from the original (relative Frobenius norm) | at most {deviation:.1e} |

`pissa_manifest.json` has these figures for every weight, and the hash of every file; `pissa-hub verify` checks them.
"""


def load_snippet(plan: Plan, folder: str) -> str:
    """Python that loads a decomposed folder with transformers and PEFT, ready to train."""
    layout = plan.layout
    return f"""from peft import PeftModel
from transformers import {layout.auto_class}

model = {layout.auto_class}.from_pretrained("{folder}")
model = PeftModel.from_pretrained(model, "{folder}", subfolder="{ADAPTER_FOLDER}", is_trainable=True)"""


def lora_card(record: ConversionRecord, task_type: str | None) -> str:
    """README.md of a converted adapter: for which base it is, how to load it, how exact it is."""
    auto_class = _AUTO_CLASSES.get(task_type or "", "AutoModel")
    base, modules = record.base, record.modules
    origin = f"`{base['repo_id']}`" if base["repo_id"] else "the original model"
    if base["repo_id"] and base["revision"]:
        origin += f" at commit `{base['revision']}`"
    model = base["repo_id"] or "path/to/the/original/model"
    ranks = sorted({module.rank for module in modules})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    kinds = sorted({module.module.rpartition(".")[2] for module in modules})
    notes = "".join(f"- {note}\n" for note in record.notes)
    distance = "unknown" if base["deviation"] is None else f"{base['deviation']:.1e}"
    return f"""{_yaml("peft", ["lora", "pissa"], base["repo_id"], base["license"], "adapter")}
# LoRA adapter

A standard LoRA for {origin}: load it on the original weights. It was trained with
[PiSSA](https://arxiv.org/abs/2404.02948) on a residual base and converted by pissa_hub; no residual base is needed.

```python
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained({json.dumps(model)})
model = PeftModel.from_pretrained(model, ".")
```

| | |
|---|---|
| rank | {span} |
| modules | {", ".join(f"`{kind}`" for kind in kinds)} ({len(modules)}) |
| dtype | {record.settings["dtype"]} |
| made for | {record.settings["for"]} |
| largest relative error of a module's change | {record.largest_error:.1e} |
| distance of residual + initial adapter from the original weights (relative Frobenius norm) | {distance} |

{notes}
`pissa_conversion.json` has the figures of every module and the hashes of what it was made from.
"""


def merged_card(source: SourceRecord) -> str:
    """README.md of a base with an adapter merged into it."""
    origin = f"`{source.repo_id}`" if source.repo_id else "a local checkpoint"
    return f"""{_yaml("transformers", ["pissa", "merged"], source.repo_id, source.license, "finetune")}
# Fine-tuned model

The weights of {origin}, fine-tuned with [PiSSA](https://arxiv.org/abs/2404.02948), the adapter merged into them by
pissa_hub. It loads as the original does; `pissa_merge.json` has the hashes of what it was made from.
"""


def _front_matter(manifest: Manifest) -> str:
    source = manifest.source
    return _yaml("transformers", ["pissa", "lora", "residual"], source.repo_id, source.license, None)


def _yaml(library: str, tags: list[str], base: str | None, license_name: str | None, relation: str | None) -> str:
    """YAML metadata; values are JSON strings, which YAML reads as they are."""
    lines = [f"library_name: {library}", f"tags: [{', '.join(tags)}]"]
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
        if relation:
            lines.append(f"base_model_relation: {relation}")
    if license_name and _PLAIN.fullmatch(license_name):
        lines.append(f"license: {license_name}")
    return "\n".join(["---", *lines, "---"])
