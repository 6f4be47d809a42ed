"""The gram kernel in Triton's interpreter, against gradients held whole in float64."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from gradent.errors import InputError
from gradent.kernels.common import triton_operands as operands
from gradent.kernels.common import triton_tiles
from gradent.kernels.common.tiles import gram_configs, pick_gram, unit
from gradent.kernels.common.triton_operands import Spans, blank, on_device
from gradent.kernels.gram import triton as gram
from gradent.kernels.gram.triton import gram_entries, gram_scratch
from tests.kernels.operands import DTYPES, draw, scaled, strided

SMALL = gram_configs(torch.float32)[0]
SHAPES = [
    ([1], [1], 1, 1),
    ([3], [17], 63, 129),
    ([129], [63], 17, 3),
    ([63], [1], 129, 17),
    ([17, 0, 63, 0, 1], [3, 17, 0, 0, 40], 17, 63),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[list[int], list[int], int, int]) -> None:
    given = draw(*shape)
    got = gram_entries(*given.factors, given.spans, poison=True)
    assert got.dtype == torch.float64 and got.shape == (len(given.spans), 3)
    assert scaled(got, given.entries()) <= given.limit()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given = draw([17, 0, 40], [3, 33, 5], 63, 129, dtypes)
    assert scaled(gram_entries(*given.factors, given.spans, poison=True), given.entries()) <= given.limit()


@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 64, 65, 80, 97])
def test_every_tile_of_a_triangle_once(tokens: int) -> None:
    """One to seven tiles a side: even and odd counts fold in two ways."""
    given = draw([tokens], [tokens // 2], 3, 5)
    got = gram_entries(*given.factors, given.spans, config=SMALL, poison=True)
    assert scaled(got, given.entries()) <= given.limit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration(dtype: torch.dtype) -> None:
    given = draw([35, 3], [17, 0], 19, 45, (dtype, dtype))
    for config in gram_configs(dtype):
        got = gram_entries(*given.factors, given.spans, config=config, poison=True)
        assert scaled(got, given.entries()) <= given.limit(), config


def test_any_strides() -> None:
    given = draw([17, 5], [3, 20], 63, 33)
    got = gram_entries(*(strided(factor) for factor in given.factors), given.spans)
    assert torch.equal(got, gram_entries(*given.factors, given.spans))


def test_strides_that_no_tile_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets of 64 bits within a tile give what those of 32 do."""
    given = draw([17, 5], [3, 20], 35, 33)
    near = gram_entries(*given.factors, given.spans)
    monkeypatch.setattr(triton_tiles, "REACH", 1)
    assert torch.equal(gram_entries(*given.factors, given.spans), near)


@pytest.mark.parametrize(("rows", "cols"), [(8, 24), (8, 7), (5, 16), (1, 8)])
def test_sizes_told_in_eights(rows: int, cols: int) -> None:
    """The same bits where rows are multiples of 8 apart, and where they are not."""
    given = draw([17, 5], [3, 20], rows, cols)
    apart = [torch.full((len(factor), factor.shape[1] + 3), float("nan")) for factor in given.factors]
    views = [wide[:, :-3].copy_(factor) for wide, factor in zip(apart, given.factors, strict=True)]
    got = gram_entries(*given.factors, given.spans, poison=True)
    assert scaled(got, given.entries()) <= given.limit()
    assert torch.equal(got, gram_entries(*views, given.spans, poison=True))


def test_units() -> None:
    assert unit(8, 4096, 0) == 8
    assert unit(8, 4096, 12) == unit(1) == unit(8, 2**31) == 1


def test_spans_and_their_tables_are_made_once() -> None:
    given = Spans.padded(2, 9, torch.tensor([9, 0, 3, 4]))
    assert given is Spans.padded(2, 9, [9, 0, 3, 4])
    assert given == Spans(torch.tensor([0, 9]), [9, 0], (0, 9), torch.tensor([3, 4]))
    table = on_device(given, "lines", torch.device("cpu"))
    assert table.tolist() == [[0, 9, 0, 3], [9, 0, 9, 4]] and table.dtype == torch.int64
    assert table is on_device(Spans([0, 9], [9, 0], [0, 9], [3, 4]), "lines", torch.device("cpu"))
    products = on_device(given, "products", torch.device("cpu"))
    assert products.tolist() == [[kind, *line] for line in table.tolist() for kind in range(3)]
    assert given.longest == 9 and len(given) == 2
    for tokens in range(1000):
        on_device(Spans.padded(1, tokens), "lines", torch.device("cpu"))
    for kept in (operands._padded, operands._table):  # noqa: SLF001
        assert kept.cache_info().currsize <= operands.CACHED


def test_a_device_has_a_table_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is ordered by the stream that was current; one that a graph captures is made when that graph runs."""
    made: list[int] = []
    now = {"cuda_stream": 7, "capturing": False}

    @lru_cache
    def table(spans: Spans, name: str, device: torch.device, stream: int) -> torch.Tensor:
        made.append(stream)
        return torch.zeros(len(spans), 4)

    monkeypatch.setattr(operands, "_table", table)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(**now))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spans, device = Spans.of_pair(3, 4), torch.device("cuda", 0)
    assert on_device(spans, "lines", device) is on_device(spans, "lines", device)
    now["cuda_stream"] = 8
    assert on_device(spans, "lines", device) is on_device(Spans.of_pair(3, 4), "lines", device)
    assert made == [7, 8]
    now["capturing"] = True
    assert on_device(spans, "lines", device) is not on_device(spans, "lines", device)
    assert len(made) == 4


def test_packed_rows() -> None:
    given, lengths = draw([17, 0, 5], [3, 20, 1], 19, 33), ([17, 0, 5], [3, 20, 1])
    packed = [factor[~factor[:, 0].isnan()] for factor in given.factors]
    got = gram_entries(*packed, Spans.packed(*lengths))
    assert torch.equal(got, gram_entries(*given.factors, given.spans))


def test_sums_of_one_sign() -> None:
    given = draw([70], [33], 129, 63, shift=3.0)
    assert scaled(gram_entries(*given.factors, given.spans), given.entries()) <= given.limit()


def test_the_same_bits_every_time() -> None:
    given = draw([50, 3], [33, 20], 19, 33)
    first = gram_entries(*given.factors, given.spans)
    assert torch.equal(gram_entries(*given.factors, given.spans, poison=True), first)


def test_pairs_do_not_depend_on_their_company() -> None:
    given = draw([17, 40, 5], [3, 20, 1], 19, 33)
    together = gram_entries(*given.factors, given.spans, config=SMALL)
    middle = Spans(*(part[1:2] for part in vars(given.spans).values()))
    alone = gram_entries(*given.factors, middle, config=SMALL)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([0, 0], [0, 0])], ids=str)
def test_nothing_to_do(lengths: tuple[list[int], list[int]]) -> None:
    empty = [torch.zeros(0, width) for width in (5, 7, 5, 7)]
    assert torch.equal(gram_entries(*empty, Spans.packed(*lengths)), torch.zeros(len(lengths[0]), 3).double())


def test_scratch_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given, made = draw([50, 3], [33, 20], 19, 33), []
    monkeypatch.setattr(gram, "blank", lambda *shape, **how: made.append(blank(*shape, **how)) or made[-1])
    gram_entries(*given.factors, given.spans)
    said = gram_scratch(*given.factors, given.spans)
    assert said == made[0].nbytes + on_device(given.spans, "products", torch.device("cpu")).nbytes


def test_the_test_can_fail() -> None:
    given = draw([17, 5], [3, 20], 63, 33)
    right, (u_w, v_w, u_l, v_l) = given.entries(), given.factors
    assert scaled(torch.zeros_like(right), right) > 0.1
    assert scaled(right * float("nan"), right) == float("inf")
    assert scaled(gram_entries(u_w, v_w, u_l, v_l, Spans.padded(2, 21, torch.tensor([16, 5, 3, 20]))), right) > 1e-3
    swapped = Spans(*(given.spans.rejected_start, given.spans.rejected_length) * 2)
    assert scaled(gram_entries(u_l, v_l, u_l, v_l, swapped), right) > 0.1
    longer = Spans.padded(2, 21, torch.tensor([18, 5, 3, 20]))
    assert scaled(gram_entries(u_w, v_w, u_l, v_l, longer), right) == float("inf"), "the padding is poisoned"


def test_what_is_refused() -> None:
    given = draw([3], [5], 7, 9)
    u_w, v_w, u_l, v_l = given.factors
    with pytest.raises(InputError, match=r"take float32.*float64"):
        gram_entries(*(factor.double() for factor in given.factors), given.spans)
    with pytest.raises(InputError, match="one dtype"):
        gram_entries(u_w.half(), v_w, u_l, v_l, given.spans)
    with pytest.raises(InputError, match="same O"):
        gram_entries(u_w[:, 1:], v_w, u_l, v_l, given.spans)
    with pytest.raises(InputError, match="row for every token"):
        gram_entries(u_w[1:], v_w, u_l, v_l, given.spans)
    with pytest.raises(InputError, match="ends behind the last of 6 rows"):
        gram_entries(*given.factors, Spans.of_pair(7, 5))
    with pytest.raises(InputError, match="none of them negative"):
        Spans.of_pair(-1, 5)
    with pytest.raises(InputError, match="four numbers a pair"):
        Spans([0], [1, 2], [0], [1])
    with pytest.raises(InputError, match=r"torch.float32 \[1\]"):
        Spans([0], torch.ones(1), [0], [1])
    with pytest.raises(InputError, match="none above 4"):
        Spans.padded(1, 4, torch.tensor([5, 1]))


def test_tiles_shrink_where_a_device_would_idle() -> None:
    assert pick_gram(torch.bfloat16, 4096, 1).rows == 128
    assert pick_gram(torch.bfloat16, 512, 1).rows == 64
    assert pick_gram(torch.bfloat16, 512, 16).rows == 128
    assert pick_gram(torch.float32, 8192, 16).rows == 64
    assert pick_gram(torch.bfloat16, 1, 1).rows == 16
