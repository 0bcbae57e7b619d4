"""What LoRA servers make of the result, by readers that follow each one's rules: the very change, or a refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pissa_hub import convert
from pissa_hub.adapter.peft_files import open_adapter
from pissa_hub.adapter.servers import SERVERS, find_server, require_servable
from pissa_hub.errors import AdapterError

from ..helpers import run_cli
from .kinds import FURTHER, LINEAR, PEFT_OWN, Kind
from .trained import CONFIG, PEFTS_OWN_WARNINGS, WEIGHTS, Training, trained_update

pytestmark = PEFTS_OWN_WARNINGS

KINDS = {
    **{
        name: LINEAR[name]
        for name in (
            *("plain", "alpha", "rank_pattern", "rsLoRA and rank_pattern", "rsLoRA, rank_pattern and alpha"),
            *("listed targets", "regex in the config", "one layer", "lm_head", "GPT-2", "Qwen2", "saved in bf16"),
            "attention of Mixtral",
        )
    },
    **{
        name: FURTHER[name]
        for name in (
            *("embedding", "convolution", "whole output head", "tokens", "lora_bias", "bias of targets of Qwen2"),
            *("experts of Mixtral", "experts of another rank"),
        )
    },
    "q_proj in both layers, v_proj in one": Kind(decompose={"targets": r"re:.*(q_proj|layers\.0\.self_attn\.v_proj)"}),
}
NOT_FACTORS_ALONE = {"convolution", "whole output head", "tokens", "lora_bias", "bias of targets of Qwen2"}
EXPERTS = {"experts of Mixtral", "experts of another rank"}
REFUSED = {
    "vllm": NOT_FACTORS_ALONE,
    "sglang": NOT_FACTORS_ALONE | EXPERTS | {"GPT-2"},
    "llama.cpp": NOT_FACTORS_ALONE | EXPERTS,
    "tgi": NOT_FACTORS_ALONE | EXPERTS | {"embedding", "lm_head", "one layer", "q_proj in both layers, v_proj in one"},
    "ollama": NOT_FACTORS_ALONE | EXPERTS | {"embedding", "lm_head", "GPT-2", "Qwen2", "attention of Mixtral"},
}
LAYERS = 2
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?A(?(2)|\.weight)")


class RejectedError(Exception):
    """The server would not load it."""


class Files:
    """An adapter as a server finds it: the config, and A (r, in) and B (out, r) of every module."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        tensors = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for name in list(tensors):
            if match := FACTOR.fullmatch(name):
                A = tensors.pop(name)
                self.pairs[match[1]] = (A, tensors.pop(re.sub(r"A(\.weight)?$", r"B\1", name)))
        self.others = set(tensors)

    def updates(self, scaling: Callable[[Tensor], float]) -> dict[str, Tensor]:
        """The change of every module for a scaling that follows from its B."""
        return {name: scaling(B) * (B @ A) for name, (A, B) in self.pairs.items()}

    def require_one_rank(self) -> None:
        if any(len(A) != self.config["r"] for A, _ in self.pairs.values()):
            raise RejectedError("buffers of one rank")


def vllm(files: Files) -> dict[str, Tensor]:
    """Pattern keys are ignored; r selects the buffers; a fused expert's factors are unfolded by r."""
    config = files.config
    if config["r"] not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
        raise RejectedError("rank")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none" or files.others:
        raise RejectedError("not factors alone")
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    updates = {}
    for name, (A, B) in files.pairs.items():
        if ".experts" in name:
            in_experts = A.view(-1, config["r"], A.shape[1])
            of_experts = B.view(len(B), config["r"], -1)
            # The server knows no rsLoRA for experts.
            updates[name] = torch.einsum("ore,eri->eoi", of_experts, in_experts) * config["lora_alpha"] / config["r"]
        elif len(A) != config["r"]:
            raise RejectedError("buffers of one rank")
        else:
            updates[name] = scaling * (B @ A)
    return updates


def sglang(files: Files) -> dict[str, Tensor]:
    targets = files.config["target_modules"]
    if not isinstance(targets, list):
        raise RejectedError("a regex")
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"}
    if not set(targets) <= known | {"embed_tokens", "lm_head"}:
        raise RejectedError("unknown modules")
    files.require_one_rank()
    scaling = files.config["lora_alpha"] / files.config["r"]
    return {
        name: update
        for name, update in files.updates(lambda _: scaling).items()
        if ".experts" not in name and name.rpartition(".")[2] in targets
    }


def llama_cpp(files: Files) -> dict[str, Tensor]:
    """The scaling is alpha / the columns of each B; a tensor that is no factor aborts."""
    if files.others:
        raise RejectedError("tensors beside the factors")
    if any(".experts" in name or A.dim() != 2 for name, (A, _) in files.pairs.items()):
        raise RejectedError("shapes")
    return files.updates(lambda B: files.config["lora_alpha"] / B.shape[1])


def tgi(files: Files) -> dict[str, Tensor]:
    """A kind of module that one layer lacks is dropped from all; what is in no layer is not looked for."""
    if files.others or files.config.get("use_dora"):
        raise RejectedError("not factors alone")
    files.require_one_rank()
    layers = defaultdict(set)
    for name in files.pairs:
        if match := re.search(r"\.(\d+)\.", name):
            layers[name.rpartition(".")[2]].add(int(match[1]))
    scaling = files.config["lora_alpha"] / files.config["r"]
    return {
        name: update
        for name, update in files.updates(lambda _: scaling).items()
        if layers[name.rpartition(".")[2]] == set(range(LAYERS))
    }


def ollama(files: Files) -> dict[str, Tensor]:
    if not isinstance(files.config["lora_alpha"], int):
        raise RejectedError("alpha")
    if not all(re.fullmatch(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj", name) for name in files.pairs):
        raise RejectedError("modules that are not Llama's")
    return llama_cpp(files)


READERS = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp, "tgi": tgi, "ollama": ollama}


def cases(*, are_refused: bool) -> list[tuple[str, str]]:
    return [(server, kind) for server in READERS for kind in KINDS if (kind in REFUSED[server]) == are_refused]


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of any module, relative Frobenius; what the server drops is missed whole."""
    return max(
        float((found.get(name, torch.zeros(())) - update).norm() / update.norm()) for name, update in expected.items()
    )


@pytest.mark.parametrize(("server", "kind"), cases(are_refused=False))
def test_a_server_computes_the_change(trained: Training, tmp_path: Path, server: str, kind: str) -> None:
    done = trained(KINDS[kind])
    convert(done.adapter, done.init, tmp_path / "lora", server=server, base_model="someone/model")
    files = Files(tmp_path / "lora")
    assert files.config["base_model_name_or_path"] == "someone/model"
    assert largest_error(READERS[server](files), trained_update(done)) < 1e-6
    assert not {"rank_pattern", "alpha_pattern", "modules_to_save"} & {key for key in files.config if files.config[key]}


@pytest.mark.parametrize(("server", "kind"), cases(are_refused=True))
def test_what_a_server_cannot_take_is_refused(trained: Training, tmp_path: Path, server: str, kind: str) -> None:
    done = trained(KINDS[kind])
    with pytest.raises(AdapterError, match=rf"^{server} .* `pissa-hub merge RESIDUAL ADAPTER -o DIR`$"):
        convert(done.adapter, done.init, tmp_path / "lora", server=server)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("server", "kind"), cases(are_refused=True))
def test_what_is_refused_would_not_be_served(trained: Training, tmp_path: Path, server: str, kind: str) -> None:
    """The readers say so of the file that PEFT takes; that they are Llama's alone is known by the model's type."""
    done = trained(KINDS[kind])
    convert(done.adapter, done.init, tmp_path / "lora")
    files = Files(tmp_path / "lora")
    if server == "ollama" and kind in ("Qwen2", "attention of Mixtral"):
        config = json.loads((done.source / "config.json").read_bytes())
        assert config["model_type"] not in ("llama", "gemma2")
        return
    try:
        error = largest_error(READERS[server](files), trained_update(done))
    except RejectedError:
        return
    # What is no factor is trained too, and dropped without a word.
    assert error > 0.9 or files.others


@pytest.mark.parametrize("server", READERS)
def test_a_file_for_peft_will_not_do(trained: Training, tmp_path: Path, server: str) -> None:
    """Where ranks differ: the uniform export is there for a reason. llama.cpp would take patterns of equal ratio."""
    done = trained(KINDS["rank_pattern"])
    convert(done.adapter, done.init, tmp_path / "lora")
    try:
        error = largest_error(READERS[server](Files(tmp_path / "lora")), trained_update(done))
    except RejectedError:
        return
    assert error > 0.1


@pytest.mark.parametrize("rank", [1, 3, 20])
@pytest.mark.parametrize("server", READERS)
def test_a_given_rank_is_one_that_the_server_takes(trained: Training, tmp_path: Path, server: str, rank: int) -> None:
    done = trained(KINDS["rank_pattern"])
    convert(done.adapter, done.init, tmp_path / "lora", server=server, rank=rank, dtype="bfloat16")
    assert READERS[server](Files(tmp_path / "lora")).keys() == trained_update(done).keys()


def test_the_ranks_of_vllm() -> None:
    server = find_server("vllm")
    assert [server.rank_for(needed) for needed in (1, 2, 8, 9, 129, 257, 321, 512)] == [1, 8, 8, 16, 256, 320, 512, 512]
    with pytest.raises(AdapterError, match=r"vllm takes ranks up to 512, and the exact change has 513; .*--rank 512"):
        server.rank_for(513)


@pytest.mark.parametrize(
    ("server", "kind", "note"),
    [
        ("vllm", "embedding", "vllm takes them for some models only"),
        ("sglang", "lm_head", "sglang takes them for some models only"),
        ("vllm", "experts of Mixtral", "fused experts are adapted"),
        ("vllm", "one layer", "some layers lack modules"),
        ("llama.cpp", "q_proj in both layers, v_proj in one", "some layers lack modules"),
    ],
)
def test_what_depends_on_the_server_is_a_note(
    trained: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str], server: str, kind: str, note: str
) -> None:
    done = trained(KINDS[kind])
    ran = run_cli(capfd, "convert", done.adapter, "--init", done.init, "-o", tmp_path / "lora", "--for", server)
    assert ran.code == 0
    assert any(line.startswith("note: ") and note in line for line in ran.err.splitlines())
    assert note in (tmp_path / "lora" / "README.md").read_text()


def test_what_is_sure_needs_no_note(trained: Training, tmp_path: Path) -> None:
    done = trained(KINDS["plain"])
    for server in ("peft", "vllm", "sglang", "llama.cpp", "ollama"):
        conversion = convert(done.adapter, done.init, tmp_path / server, server=server, base_model="someone/model")
        assert conversion.record.notes == ()


def test_tgi_where_the_number_of_layers_is_not_known(trained: Training, tmp_path: Path) -> None:
    done = trained(KINDS["plain"])
    folder = Path(shutil.copytree(done.base, tmp_path / "known"))
    (folder / "config.json").unlink()
    notes = convert(done.adapter, folder, tmp_path / "lora", server="tgi").record.notes
    assert any("tgi drops the modules from all layers if the model has layers beyond 1" in note for note in notes)
    for known, lacks in ((2, None), (3, "layer 2")):
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": known}))
        if lacks is None:
            assert convert(done.adapter, folder, tmp_path / "all", server="tgi", base_model="a/b").record.notes == ()
        else:
            with pytest.raises(AdapterError, match=f"tgi drops .* from all layers where {lacks} lacks it"):
                convert(done.adapter, folder, tmp_path / "none", server="tgi")


@pytest.mark.parametrize("server", ["tgi", "vllm"])
def test_a_number_of_layers_that_no_memory_holds(trained: Training, tmp_path: Path, server: str) -> None:
    done = trained(KINDS["plain"])
    base = {"model_type": "llama", "num_hidden_layers": 10**18}
    if server == "tgi":
        with pytest.raises(AdapterError, match="from all layers where layer 2 lacks it"):
            require_servable(find_server(server), open_adapter(done.adapter), base)
    else:
        (note,) = require_servable(find_server(server), open_adapter(done.adapter), base)
        assert "some layers lack modules" in note


@pytest.mark.parametrize("model_type", [{"a": 1}, ["llama"], "\x1b[31m", "x" * 5000, 7])
def test_a_model_type_that_is_none(trained: Training, model_type: object) -> None:
    done = trained(KINDS["plain"])
    with pytest.raises(AdapterError, match="ollama serves adapters for gemma2 and llama models, not for") as caught:
        require_servable(find_server("ollama"), open_adapter(done.adapter), {"model_type": model_type})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_ollamas_models_where_the_model_is_not_known(trained: Training, tmp_path: Path) -> None:
    done = trained(PEFT_OWN["PEFT's"])
    notes = convert(done.adapter, done.init, tmp_path / "lora", server="ollama").record.notes
    assert any("ollama serves adapters for gemma2 and llama models only" in note for note in notes)


def test_there_is_a_reader_for_every_server() -> None:
    assert READERS.keys() | {"peft"} == SERVERS.keys()
    with pytest.raises(AdapterError, match="'triton' is unknown; use peft, vllm"):
        find_server("triton")
