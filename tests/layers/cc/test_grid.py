"""The projected grid, against numbers worked out by hand."""

import pytest

from timm_contconv.layers.cc.grid import ResizedAxis, distances, neighbours, output_size


@pytest.mark.parametrize(
    ("axis", "grid"),
    [
        (ResizedAxis.of(4, 3, (3, 5), 2), [-1 / 6, 3 / 2, 19 / 6]),  # the paper's Fig. 4
        (ResizedAxis.of(4, 6, (7, 5), 2), [n / 1.4 + 1.5 - 5 / 2.8 for n in range(6)]),
        (ResizedAxis.of(6, 3, (1, 2), 2), [0.5, 2.5, 4.5]),  # scale 1/2 lies between pixels
        (ResizedAxis.of(9, 3, (1, 3), 3), [1, 4, 7]),  # 1/3 on them
    ],
)
def test_projected_grid(axis: ResizedAxis, grid: list[float]) -> None:
    assert [axis.position(n) / (2 * axis.numerator) for n in range(axis.out_size)] == pytest.approx(grid, rel=1e-12)


def test_neighbours_are_whole_and_distances_exact_where_two_are_as_near() -> None:
    axis = ResizedAxis.of(6, 3, (1, 2), 2)  # at 0.5, 2.5 and 4.5: ceil(g - 1) is the left neighbour
    assert neighbours(axis, 0, 3).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert distances(axis, 0, 3).tolist() == [[0.5, -0.5]] * 3
    huge = ResizedAxis.of(10**6, 10**6 * 3 // 7, (3, 7), 4)
    assert distances(huge, 10, 13).tolist() == distances(huge, 10 + 3 * 10**4, 13 + 3 * 10**4).tolist()


@pytest.mark.parametrize(("rounding", "size"), [("ceil", 11), ("floor", 10), ("round", 11)])
def test_output_sizes_are_rounded(rounding: str, size: int) -> None:
    assert output_size(14, (3, 4), rounding) == size
    assert output_size(1, (1, 3), rounding) == 1


@pytest.mark.parametrize("ratio", [(1, 1), (1, 2), (1, 3), (2, 1), (3, 4), (5, 3), (61, 100)])
def test_margins_are_what_the_outermost_neighbours_need(ratio: tuple[int, int]) -> None:
    for size in (1, 2, 5, 8, 9, 31):
        for out_size in {*(output_size(size, ratio, rounding) for rounding in ("ceil", "floor", "round")), 1, 4, 7}:
            for support in (1, 2, 3, 6):
                axis = ResizedAxis.of(size, out_size, ratio, support)
                pixels = neighbours(axis, 0, out_size)
                assert axis.margins() == (-pixels.min().item(), pixels.max().item() - (size - 1)), axis
