"""fp32 means fp32 inside, and nothing is different outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pissa_hub.errors import MatrixError
from pissa_hub.factorization import precision
from pissa_hub.factorization.precision import exact_fp32
from pissa_hub.factorization.svd import truncated_svd
from tests.factorization.matrices import gaussian, matrix

CUDA = torch.backends.cuda.matmul
ONEDNN = getattr(torch.backends.mkldnn, "matmul", None)
HAS_PRECISION = hasattr(CUDA, "fp32_precision")


def current() -> dict[str, object]:
    found: dict[str, object] = {}
    if HAS_PRECISION:
        found["cuda"] = CUDA.fp32_precision
        found["onednn"] = getattr(ONEDNN, "fp32_precision", None)
    else:
        found["cuda"] = CUDA.allow_tf32
    return found


@pytest.fixture(params=["default", "allow_tf32", "high", "medium"])
def chosen_by_the_caller(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    before = torch.get_float32_matmul_precision()
    if request.param == "allow_tf32":
        CUDA.allow_tf32 = True
    elif request.param != "default":
        torch.set_float32_matmul_precision(request.param)
    yield current()
    torch.set_float32_matmul_precision(before)


def test_inside_no_tf32_and_after_it_the_callers_choice(chosen_by_the_caller: dict[str, object]) -> None:
    with exact_fp32():
        assert current()["cuda"] == ("ieee" if HAS_PRECISION else False)
    assert current() == chosen_by_the_caller


def test_restored_on_errors(chosen_by_the_caller: dict[str, object]) -> None:
    with pytest.raises(KeyError), exact_fp32():
        raise KeyError
    assert current() == chosen_by_the_caller


def test_nests(chosen_by_the_caller: dict[str, object]) -> None:
    with exact_fp32():
        inside = current()
        with exact_fp32():
            assert current() == inside
        assert current() == inside
    assert current() == chosen_by_the_caller


def test_a_decomposition_leaves_the_settings_alone(chosen_by_the_caller: dict[str, object]) -> None:
    truncated_svd(matrix("trained", 600, 560, 0), 8)
    assert current() == chosen_by_the_caller
    with pytest.raises(MatrixError):
        truncated_svd(torch.full((5, 5), float("nan")), 2)
    assert current() == chosen_by_the_caller


@pytest.mark.parametrize("columns", [1, 8, 16, 32, 64, 200])
@pytest.mark.parametrize("inner", [600, 3000])
def test_products_inside_are_fp32(columns: int, inner: int, chosen_by_the_caller: dict[str, object]) -> None:
    """Both orientations that a decomposition multiplies, narrow and wide; bf16 would be off by 1e-3."""
    left, right = gaussian(700, inner, seed=1), gaussian(inner, columns, seed=2)
    with exact_fp32():
        products = (left @ right, (right.t() @ left.t()).t())
    expected = left.double() @ right.double()
    for product in products:
        assert float((product.double() - expected).norm() / expected.norm()) < 3e-6


@pytest.mark.skipif(not hasattr(ONEDNN, "fp32_precision"), reason="this PyTorch has no setting per backend")
def test_processors_that_take_bf16_literally_get_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_onednn_is_exact", lambda: False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_fp32():
            assert current()["onednn"] == "ieee"
        assert current()["onednn"] == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(ONEDNN, "fp32_precision"), reason="this PyTorch has no setting per backend")
def test_the_trial_notices_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX: while the setting stands, products are made of bf16 inputs."""
    honest = torch.Tensor.__matmul__

    def rounded(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float32 and ONEDNN.fp32_precision == "bf16":
            left, right = left.bfloat16().float(), right.bfloat16().float()
        return honest(left, right)

    precision._onednn_is_exact.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    try:
        assert not precision._onednn_is_exact()
    finally:
        precision._onednn_is_exact.cache_clear()


@pytest.mark.gpu
def test_products_inside_are_fp32_on_cuda(chosen_by_the_caller: dict[str, object]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    left, right = gaussian(2048, 2048, seed=1).cuda(), gaussian(2048, 64, seed=2).cuda()
    with exact_fp32():
        product = left @ right
    expected = left.double() @ right.double()
    assert float((product.double() - expected).norm() / expected.norm()) < 3e-6
