"""Choosing weights and ranks, and PEFT's own reading of what we would write into adapter_config.json."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key

from pissa_hub.errors import TargetError
from pissa_hub.model.modules import ModelLayout, WeightModule, resolve_layout
from pissa_hub.model.targets import Target, peft_patterns, peft_target_modules, select_targets

from .zoo import COMPOSITE, DENSE, JUDGES_OWN_WARNINGS, save, tiny_model

pytestmark = JUDGES_OWN_WARNINGS

LEAVES = ("q_proj", "v_proj")


def layout(*modules: WeightModule, task_type: str | None = None, unstored: tuple[str, ...] = ()) -> ModelLayout:
    names = tuple(module.name for module in modules)
    return ModelLayout(modules, "X", "AutoModel", task_type, None, (*names, *unstored))


def linear(name: str, shape: tuple[int, int] = (8, 6)) -> WeightModule:
    return WeightModule(f"{name}.weight", name, "linear", shape, what="Linear")


EMBEDDING = WeightModule("embed.weight", "embed", "embedding", (48, 8), what="Embedding")
CONV = WeightModule("patch.weight", "patch", "other", (8, 3, 2, 2), what="Conv2d")
HEAD = WeightModule("lm_head.weight", "lm_head", "linear", (48, 8), is_output_head=True, what="Linear")
TIED_HEAD = WeightModule("lm_head.weight", "lm_head", "linear", (48, 8), True, ("embed",), "Linear")
TIED_EMBEDDING = WeightModule("embed.weight", "embed", "embedding", (48, 8), False, ("lm_head",), "Embedding")
BLOCKS = tuple(linear(f"h.{layer}.{part}") for layer in (0, 1) for part in ("attn.q_proj", "attn.v_proj", "mlp.up"))
MODEL = layout(EMBEDDING, *BLOCKS, CONV, HEAD)


def names(targets: tuple[Target, ...]) -> list[str]:
    return [target.module.name for target in targets]


def test_orientation_is_pefts():
    target = Target(linear("a", (8, 6)), 2, 2.0)
    assert (target.out_features, target.in_features) == (8, 6)
    conv1d = WeightModule("c.weight", "c", "conv1d", (6, 8))
    assert (Target(conv1d, 2, 2.0).out_features, Target(conv1d, 2, 2.0).in_features) == (8, 6)


class TestSelection:
    def test_all_linear_leaves_out_head_embedding_and_convolution(self):
        assert names(select_targets(MODEL, rank=2)) == [module.name for module in BLOCKS]
        assert names(select_targets(MODEL, targets="All-Linear", rank=2)) == [module.name for module in BLOCKS]

    def test_all_linear_leaves_out_tied_weights(self):
        shared = WeightModule("b.weight", "b", "linear", (8, 6), tied_with=("c",))
        assert names(select_targets(layout(linear("a"), shared), rank=2)) == ["a"]

    @pytest.mark.parametrize(
        ("targets", "chosen"),
        [
            ("q_proj", ["h.0.attn.q_proj", "h.1.attn.q_proj"]),
            ("up, h.1.attn.q_proj", ["h.0.mlp.up", "h.1.attn.q_proj", "h.1.mlp.up"]),
            (["up"], ["h.0.mlp.up", "h.1.mlp.up"]),
            ("1.mlp.up", ["h.1.mlp.up"]),
            (r"re:h\.1\.attn\..*", ["h.1.attn.q_proj", "h.1.attn.v_proj"]),
            (r"re:h\.(0|1)\.mlp\.up{1,2}", ["h.0.mlp.up", "h.1.mlp.up"]),
            ("lm_head", ["lm_head"]),
        ],
    )
    def test_names_and_regexes(self, targets, chosen):
        assert names(select_targets(MODEL, targets=targets, rank=2)) == chosen

    def test_name_is_a_whole_part_of_the_path(self):
        with pytest.raises(TargetError, match="matches no weight"):
            select_targets(MODEL, targets="_proj", rank=2)

    def test_regex_picks_among_linear_only(self):
        assert "embed" not in names(select_targets(MODEL, targets="re:.*", rank=2))

    @pytest.mark.parametrize("exclude", ["up", ["up"], r"re:.*\.up"])
    def test_exclude(self, exclude):
        chosen = names(select_targets(MODEL, exclude=exclude, rank=2))
        assert chosen == [module.name for module in BLOCKS if not module.name.endswith("up")]

    @pytest.mark.parametrize("exclude", ["", None, []])
    def test_exclude_nothing(self, exclude):
        assert len(select_targets(MODEL, exclude=exclude, rank=2)) == len(BLOCKS)

    def test_exclude_makes_an_unfit_match_harmless(self):
        assert names(select_targets(MODEL, targets="q_proj,embed", exclude="embed", rank=2)) == [
            "h.0.attn.q_proj",
            "h.1.attn.q_proj",
        ]

    def test_excluding_a_head_that_is_not_stored_is_fine(self):
        model = layout(TIED_EMBEDDING, *BLOCKS, unstored=("lm_head",))
        assert len(select_targets(model, exclude="lm_head", rank=2)) == len(BLOCKS)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"targets": "q_prj"},
                r"'q_prj' matches no weight.*did you mean q_proj.*lm_head, q_proj, up, v_proj",
            ),
            ({"targets": "h.0.attn.q_prj"}, "did you mean q_proj"),
            ({"targets": "up,zzz"}, "'zzz' matches no weight"),
            ({"targets": "h.0.attn"}, "matches no weight"),
            ({"targets": ""}, "--targets is empty"),
            ({"targets": "re:("}, "--targets 're:\\(' is no valid regex"),
            ({"targets": "re:q_proj"}, "matches no weight.*did you mean q_proj"),
            ({"targets": "embed"}, "embed is an embedding.*--exclude embed"),
            ({"targets": "re:embed"}, "embed is an embedding"),
            ({"targets": "patch"}, r"patch.weight, shape \[8, 3, 2, 2\].*Conv2d.*--exclude patch"),
            ({"exclude": "re:.*"}, "--exclude leaves no weight"),
            ({"exclude": "zzz"}, "--exclude 'zzz' matches no weight"),
            ({"exclude": "re:["}, "--exclude 're:\\['"),
            ({"exclude": "h.0.attn"}, "--exclude 'h.0.attn' matches no weight"),
            ({"rank": 7}, r"rank 7 .*h.0.attn.q_proj.weight .*\[8, 6\].*--rank-pattern q_proj=6"),
            ({"rank": 0}, "rank 0 does not fit"),
            ({"rank_pattern": {"up": 7}}, "rank 7 .*h.0.mlp.up.weight.*--rank-pattern up=6"),
            ({"rank_pattern": {"up": -1}}, "rank -1 does not fit"),
            ({"rank_pattern": {"q_prj": 2}}, "--rank-pattern 'q_prj' matches no target.*did you mean q_proj"),
            ({"rank_pattern": {"lm_head": 2}}, "--rank-pattern 'lm_head' matches no target"),
            ({"rank_pattern": {"(": 2}}, "--rank-pattern '\\(' is no valid regex"),
        ],
    )
    def test_one_line_with_the_remedy(self, settings, message):
        with pytest.raises(TargetError, match=message) as caught:
            select_targets(MODEL, **{"rank": 2, **settings})
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("targets", ["lm_head", "re:.*"])
    def test_tied_head_stored(self, targets):
        with pytest.raises(TargetError, match=r"lm_head shares its weight with embed.*--exclude lm_head"):
            select_targets(layout(EMBEDDING, *BLOCKS, TIED_HEAD), targets=targets, rank=2)

    def test_tied_head_not_stored(self):
        with pytest.raises(TargetError, match="lm_head shares its weight with embed"):
            select_targets(layout(TIED_EMBEDDING, *BLOCKS), targets="q_proj,lm_head", rank=2)

    def test_nothing_linear_at_all(self):
        with pytest.raises(TargetError, match="no Linear or Conv1D"):
            select_targets(layout(EMBEDDING), rank=2)


class TestRanks:
    def test_first_matching_key_wins_by_pefts_rule(self):
        pattern = {r"h\.1\.attn\..*": 3, "q_proj": 4, "mlp.up": 5}
        chosen = select_targets(MODEL, rank=2, rank_pattern=pattern)
        assert [target.rank for target in chosen] == [4, 2, 5, 3, 3, 5]
        keys = [get_pattern_key(list(pattern), name) for name in names(chosen)]
        assert [pattern.get(key, 2) for key in keys] == [target.rank for target in chosen]

    def test_key_is_anchored_at_both_ends(self):
        with pytest.raises(TargetError, match="'proj' matches no target"):
            select_targets(MODEL, rank=2, rank_pattern={"proj": 3})

    def test_alpha_defaults_to_each_rank(self):
        pattern = {"up": 4}
        assert {t.alpha for t in select_targets(MODEL, rank=2, rank_pattern=pattern)} == {2.0, 4.0}
        assert {t.alpha for t in select_targets(MODEL, rank=2, alpha=32, rank_pattern=pattern)} == {32.0}


class TestTargetModules:
    def test_shortest_ending(self):
        targets = select_targets(MODEL, targets="q_proj,v_proj", rank=2)
        assert peft_target_modules(MODEL, targets) == ["q_proj", "v_proj"]

    def test_part_of_the_layers_takes_full_paths(self):
        targets = select_targets(MODEL, targets="h.1.attn.q_proj,up", rank=2)
        assert peft_target_modules(MODEL, targets) == ["1.attn.q_proj", "up"]

    def test_modules_without_stored_weights_count(self):
        model = layout(linear("a.encoder.fc"), unstored=("a.decoder.fc", "a.encoder", "a.decoder"))
        assert peft_target_modules(model, select_targets(model, rank=2)) == ["encoder.fc"]

    def test_path_that_ends_another_path_is_refused(self):
        model = layout(linear("fc"), linear("h.fc"))
        targets = select_targets(model, exclude="h.fc", rank=2)
        with pytest.raises(TargetError, match="cannot target fc alone"):
            peft_target_modules(model, targets)

    def test_llama(self, tmp_path):
        saved = save(tiny_model("LlamaForCausalLM"), tmp_path)
        model = resolve_layout(saved.config, saved.tensors)
        assert peft_target_modules(model, select_targets(model, rank=1)) == [
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ]


@pytest.mark.parametrize("architecture", [*DENSE, *COMPOSITE])
def test_peft_adapts_what_we_chose_at_the_rank_we_chose(architecture, tmp_path):
    """A ragged choice: some modules left out, ranks by name and by layer, alpha on top."""
    model = tiny_model(architecture)
    saved = save(model, tmp_path)
    found = resolve_layout(saved.config, saved.tensors)
    everything = select_targets(found, rank=1)
    left_out, ranked_by_name = names(everything)[0], names(everything)[-1]
    leaf = ranked_by_name.rpartition(".")[2]
    pattern = {ranked_by_name: 5, r".*\.0\..*": 3, leaf: 4}
    targets = select_targets(found, exclude=left_out, rank=2, rank_pattern=pattern)
    rank_pattern, alpha_pattern = peft_patterns(targets, 2, None)
    config = LoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=peft_target_modules(found, targets),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=architecture.startswith("GPT2"),
    )
    adapted = get_peft_model(model, config).base_model
    assert set(adapted.targeted_module_names) == set(names(targets)) == set(names(everything)) - {left_out}
    for target in targets:
        layer = adapted.model.get_submodule(target.module.name)
        assert layer.r["default"] == target.rank
        assert layer.lora_alpha["default"] == target.alpha
        assert layer.lora_A["default"].weight.shape == (target.rank, target.in_features)
        assert layer.lora_B["default"].weight.shape == (target.out_features, target.rank)


class TestPatterns:
    def test_uniform_is_empty(self):
        assert peft_patterns(select_targets(MODEL, rank=2), 2, None) == ({}, {})
        assert peft_patterns(select_targets(MODEL, rank=2, alpha=4), 2, 4) == ({}, {})

    def test_shortest_endings(self):
        targets = select_targets(MODEL, rank=2, alpha=8, rank_pattern={"up": 4, r"h\.1\.attn\.q_proj": 3})
        assert peft_patterns(targets, 2, 8) == ({r"1\.attn\.q_proj": 3, "up": 4}, {})
        assert peft_patterns(targets, 2, None) == (
            {r"1\.attn\.q_proj": 3, "up": 4},
            dict.fromkeys(LEAVES, 8.0) | {"up": 8.0},
        )

    def test_path_that_ends_another_path_is_anchored(self):
        model = layout(linear("fc"), linear("h.fc"))
        targets = select_targets(model, rank=2, rank_pattern={"^fc": 3})
        ranks, _ = peft_patterns(targets, 2, None)
        assert ranks == {"^fc": 3}
        assert get_pattern_key(list(ranks), "fc") == "^fc"
        assert get_pattern_key(list(ranks), "h.fc") == "h.fc"

    def test_dots_are_literal(self):
        model = layout(linear("a.b.fc"), linear("a.bxfc.fc"), linear("aXb.fc"))
        targets = select_targets(model, rank=2, rank_pattern={r"a\.b\.fc": 3})
        ranks, _ = peft_patterns(targets, 2, None)
        matched = [name for name in names(targets) if get_pattern_key(list(ranks), name) in ranks]
        assert matched == ["a.b.fc"]
