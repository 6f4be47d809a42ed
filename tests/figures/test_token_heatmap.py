"""The picture: right squares, right colours, labels as they are, a bounded size, and pyplot left alone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gradent.errors import InputError
from gradent.tokens.gram import TokenGram
from tests.report.token_records import HOSTILE


def token_gram(chosen: list[int], rejected: list[int]) -> TokenGram:
    """A gram of made-up gradients."""
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(len(ids), 9, generator=draw, dtype=torch.float64) for ids in (chosen, rejected)]
    return TokenGram(
        inner=grads[0] @ grads[1].T,
        chosen_sq=grads[0].square().sum(1),
        rejected_sq=grads[1].square().sum(1),
        chosen_ids=torch.tensor(chosen),
        rejected_ids=torch.tensor(rejected),
    )


GRAM = token_gram([5, 6, 7, 8, 9], [5, 6, 1, 8, 9, 2])


def part(figure: Figure, label: str):
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes


def labels(figure: Figure, side: str) -> list[str]:
    axes = part(figure, side)
    return [tick.get_text() for tick in (axes.get_yticklabels() if side == "chosen" else axes.get_xticklabels())]


def drawn(figure: Figure) -> np.ndarray:
    """All pixels, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def test_values_and_scales() -> None:
    figure = GRAM.plot()
    (heat,) = part(figure, "cosine").images
    np.testing.assert_allclose(heat.get_array(), GRAM.cosine.numpy())
    assert heat.get_clim() == (-1, 1)
    (beside,), (below,) = part(figure, "chosen").images, part(figure, "rejected").images
    np.testing.assert_allclose(beside.get_array()[:, 0], GRAM.chosen_entanglement)
    np.testing.assert_allclose(below.get_array()[0], GRAM.rejected_entanglement)
    largest = float(torch.cat([GRAM.chosen_entanglement, GRAM.rejected_entanglement]).abs().max())
    assert beside.get_clim() == below.get_clim() == pytest.approx((-largest, largest))
    red, white, blue = (heat.cmap(heat.norm(value))[:3] for value in (1, 0, -1))
    assert red[0] > red[2] and blue[2] > blue[0] and min(white) > 0.9


def test_shared_tokens_are_outlined_and_their_labels_are_grey() -> None:
    figure = GRAM.plot()
    dark = part(figure, "cosine").collections[-1]
    corners = [tuple(path.vertices[0] + 0.5) for path in dark.get_paths()]
    assert corners == [(b, a) for a, b in GRAM.alignment] == [(0, 0), (1, 1), (3, 3), (4, 4)]
    shades = [tick.get_color() for tick in part(figure, "rejected").get_xticklabels()]
    assert [shade == "#000000" for shade in shades] == [False, False, True, False, False, True]


def test_ids_or_texts() -> None:
    assert labels(GRAM.plot(), "chosen") == ["0 5", "1 6", "2 7", "3 8", "4 9"]
    figure = GRAM.plot(["The", " film", " was", " good", "."], ["The", " film", " is", " good", ".", "\n"])
    assert labels(figure, "chosen") == ["0 The", "1 ␣film", "2 ␣was", "3 ␣good", "4 ."]
    assert labels(figure, "rejected")[-1] == "5 ⏎"


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_texts_must_be_one_a_token(side) -> None:
    with pytest.raises(InputError, match=f"{side}_tokens holds 2 texts, and the {side} response has . tokens"):
        GRAM.plot(**{f"{side}_tokens": ["a", "b"]})


def test_hostile_texts_are_drawn_as_they_are() -> None:
    count = len(HOSTILE)
    gram = token_gram(list(range(count)), list(range(count)))
    figure = gram.plot(HOSTILE, HOSTILE, title="".join(HOSTILE))
    assert drawn(figure).std() > 0
    shown = labels(figure, "chosen")
    assert shown[0] == "0 </script><img␣src…" and shown[3] == "3 $x$" and shown[4] == "4 \\u202eabc"
    assert all(text.isprintable() for text in shown)
    ticks = part(figure, "rejected").get_xticklabels()
    assert not any(tick.get_parse_math() or tick.get_usetex() for tick in [*ticks, *figure.texts])


def test_a_character_that_no_font_has_is_written_by_its_number() -> None:
    private = "\U0010fffd"
    figure = token_gram([1], [2]).plot([f"a{private}"], ["b"])
    assert labels(figure, "chosen") == ["0 a\\U0010fffd"]
    drawn(figure)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 200), (200, 1), (20, 30), (200, 200), (700, 400)])
def test_every_size_is_bounded_and_legible(rows, columns) -> None:
    figure = token_gram(list(range(rows)), list(range(columns))).plot(title="A title " * 9)
    width, height = figure.get_size_inches()
    assert 3 <= width <= 18 and 3 <= height <= 18
    drawn(figure)
    renderer = figure.canvas.get_renderer()
    for side, axis in (("chosen", "yaxis"), ("rejected", "xaxis")):
        ticks = getattr(part(figure, side), axis).get_ticklabels()
        assert all(tick.get_fontsize() >= 4 for tick in ticks)
        boxes = [tick.get_window_extent(renderer) for tick in ticks]
        edges = [(box.y0, box.y1) if side == "chosen" else (-box.x1, -box.x0) for box in boxes]
        overlaps = [upper[0] - lower[1] for upper, lower in pairwise(edges)]
        assert min(overlaps, default=0) > -0.35 * figure.dpi * 4 / 72, "labels run into each other"
        assert all(min(box.x0, box.y0) >= 0 for box in boxes), "a label leaves the figure"
    texts = [text.get_window_extent(renderer) for text in figure.texts]
    assert all(box.x1 <= width * figure.dpi for box in texts), "a line leaves the figure"


def test_a_token_without_gradient_is_grey() -> None:
    gram = token_gram([1, 2], [1, 3])
    gram.inner[0], gram.chosen_sq[0] = 0.0, 0.0
    assert gram.cosine.isnan().any()
    figure = gram.plot()
    (heat,) = part(figure, "cosine").images
    assert heat.get_array().mask.tolist() == [[True, True], [False, False]]
    assert any("no cosine" in text.get_text() for text in figure.texts)
    assert not any("no cosine" in text.get_text() for text in GRAM.plot().texts)
    drawn(figure)


def test_a_pair_without_any_gradient() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    ids = torch.tensor([1])
    gram = TokenGram(inner=nothing[None], chosen_sq=nothing, rejected_sq=nothing, chosen_ids=ids, rejected_ids=ids + 1)
    figure = gram.plot()
    (heat,) = part(figure, "cosine").images
    assert heat.get_array().mask.all()
    drawn(figure)


def test_written_as_png(tmp_path) -> None:
    GRAM.plot(path=tmp_path / "tokens.png", title="Pair 7")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [("tokens.pdf", r"must end in \.png"), ("tokens", r"must end in \.png"), ("gone/tokens.png", "cannot write there")],
)
def test_a_path_that_will_not_do(name, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        GRAM.plot(path=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_the_user_do_not_break_it(monkeypatch) -> None:
    for name, value in {"text.usetex": True, "axes.grid": True, "font.family": ["serif", "No Such Font"]}.items():
        monkeypatch.setitem(mpl.rcParams, name, value)
    assert np.ptp(drawn(GRAM.plot(title="$x$"))) > 0


def test_pyplot_is_left_alone() -> None:
    source = (
        "import sys, torch\nfrom gradent import TokenGram\nassert 'matplotlib' not in sys.modules\n"
        "one = torch.ones(1, dtype=torch.float64)\nids = one.long()\n"
        "gram = TokenGram(inner=one[None], chosen_sq=one, rejected_sq=one, chosen_ids=ids, rejected_ids=ids)\n"
        "figure = gram.plot()\nimport matplotlib\n"
        "print('matplotlib.pyplot' in sys.modules, dict.__getitem__(matplotlib.rcParams, 'backend'))"
    )
    run = [sys.executable, "-c", source]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, check=False, env={"MPLBACKEND": "svg"})
    assert done.stdout.split() == ["False", "svg"], done.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r'not installed.*pip install "gradent\[audit\]"'):
        GRAM.plot()
