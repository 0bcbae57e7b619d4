"""The certificate is sound and meets the tolerance, and the factors are what they claim to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pissa_hub.errors import MatrixError
from pissa_hub.factorization import adaptive, svd
from pissa_hub.factorization.rayleigh_ritz import Subspace
from pissa_hub.factorization.svd import DENSE_SIZE, SVDSettings, TruncatedSVD, truncated_svd
from pissa_hub.factorization.workspace import Workspace
from tests.factorization.matrices import (
    FAMILIES,
    gaussian,
    low_rank,
    matrix,
    multiple,
    orthogonal,
    power_law,
    singular_values,
    trained,
    true_loss,
    true_sigma_error,
    with_spectrum,
)

SQUARE, TALL, WIDE = (600, 600), (900, 560), (560, 900)
# Rounding of the reference itself.
REFERENCE = 1e-13


def check(weight: Tensor, sigma: Tensor, result: TruncatedSVD, tolerance: float = 1e-5) -> None:
    """Sound, and as good as asked for."""
    certificate = result.certificate
    assert true_loss(weight, sigma, result) <= certificate.energy_loss + REFERENCE
    assert true_sigma_error(sigma, result) <= certificate.sigma_error + REFERENCE
    assert certificate.energy_loss <= tolerance
    assert torch.isfinite(result.U).all()
    assert torch.isfinite(result.Vt).all()
    # Also where singular values are lost in rounding, no column of U is longer than a unit vector.
    assert float(torch.linalg.vector_norm(result.U, dim=0).max()) <= 1 + 1e-5
    assert (result.s.diff() <= 0).all()


def same_bytes(one: TruncatedSVD, two: TruncatedSVD) -> bool:
    pairs = ((one.U, two.U), (one.s, two.s), (one.Vt, two.Vt))
    return all(torch.equal(a, b) for a, b in pairs) and one.certificate == two.certificate


# --- soundness ---


@pytest.mark.parametrize("family", FAMILIES)
def test_is_sound_and_meets_the_tolerance(family: str) -> None:
    seed = list(FAMILIES).index(family)
    rows, columns = (SQUARE, TALL, WIDE)[seed % 3]
    assert min(rows, columns) > DENSE_SIZE
    weight, sigma = matrix(family, rows, columns, seed), singular_values(family, rows, columns, seed)
    # A flat spectrum takes the dense path at every rank; two tell as much as five.
    for rank in (8, 128) if family in ("identity", "isometry", "multiple") else (1, 8, 64, 128, min(rows, columns)):
        check(weight, sigma, truncated_svd(weight, rank, name=family))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-6, 1e-7])
@pytest.mark.parametrize("family", ["power_law", "trained_bf16", "clustered", "low_rank", "massive_column"])
def test_other_tolerances(family: str, tolerance: float) -> None:
    weight, sigma = matrix(family, *TALL, 5), singular_values(family, *TALL, 5)
    for rank in (8, 64):
        result = truncated_svd(weight, rank, SVDSettings(tolerance=tolerance))
        check(weight, sigma, result, tolerance)
        if tolerance < 1e-6:
            assert result.certificate.kind == "dense"


@pytest.mark.parametrize("family", ["power_law", "trained", "trained_bf16", "clustered", "tiny", "huge"])
@pytest.mark.parametrize("shape", [(1024, 740), (740, 1024), (800, 800)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_krylov_serves_what_decays(family: str, shape: tuple[int, int], seed: int) -> None:
    weight, sigma = matrix(family, *shape, 0), singular_values(family, *shape, 0)
    for rank in (1, 8, 64):
        result = truncated_svd(weight, rank, SVDSettings(seed=seed))
        check(weight, sigma, result)
        assert result.certificate.kind == "probe"
        assert result.products > 0
        assert 0 < result.certificate.failure_probability < 1e-6


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (1, 1), (2, 700), (700, 3), (40, 50)])
def test_thin_and_small(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, seed=1)
    for rank in {1, min(shape)}:
        result = truncated_svd(weight, rank)
        check(weight, torch.linalg.svdvals(weight.double()), result, tolerance=1e-9)
        assert result.certificate.kind == "dense"


def test_energy_alone_certifies_low_rank() -> None:
    """Rank 40 under factors of rank 64 leaves nothing outside: neither a probe nor the dense path is needed."""
    weight = low_rank(800, 700, seed=3)
    result = truncated_svd(weight, 64)
    check(weight, torch.linalg.svdvals(weight.double()), result)
    assert result.certificate.kind == "energy"
    assert result.certificate.failure_probability == 0


@pytest.mark.parametrize(
    "outlier", [30.0, 300.0, *(pytest.param(value, marks=pytest.mark.slow) for value in (10.0, 70.0, 150.0, 1000.0))]
)
def test_a_large_singular_value_hides_nothing(outlier: float) -> None:
    """What H produces beside it looks like rounding noise; what is dropped as noise must be accounted for."""
    i = torch.arange(640, dtype=torch.float64)
    spectra = {
        "plateau": torch.where(i < 16, 1.0, 0.2 * (i + 1) ** -0.1),
        "power": (i + 1) ** -0.16,
        "falling": 0.97**i,
    }
    for name, sigma in spectra.items():
        weight = with_spectrum(torch.cat([torch.tensor([outlier]), sigma[:-1]]), 700, 640, seed=1)
        exact = torch.linalg.svdvals(weight.double())
        for rank in (4, 8, 32):
            for seed in range(2):
                check(weight, exact, truncated_svd(weight, rank, SVDSettings(seed=seed), name=name))


@pytest.mark.parametrize("largest", [1e-44, 1e-38, 1e-20, 1e-9, 1e-4, 9e3, 9e8, 1e20, 1.6e38, 3.3e38])
def test_any_scale(largest: float) -> None:
    weight = trained(700, 600, seed=2)
    weight = (weight.double() * (largest / float(weight.abs().max()))).float()
    assert 0 < weight.abs().max() < float("inf")
    result = truncated_svd(weight, 8)
    # In float64 the reference has no scale of its own.
    check(weight, torch.linalg.svdvals(weight.double()), result)
    # Nothing over- or underflowed on the way, or the dense path had to come to the rescue.
    assert result.certificate.kind == "probe"
    assert result.energy > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1024, 1024), (2048, 1024), (1024, 3000)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_on_a_thousand(family: str, shape: tuple[int, int]) -> None:
    weight, sigma = FAMILIES[family](*shape, 11), None
    sigma = torch.linalg.svdvals(weight.double())
    for rank in (1, 8, 64, 128):
        check(weight, sigma, truncated_svd(weight, rank, SVDSettings(seed=rank), name=family))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 2048)])
def test_sound_on_thousands(shape: tuple[int, int]) -> None:
    """Shuffled signs keep the singular values of a diagonal known without an SVD this large."""
    size = min(shape)
    i = torch.arange(size, dtype=torch.float64)
    sigma = (i + 1) ** -0.25 * (1 - i / size) ** 0.7
    weight = householder_rotated(sigma, *shape)
    exact = torch.linalg.eigvalsh(weight.double().t() @ weight.double()).flip(0).clamp_min(0).sqrt()
    for rank in (1, 8, 64, 128):
        result = truncated_svd(weight, rank)
        check(weight, exact, result)
        assert result.certificate.kind == "probe"


def householder_rotated(sigma: Tensor, rows: int, columns: int) -> Tensor:
    """diag(sigma) between products of reflections: dense, and much cheaper than two QR factorisations."""
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    weight.diagonal().copy_(sigma)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        left = torch.nn.functional.normalize(torch.randn(rows, generator=generator).double(), dim=0)
        right = torch.nn.functional.normalize(torch.randn(columns, generator=generator).double(), dim=0)
        weight -= 2 * torch.outer(left, left @ weight)
        weight -= 2 * torch.outer(weight @ right, right)
    return weight.float()


def test_only_the_certificate_itself_ends_the_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that steers is an estimate in fp32; nothing is returned on its word."""
    monkeypatch.setattr(Subspace, "loss", lambda *_: 0.0)
    for family in ("clustered", "gaussian"):
        weight, sigma = matrix(family, 1024, 740, 0), singular_values(family, 1024, 740, 0)
        check(weight, sigma, truncated_svd(weight, 8))


# --- what the start block cannot see ---


@pytest.fixture
def blind_start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], list[str]]:
    """Makes every start block orthogonal to the given directions; returns a list of the blocks drawn."""

    def blind(directions: Tensor) -> list[str]:
        honest, drawn = adaptive.gaussian, []

        def gaussian_block(rows: int, columns: int, like: Tensor, seed: int, *key: object) -> Tensor:
            block = honest(rows, columns, like, seed, *key)
            drawn.extend(part for part in key if part in ("start", "probe", "refill"))
            if "start" in key:
                wide = directions.double()
                for _ in range(2):
                    block = (block.double() - wide @ (wide.t() @ block.double())).float()
            return block

        monkeypatch.setattr(adaptive, "gaussian", gaussian_block)
        return drawn

    return blind


@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_start_block_orthogonal_to_a_leading_vector_is_caught(
    which: int, blind_start: Callable[[Tensor], list[str]]
) -> None:
    """An axis-aligned singular vector, so that no rounding error ever leaks it into the Krylov space."""
    size, sigma = 640, torch.arange(1, 641, dtype=torch.float64) ** -0.5
    weight = torch.zeros(size, size)
    rest = with_spectrum(sigma[torch.arange(size) != which], size - 1, size - 1, seed=4)
    weight[1:, 1:] = rest
    weight[0, 0] = sigma[which]
    drawn = blind_start(torch.eye(size)[:, :1])
    result = truncated_svd(weight, 8)
    check(weight, torch.linalg.svdvals(weight.double()), result)
    assert result.certificate.kind == "probe"
    assert "probe" in drawn
    assert float(result.Vt[which, 0]) == pytest.approx(1, abs=1e-4)


def test_a_start_block_orthogonal_to_forty_vectors_is_caught(
    blind_start: Callable[[Tensor], list[str]],
) -> None:
    """More than one probe can bring in at once."""
    weight = torch.zeros(700, 640)
    weight[:40, :40] = torch.diag(torch.linspace(3, 2, 40))
    weight[40:, 40:] = trained(660, 600, seed=6)
    blind_start(torch.eye(640)[:, :40])
    result = truncated_svd(weight, 48)
    check(weight, torch.linalg.svdvals(weight.double()), result)


@pytest.mark.parametrize("rank", [8, 64, 99])
def test_more_copies_than_the_block_has_columns(rank: int) -> None:
    """Krylov spaces from b columns hold b copies of a repeated singular value in exact arithmetic, 100 are there."""
    weight = multiple(700, 600, seed=8)
    check(weight, torch.linalg.svdvals(weight.double()), truncated_svd(weight, rank))


def test_copies_within_the_reach_of_probes_need_no_dense_path() -> None:
    """Forty copies, axis-aligned, against a block of 32, with a clear gap behind them."""
    weight = torch.diag(torch.cat([torch.full((40,), 1.0), torch.linspace(0.1, 0.01, 600)]))
    result = truncated_svd(weight, 40)
    check(weight, weight.diagonal().double(), result)
    assert result.certificate.kind in ("energy", "probe")


# --- the other methods ---


@pytest.mark.parametrize("family", ["power_law", "trained_bf16", "gaussian", "multiple", "low_rank", "outlier", "zero"])
def test_full_is_sound_and_exact(family: str) -> None:
    weight, sigma = matrix(family, *TALL, 2), singular_values(family, *TALL, 2)
    for rank in (1, 64, 560):
        result = truncated_svd(weight, rank, SVDSettings(method="full"))
        check(weight, sigma, result, tolerance=1)
        assert true_loss(weight, sigma, result) <= 1e-7


def test_full_certifies_where_there_is_a_gap() -> None:
    weight, sigma = matrix("power_law", *TALL, 2), singular_values("power_law", *TALL, 2)
    assert truncated_svd(weight, 64, SVDSettings(method="full")).certificate.energy_loss <= 1e-5
    result = truncated_svd(weight, 560, SVDSettings(method="full"))
    check(weight, sigma, result)


@pytest.mark.parametrize("family", ["power_law", "trained_bf16", "gaussian", "clustered", "outlier", "low_rank"])
@pytest.mark.parametrize("rank", [8, 64])
def test_randomized_is_sound_and_gains_from_iterations(family: str, rank: int) -> None:
    weight, sigma = matrix(family, *TALL, 2), singular_values(family, *TALL, 2)
    losses, certified = [], []
    for niter in (0, 1, 4, 16):
        result = truncated_svd(weight, rank, SVDSettings(method="randomized", niter=niter))
        check(weight, sigma, result, tolerance=1)
        losses.append(true_loss(weight, sigma, result))
        certified.append(result.certificate.energy_loss)
    rounding = 1e-7
    assert all(later <= sooner + rounding for sooner, later in pairwise(losses))
    assert certified[-1] <= certified[0] + 1e-6
    if family == "trained_bf16" and rank == 64:
        assert losses[0] > 10 * losses[2] > 20 * losses[3]


def test_methods_agree() -> None:
    weight = matrix("power_law", *WIDE, 1)
    krylov, full = (truncated_svd(weight, 16, SVDSettings(method=method)) for method in ("krylov", "full"))
    torch.testing.assert_close(krylov.s, full.s, rtol=1e-4, atol=0)
    for one, two in ((krylov.U, full.U), (krylov.Vt, full.Vt)):
        torch.testing.assert_close(one[:4, :4], two[:4, :4], rtol=0, atol=1e-2)


# --- form of the result ---


@pytest.mark.parametrize("method", ["krylov", "full", "randomized"])
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE, (30, 50), (50, 30)])
def test_form(method: svd.Method, shape: tuple[int, int]) -> None:
    weight = matrix("trained", *shape, 3)
    before = weight.clone()
    rank = 20
    result = truncated_svd(weight, rank, SVDSettings(method=method))
    assert torch.equal(weight, before)
    assert result.U.shape == (shape[0], rank)
    assert result.Vt.shape == (rank, shape[1])
    assert result.U.dtype == result.Vt.dtype == torch.float32
    assert result.U.is_contiguous()
    assert result.Vt.is_contiguous()
    assert result.s.dtype == torch.float64
    assert (result.s.diff() < 0).all()
    identity = torch.eye(rank, dtype=torch.float64)
    left, right = result.U.double(), result.Vt.double()
    torch.testing.assert_close(left.t() @ left, identity, rtol=0, atol=1e-5)
    torch.testing.assert_close(right @ right.t(), identity, rtol=0, atol=1e-5)
    assert torch.equal(result.Vt.amax(dim=1), result.Vt.abs().amax(dim=1))
    sigma = singular_values("trained", *shape, 3)
    energy = float((sigma[:rank] ** 2).sum() / (sigma**2).sum())
    assert result.energy == pytest.approx(energy, rel=1e-3 if method != "randomized" else 0.1)


def test_zero_matrix() -> None:
    for shape in (SQUARE, (5, 7)):
        result = truncated_svd(torch.zeros(shape), 5)
        assert torch.isfinite(result.U).all()
        assert not result.s.any()
        assert result.energy == 1
        assert result.certificate.energy_loss < 1e-6
        assert result.certificate.sigma_error == 0


# --- determinism ---


@pytest.mark.parametrize("method", ["krylov", "full", "randomized"])
def test_same_bytes_whatever_the_global_generator_and_workspace(method: svd.Method) -> None:
    settings = SVDSettings(method=method, seed=4)
    weights = [matrix("trained", *shape, 1) for shape in (SQUARE, WIDE, (80, 90), TALL)]
    workspace = Workspace()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [truncated_svd(weight, 16, settings, name="a", workspace=workspace) for weight in weights]
    assert torch.equal(torch.get_rng_state(), state)
    kept = [dataclasses.replace(one, U=one.U.clone(), Vt=one.Vt.clone()) for one in first]
    torch.manual_seed(2)
    for _ in range(2):
        # Other sizes and ranks leave other bytes behind in the buffers.
        truncated_svd(matrix("gaussian", 620, 1000, 1), 24, settings, name="b", workspace=workspace)
        for weight, one in zip(reversed(weights), reversed(first), strict=True):
            assert same_bytes(truncated_svd(weight, 16, settings, name="a", workspace=workspace), one)
            assert same_bytes(truncated_svd(weight, 16, settings, name="a"), one)
    # The results themselves do not lie in the workspace.
    assert all(same_bytes(one, two) for one, two in zip(first, kept, strict=True))


def test_start_depends_on_seed_and_name_and_certificates_hold_for_all() -> None:
    weight, sigma = matrix("trained", *SQUARE, 1), singular_values("trained", *SQUARE, 1)
    results = [
        truncated_svd(weight, 8, SVDSettings(seed=seed), name=name)
        for seed, name in [(0, "a"), (1, "a"), (-7, "a"), (2**63, "a"), (0, "b")]
    ]
    for position, one in enumerate(results):
        check(weight, sigma, one)
        assert not any(torch.equal(one.Vt, two.Vt) for two in results[:position])


# --- refusals ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["krylov", "full", "randomized"])
def test_non_finite_names_tensor_and_place(bad: float, method: svd.Method) -> None:
    weight = gaussian(30, 20, seed=0)
    weight[7, 3] = weight[7, 4] = weight[9, 0] = bad
    with pytest.raises(MatrixError, match=r"layers\.0\.q has 3 NaN or Inf, the first at \[7, 3\]"):
        truncated_svd(weight, 4, SVDSettings(method=method), name="layers.0.q")


@pytest.mark.parametrize("rank", [0, -1, 21, 31])
def test_bad_rank_is_named(rank: int) -> None:
    with pytest.raises(MatrixError, match=rf"rank {rank} does not fit layers\.0\.q of shape \(30, 20\).*1 to 20"):
        truncated_svd(gaussian(30, 20, seed=0), rank, name="layers.0.q")


# --- on a CUDA device ---


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    allowed = torch.backends.cuda.matmul.allow_tf32
    # What training scripts do; certificates must not notice.
    torch.backends.cuda.matmul.allow_tf32 = True
    yield torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_on_cuda(family: str, cuda: torch.device) -> None:
    for shape in (SQUARE, TALL, WIDE):
        weight, sigma = matrix(family, *shape, 1), singular_values(family, *shape, 1)
        for rank in (1, 8, 64, 128, 560):
            check(weight, sigma, on_cpu(truncated_svd(weight.to(cuda), rank, name=family)))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["krylov", "full", "randomized"])
def test_same_bytes_on_cuda(method: svd.Method, cuda: torch.device) -> None:
    weight, sigma = matrix("trained", 1400, 1200, 1), singular_values("trained", 1400, 1200, 1)
    settings, workspace = SVDSettings(method=method), Workspace()
    state = torch.cuda.get_rng_state()
    first = truncated_svd(weight.to(cuda), 64, settings, workspace=workspace)
    truncated_svd(power_law(900, 2000, 1).to(cuda), 64, settings, workspace=workspace)
    assert same_bytes(truncated_svd(weight.to(cuda), 64, settings, workspace=workspace), first)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    check(weight, sigma, on_cpu(first), tolerance=1e-5 if method == "krylov" else 1)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(cuda: torch.device) -> None:
    weight = matrix("trained", 1400, 1200, 1)
    here, there = truncated_svd(weight, 64), truncated_svd(weight.to(cuda), 64)
    torch.testing.assert_close(here.s, there.s, rtol=1e-3, atol=0)
    assert there.U.device.type == there.Vt.device.type == "cuda"


def on_cpu(result: TruncatedSVD) -> TruncatedSVD:
    return dataclasses.replace(result, U=result.U.cpu(), Vt=result.Vt.cpu())


def test_orthogonal_helper() -> None:
    columns = orthogonal(30, 10, seed=0)
    torch.testing.assert_close(columns.t() @ columns, torch.eye(10, dtype=torch.float64))
