"""What can be asked for, and what cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pissa_hub.errors import PlanError
from pissa_hub.factorization.svd import SVDSettings
from pissa_hub.pipeline.settings import Settings


def test_defaults_are_those_of_the_command_line() -> None:
    from pissa_hub.cli import cli

    defaults = {parameter.name: parameter.default for parameter in cli.commands["decompose"].params}
    table = Settings().as_dict()
    for name in (
        "rank",
        "targets",
        "exclude",
        "method",
        "svd",
        "tolerance",
        "adapter_dtype",
        "residual_dtype",
        "seed",
    ):
        assert defaults[name] == table[name], name
    assert defaults["niter"] == Settings().niter
    assert Settings().alpha is None


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"method": "loftq"}, "method 'loftq'"),
        ({"rank": 0}, "rank 0"),
        ({"rank": -3}, "rank -3"),
        ({"alpha": 0}, "alpha 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"svd": "magic"}, "svd 'magic'"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
        ({"tolerance": 1.0}, "tolerance 1.0"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"niter": -1}, "niter -1"),
        ({"niter": 10**6}, "niter 1000000"),
        ({"adapter_dtype": "int8"}, "dtype 'int8'"),
        ({"adapter_dtype": "source"}, "dtype 'source'"),
        ({"residual_dtype": "float8"}, "dtype 'float8'"),
    ],
)
def test_value_that_cannot_be_used(settings: dict[str, Any], fact: str) -> None:
    with pytest.raises(PlanError) as caught:
        Settings(**settings)
    assert caught.value.fact == f"{fact} cannot be used"
    assert caught.value.remedy


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 0.5), (True, 2.0)])
def test_scaling(use_rslora: bool, scaling: float) -> None:
    assert Settings(use_rslora=use_rslora).scaling(rank=16, alpha=8.0) == scaling


def test_only_what_matters_to_the_method_is_recorded() -> None:
    """So that a finished folder is recognised whatever else was given."""
    assert Settings(niter=7).as_dict() == Settings().as_dict()
    assert Settings(svd="randomized", tolerance=0.1).as_dict() == Settings(svd="randomized").as_dict()
    assert Settings(svd="randomized", niter=7).as_dict() != Settings(svd="randomized").as_dict()
    assert Settings(tolerance=0.1).as_dict() != Settings().as_dict()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(rank=3, alpha=1.5, use_rslora=True, rank_pattern={"q_proj": 2}, targets="re:.*", exclude="lm_head"),
        Settings(svd="randomized", niter=0, seed=7, adapter_dtype="float16", residual_dtype="bfloat16"),
        Settings(tolerance=0.1),
    ],
)
def test_come_back_from_what_is_recorded(settings: Settings) -> None:
    assert Settings.from_dict(settings.as_dict()) == settings
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_whole_alpha_is_the_same_as_int_and_as_float() -> None:
    """The command line knows floats only."""
    assert repr(Settings(alpha=8).as_dict()) == repr(Settings(alpha=8.0).as_dict())


def test_svd_settings() -> None:
    settings = Settings(svd="randomized", niter=7, tolerance=0.1, seed=3)
    assert settings.svd_settings == SVDSettings("randomized", 0.1, 7, 3)
