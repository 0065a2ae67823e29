"""Debiased CKA against the formula, written out with loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kava_core.errors import KavaError, NonFiniteError
from kava_core.kv.maths.cka import StreamedCKA, hsic_sums


def unbiased_hsic(x, y):
    """HSIC_1 of Song et al. (2012), equation 5, with loops over the rows."""
    n = len(x)
    k = [[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    m = [[0.0 if i == j else float(y[i] @ y[j]) for j in range(n)] for i in range(n)]
    trace = sum(k[i][j] * m[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
    cross = sum(sum(k[i]) * sum(m[i]) for i in range(n)) * 2 / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def reference(teacher, student, rows):
    """Σ n · HSIC over minibatches, then the ratio; for every pair by itself."""
    starts = [s for s in range(0, teacher.shape[1], rows) if min(rows, teacher.shape[1] - s) >= 4]

    def total(x, y):
        chunks = [(x[s : s + rows].double(), y[s : s + rows].double()) for s in starts]
        return sum(len(a) * unbiased_hsic(a, b) for a, b in chunks)

    return torch.tensor(
        [[total(s, t) / math.sqrt(total(s, s) * total(t, t)) for t in teacher] for s in student],
        dtype=torch.float64,
    )


def streamed(teacher, student, rows=256, pieces=None):
    stream = StreamedCKA(rows)
    sizes = pieces or [teacher.shape[1]]
    for t, s in zip(teacher.split(sizes, 1), student.split(sizes, 1), strict=True):
        stream.add(t, s)
    return stream.similarity()


def related(t_layer=3, layer=2, rows=40, t_dim=7, dim=5, seed=0):
    """Layers that share a few directions, in different amounts."""
    made = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, 3, generator=made)

    def side(layers, width):
        mixed = common @ torch.randn(layers, 3, width, generator=made)
        noise = torch.arange(1, layers + 1).view(-1, 1, 1) * 0.7
        return mixed + noise * torch.randn(layers, rows, width, generator=made)

    return side(t_layer, t_dim), side(layer, dim)


def biased(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


@pytest.mark.parametrize("rows", [4, 8, 16, 40, 64])
def test_streamed_is_the_formula(rows):
    teacher, student = related()
    torch.testing.assert_close(
        streamed(teacher, student, rows), reference(teacher, student, rows), rtol=0, atol=2e-5
    )
    exact = streamed(teacher.double(), student.double(), rows)
    torch.testing.assert_close(exact, reference(teacher, student, rows), rtol=0, atol=1e-12)


def test_hsic_is_the_formula():
    teacher, student = related(rows=9)
    both, own, theirs = (each / 9 for each in hsic_sums(teacher.double(), student.double()))
    for i, s in enumerate(student.double()):
        assert own[i] == pytest.approx(unbiased_hsic(s, s), rel=1e-9)
        for j, t in enumerate(teacher.double()):
            assert both[i, j] == pytest.approx(unbiased_hsic(s, t), rel=1e-9)
            assert theirs[j] == pytest.approx(unbiased_hsic(t, t), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_independent_noise_reads_zero_where_the_biased_estimate_reads_one(seed):
    made = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(1, 100, dim, generator=made) for dim in (3584, 896))
    assert abs(streamed(teacher, student).item()) < 0.05
    assert biased(teacher[0], student[0]) > 0.9


def test_the_mean_over_samples_is_that_of_the_population():
    """Unbiased: the mean of HSIC over many small samples is ‖XᵀY‖² of the population."""
    made = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 3, generator=made, dtype=torch.float64)
    x = torch.randn(4000, 6, 2, generator=made, dtype=torch.float64)
    y = x @ mix
    found = torch.stack([hsic_sums(a[None], b[None])[0][0, 0] / 6 for a, b in zip(x, y, strict=True)])
    wanted = mix.square().sum()  # E[xᵀy] is the mixing matrix itself
    assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(4000)


def test_same_layers_read_one():
    teacher, _ = related()
    torch.testing.assert_close(
        streamed(teacher, teacher).diagonal(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("change", ["rotated", "scaled", "shifted"])
def test_rotation_scale_and_shift_change_nothing(change):
    teacher, student = related()
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1)))[0]
    changed = {"rotated": teacher @ turn, "scaled": teacher * 37.5, "shifted": teacher + 3}[change]
    torch.testing.assert_close(streamed(changed, student), streamed(teacher, student), rtol=0, atol=1e-5)


def test_the_order_of_rows_changes_nothing():
    teacher, student = related()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        streamed(teacher[:, order], student[:, order]), streamed(teacher, student), rtol=0, atol=1e-6
    )
    assert (streamed(teacher[:, order], student) - streamed(teacher, student)).abs().max() > 0.1


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [3, 5, 32], [0, 39, 1]])
def test_sizes_that_rows_are_added_in_change_nothing(pieces):
    teacher, student = related()
    torch.testing.assert_close(
        streamed(teacher, student, 16, pieces), streamed(teacher, student, 16), rtol=0, atol=1e-12
    )


def test_streaming_sums_instead_of_averaging_ratios():
    """The mean of the minibatches' own CKA is another number."""
    teacher, student = related(t_layer=1, layer=1, rows=400)
    parts = [streamed(t, s) for t, s in zip(teacher.split(5, 1), student.split(5, 1), strict=True)]
    together, whole = streamed(teacher, student, 5), streamed(teacher, student, 400)
    assert abs(together - whole) < 0.1
    assert abs(torch.stack(parts).mean() - whole) > 2 * abs(together - whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_channels_of_mean_3000_do_no_harm(dtype):
    teacher, student = related(rows=100)
    shift = torch.zeros(7)
    shift[[1, 4]] = 3000
    shifted = (teacher + shift).to(dtype)
    found = streamed(shifted, student)
    seen = shifted.double() - shift  # what is left of the features in this dtype
    torch.testing.assert_close(found, streamed(seen, student.double()), rtol=0, atol=2e-4)


def test_one_layer_and_a_teacher_with_fewer_layers():
    for t_layer, layer in [(1, 1), (1, 4), (2, 5)]:
        teacher, student = related(t_layer, layer)
        found = streamed(teacher, student)
        assert found.shape == (layer, t_layer)
        torch.testing.assert_close(found, reference(teacher, student, 256), rtol=0, atol=1e-5)


def test_layers_that_say_nothing_read_zero():
    teacher, student = related()
    teacher[1] = 3000.1
    student[0] = 0
    found = streamed(teacher, student)
    assert found[0].tolist() == [0, 0, 0]
    assert found[:, 1].tolist() == [0, 0]
    assert found[1, 0] > 0.1


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_too_few_rows_are_refused(rows):
    teacher, student = related()
    with pytest.raises(KavaError, match=f"^CKA: {rows} rows were added, at least 4 are needed$"):
        streamed(teacher[:, :rows], student[:, :rows])
    with pytest.raises(KavaError, match=f"^CKA: minibatches need at least 4 rows, not {rows}$"):
        StreamedCKA(rows)


def test_a_rest_of_three_rows_is_left_out():
    teacher, student = related(rows=35)
    torch.testing.assert_close(
        streamed(teacher, student, 8), streamed(teacher[:, :32], student[:, :32], 8), rtol=0, atol=1e-12
    )


def test_the_result_can_be_read_twice_and_added_to():
    teacher, student = related()
    stream = StreamedCKA(16)
    stream.add(teacher[:, :20], student[:, :20])
    first = stream.similarity()
    assert torch.equal(first, stream.similarity())
    stream.add(teacher[:, 20:], student[:, 20:])
    assert torch.equal(stream.similarity(), streamed(teacher, student, 16))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    teacher, student = related()
    teacher[2, 5, 0] = value
    with pytest.raises(NonFiniteError, match=r"^CKA: teacher layers \[2\] hold NaN or infinity$"):
        streamed(teacher, student)
