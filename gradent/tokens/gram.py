"""The result of `measure_tokens`: a pair's token matrix, and what it says about which tokens entangle.

Letters: T_w and T_l completion tokens of chosen and rejected; a a chosen token, b a rejected one; M the matrix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TokenGram", "TokenSplit", "match_tokens"]


def match_tokens(chosen: list[int], rejected: list[int]) -> list[tuple[int, int]]:
    """`(a, b)` with `chosen[a] == rejected[b]`, both increasing: the token ids that a diff leaves unchanged."""
    blocks = SequenceMatcher(None, chosen, rejected, autojunk=False).get_matching_blocks()
    return [(block.a + step, block.b + step) for block in blocks for step in range(block.size)]


@dataclass(frozen=True, kw_only=True)
class TokenSplit:
    """A pair's `⟨g_w, g_l⟩` by whether its tokens are shared by both responses or tell them apart.

    A token is *identical* where the alignment of the two responses matches it, else *differing*. The matrix falls into
    blocks: both tokens identical, both differing, one of each. The last is nobody's alone, so each kind is given half.

    Attributes:
        both_identical: sum over entries of two identical tokens.
        both_differing: sum over entries of two differing tokens.
        one_of_each: sum over the other entries.
        aligned: sum over entries of matched tokens alone, a part of `both_identical`.
        identical_tokens: identical tokens, as many in chosen as in rejected.
        differing_tokens: differing tokens of chosen and rejected together.
    """

    both_identical: float
    both_differing: float
    one_of_each: float
    aligned: float
    identical_tokens: int
    differing_tokens: int

    @property
    def identical(self) -> float:
        """What identical tokens give to `⟨g_w, g_l⟩`: with `differing`, the whole of it."""
        return self.both_identical + self.one_of_each / 2

    @property
    def differing(self) -> float:
        """What differing tokens give to `⟨g_w, g_l⟩`."""
        return self.both_differing + self.one_of_each / 2


@dataclass(frozen=True, kw_only=True)
class TokenGram:
    """Inner products of one pair's token gradients. All tensors live on the CPU.

    Attributes:
        inner: `⟨∇log π(y_w^a), ∇log π(y_l^b)⟩`, float64 `[T_w, T_l]`; its sum is the pair's `inner`.
        chosen_sq: `‖∇log π(y_w^a)‖²`, float64 `[T_w]`.
        rejected_sq: `‖∇log π(y_l^b)‖²`, float64 `[T_l]`.
        chosen_ids: the chosen tokens, int64 `[T_w]`.
        rejected_ids: the rejected tokens, int64 `[T_l]`.
        modules: `{module name: inner of that module, [T_w, T_l]}`, summing to `inner`; None unless `by_module=True`.
    """

    inner: Tensor
    chosen_sq: Tensor
    rejected_sq: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    modules: Mapping[str, Tensor] | None = None

    @property
    def cosine(self) -> Tensor:
        """`inner` over the norms, float64 `[T_w, T_l]`; nan where a token has no gradient."""
        return self.inner / (self.chosen_sq[:, None] * self.rejected_sq[None]).sqrt()

    @property
    def alignment(self) -> list[tuple[int, int]]:
        """`(a, b)` of the tokens that both responses share; see `match_tokens`."""
        return match_tokens(self.chosen_ids.tolist(), self.rejected_ids.tolist())

    @property
    def chosen_entanglement(self) -> Tensor:
        """`⟨∇log π(y_w^a), g_l⟩`, float64 `[T_w]`: how far raising rejected raises each chosen token, to first order.

        Positive tokens entangle (lowering rejected lowers them), negative ones disentangle. Sums to the pair's `inner`.
        """
        return self.inner.sum(1)

    @property
    def rejected_entanglement(self) -> Tensor:
        """`⟨∇log π(y_l^b), g_w⟩`, float64 `[T_l]`: how far raising chosen raises each rejected token."""
        return self.inner.sum(0)

    def split(self) -> TokenSplit:
        """How much of `⟨g_w, g_l⟩` comes from tokens that the responses share, and how much from those that differ.

        Returns:
            The split, by the alignment of the two responses (the paper's Section 4.3: identical tokens entangle,
            contrasting ones prevent it).
        """
        matched = self.alignment
        rows, columns = (torch.zeros(size, dtype=torch.float64) for size in self.inner.shape)
        for a, b in matched:
            rows[a], columns[b] = 1.0, 1.0
        both_identical = float(rows @ self.inner @ columns)
        both_differing = float((1 - rows) @ self.inner @ (1 - columns))
        return TokenSplit(
            both_identical=both_identical,
            both_differing=both_differing,
            one_of_each=float(self.inner.sum()) - both_identical - both_differing,
            aligned=sum(float(self.inner[a, b]) for a, b in matched),
            identical_tokens=len(matched),
            differing_tokens=len(self.chosen_ids) + len(self.rejected_ids) - 2 * len(matched),
        )

    def plot(
        self,
        chosen_tokens: Sequence[str] | None = None,
        rejected_tokens: Sequence[str] | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw the cosines as a heat map, with each token's entanglement beside it. Needs matplotlib.

        Args:
            chosen_tokens: the chosen tokens' texts, T_w of them; without them their ids are shown.
            rejected_tokens: the rejected tokens' texts, T_l of them.
            path: a .png file to write as well.
            title: above the picture.

        Returns:
            A matplotlib `Figure` that pyplot knows nothing of: its backend and its open figures stay as they are.

        Raises:
            InputError: texts that are not one a token, a path that does not end in .png or cannot be written, or
                matplotlib is not installed.

        Example:
            >>> gram.plot([tokenizer.decode(token) for token in gram.chosen_ids], path="tokens.png")  # doctest: +SKIP
        """
        from gradent.figures.charts import token_cosines  # noqa: PLC0415
        from gradent.figures.token_heatmap import TokenPicture, draw_tokens, write_figure  # noqa: PLC0415

        chosen = list(map(str, self.chosen_ids.tolist())) if chosen_tokens is None else chosen_tokens
        rejected = list(map(str, self.rejected_ids.tolist())) if rejected_tokens is None else rejected_tokens
        picture = TokenPicture(
            heat=token_cosines(chosen, rejected, self.cosine.tolist(), self.alignment, title or ""),
            chosen_entanglement=self.chosen_entanglement.numpy(),
            rejected_entanglement=self.rejected_entanglement.numpy(),
        )
        figure = draw_tokens(picture)
        if path is not None:
            write_figure(figure, path)
        return figure
