"""The converted adapter in every PEFT from 0.15 on that can be imported beside the installed transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pissa_hub import convert

from ..helpers import ROOT, run_python
from .kinds import KINDS
from .trained import PEFTS_OWN_WARNINGS, Training

pytestmark = [pytest.mark.slow, *PEFTS_OWN_WARNINGS]

# Kind -> the first PEFT that has what it needs.
NEEDS = {
    "plain": (0, 15),
    "rank_pattern": (0, 15),
    "rsLoRA, rank_pattern and alpha": (0, 15),
    "regex in the config": (0, 15),
    "lm_head": (0, 15),
    "GPT-2": (0, 15),
    # Earlier ones need what transformers 5 no longer has.
    "T5": (0, 21),
    "lora_bias": (0, 15),
    "bias of targets of BERT": (0, 15),
    "every bias of GPT-2": (0, 15),
    "embedding": (0, 15),
    "convolution": (0, 15),
    "whole output head": (0, 15),
    "head of Llama": (0, 15),
    "tokens": (0, 15),
    # Earlier ones ignore experts, take their two sides for each other, or fail beside this transformers.
    "experts of Mixtral": (0, 20),
    "experts of Qwen3, rsLoRA": (0, 20),
}
LATEST = "latest"
VERSIONS = ["0.15.2", "0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.0", LATEST]

# Loads every case with the PEFT that is first on the path: arguments are the cases and where to write what it found.
JUDGE = """
import json, sys
import peft, torch, transformers
from tests.helpers import deviation, outputs_of
found = {}
for name, auto_class, source, adapter, expected in json.load(open(sys.argv[1])):
    try:
        model = getattr(transformers, auto_class).from_pretrained(source)
        model = peft.PeftModel.from_pretrained(model, adapter)
        found[name] = deviation(outputs_of(model), torch.load(expected))
    except Exception as error:  # old versions raise anything; it is reported
        found[name] = f"{type(error).__name__}: {error}"
json.dump({"version": peft.__version__, "found": found}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def cases(trained: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of [kind, class, original, converted adapter, expected outputs]."""
    folder = tmp_path_factory.mktemp("cases")
    rows = []
    for number, kind in enumerate(NEEDS):
        done = trained(KINDS[kind])
        lora, expected = folder / str(number), folder / f"{number}.pt"
        convert(done.adapter, done.init, lora)
        torch.save(done.expected, expected)
        rows.append([kind, done.auto_class, *map(str, (done.source, lora, expected))])
    (folder / "cases.json").write_text(json.dumps(rows))
    return folder / "cases.json"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_converted_adapter_loads(cases: Path, tmp_path: Path, version: str) -> None:
    package = tmp_path / "peft"
    install_peft(version, package)
    path = os.pathsep.join([str(package), str(ROOT)])
    imported = run_python("-c", "import peft", PYTHONPATH=path)
    if imported.code:
        pytest.skip(f"PEFT {version} beside transformers {transformers.__version__}: {imported.err.splitlines()[-1]}")
    judged = run_python("-c", JUDGE, cases, tmp_path / "found.json", PYTHONPATH=path)
    assert judged.code == 0, judged.err
    table = json.loads((tmp_path / "found.json").read_bytes())
    assert version in (table["version"], LATEST)
    release = tuple(int(part) for part in table["version"].split(".")[:2])
    for kind, needed in NEEDS.items():
        if release >= needed:
            found = table["found"][kind]
            assert isinstance(found, float), f"{kind}: {found}"
            assert found <= 1e-5, kind


def install_peft(version: str, target: Path) -> None:
    """PEFT alone, beside what it needs here already; skips the test where pip cannot have it."""
    requirement = "peft" if version == LATEST else f"peft=={version}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), requirement]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"pip: {done.stderr.strip().splitlines()[-1]}")
