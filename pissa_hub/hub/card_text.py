"""What the cards have in common: where their reader has the files, sections that do not vary, tables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pissa_hub.hub.card_data import Metadata, code, license_names
from pissa_hub.licenses import terms_of

SAME_WEIGHTS = "What is here holds the original's weights in another form, so its licence applies."

CITATION = """## Citation

```bibtex
@inproceedings{meng2024pissa,
  title     = {{PiSSA}: Principal Singular Values and Singular Vectors Adaptation of Large Language Models},
  author    = {Meng, Fanxu and Wang, Zhaohui and Zhang, Muhan},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {37},
  year      = {2024},
  url       = {https://arxiv.org/abs/2404.02948}
}
```"""

_LINK = re.compile(r"https://[\w./:%+=&?~-]+", re.ASCII)

TRAINING = """## Train

Train it as any PEFT adapter. The paper's settings for language models: alpha = r, no dropout, AdamW without weight
decay, learning rate 2e-5 (ten times below LoRA's usual one), a cosine schedule with 3 % warm-up.

```python
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

steps = 1000
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = AdamW(trainable, lr=2e-5, weight_decay=0.0)
schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=round(0.03 * steps), num_training_steps=steps)
```

The same for a trainer: `learning_rate=2e-5, weight_decay=0.0, lr_scheduler_type="cosine", warmup_steps=30`."""


@dataclass(frozen=True)
class Place:
    """Where the reader of a card has the files.

    Attributes:
        name: a repository on the Hub, or a folder.
        revision: the branch, where it is not the default one.
        plot: name of the spectra's picture beside the card; None without one.
    """

    name: str = "."
    revision: str | None = None
    plot: str | None = None

    @property
    def arguments(self) -> str:
        """Of ``from_pretrained``."""
        return json.dumps(self.name) + (f", revision={json.dumps(self.revision)}" if self.revision else "")

    @property
    def argument(self) -> str:
        """Of the command line."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


HERE = Place()


def license_section(metadata: Metadata, declared: str | None, holds: str) -> str:
    """The section on the licence, with the notice that it asks for.

    Args:
        metadata, declared: as of ``card_data.license_names``.
        holds: a sentence on what the licence holds for.
    """
    found = list(dict.fromkeys(license_names(metadata, declared)))
    notice = terms_of(found).notice
    link = metadata.get("license_link")
    address = f" (<{link}>)" if isinstance(link, str) and _LINK.fullmatch(link) else ""
    names = ", ".join(map(code, found))
    known = f"The licence of the original is {names}{address}." if names else "The original names no licence."
    return "\n\n".join(["## Licence", *([f"**{notice}**"] if notice else []), f"{known} {holds}"])


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of names and values."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def kinds(modules: Sequence[str]) -> str:
    """The last parts of modules' paths, each once."""
    return ", ".join(code(kind) for kind in sorted({module.rpartition(".")[2] for module in modules}))


def span(values: Sequence[float]) -> str:
    """The least and the greatest, or the one there is."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
