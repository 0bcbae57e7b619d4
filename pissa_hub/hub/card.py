"""The model card of a decomposed checkpoint."""

from __future__ import annotations

import json
import re

from pissa_hub.manifest import Manifest
from pissa_hub.pipeline.plan import ADAPTER_FOLDER, Plan

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


def _front_matter(manifest: Manifest) -> str:
    """YAML metadata; values are JSON strings, which YAML reads as they are."""
    lines = ["library_name: transformers", "tags: [pissa, lora, residual]"]
    if manifest.source.repo_id:
        lines.append(f"base_model: {json.dumps(manifest.source.repo_id)}")
    if manifest.source.license and _PLAIN.fullmatch(manifest.source.license):
        lines.append(f"license: {manifest.source.license}")
    return "\n".join(["---", *lines, "---"])
