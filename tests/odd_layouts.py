"""Odd models: activations in which the rows of a batch, or positions, are not where one would look for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.odd_skeleton import HEADS, WIDTH, Skeleton, normal, odd, past_mean


@odd("scan with a learned start")
class Scan(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.decay, self.bonus = normal(1, WIDTH), normal(WIDTH), normal(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        state, keep, outputs = self.start.expand(x.shape[0], -1), self.decay.sigmoid(), []
        for step in x.unbind(1):
            state = keep * state + (1 - keep) * step
            outputs.append(state + self.bonus * step)
        return torch.stack(outputs, 1)


@odd("arange positions, one axis")
class ArangePositions(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.scales = nn.Embedding(32, WIDTH), nn.Embedding(32, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed(input_ids) + self.positions(at)
        x = x + past_mean(x) * self.scales(at)[None]
        return self.head(x.tanh())


@odd("sliced position table")
class SlicedPositions(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.map = normal(1, 32, WIDTH), nn.Linear(1, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
        return past_mean(x * self.map(at[:, None] / 8) + self.table[:, : x.shape[1]])


@odd("relative position bias")
class RelativeBias(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(8, HEADS)

    def block(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        distance = (at[:, None] - at[None]).clamp(0, 7)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT + self.bias(distance).permute(2, 0, 1)
        scores = scores.masked_fill(at[:, None] < at[None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@odd("einsum projections")
class Einsum(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.split, self.merge = normal(HEADS, WIDTH, 5), normal(HEADS, 5, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        heads = torch.einsum("ntd,hde->nhte", x, self.split).tanh()
        return torch.einsum("nhte,hed->ntd", heads, self.merge)


@odd("time first throughout")
class TimeFirst(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.bias = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), normal(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids.T)
        x = x + self.norm(self.inner(past_mean(x.transpose(0, 1)).transpose(0, 1))).relu() * self.bias
        return self.head(x).transpose(0, 1)


@odd("time first, flattened")
class TimeFirstFlat(TimeFirst):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat = (x + past_mean(x)).transpose(0, 1).flatten(0, 1)
        inner = self.norm(self.inner(flat)) + self.bias
        return self.head(x + inner.view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1))


@odd("positions in reverse order")
class Reversed(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x.flip(1)).tanh()).flip(1)


@odd("heads merged with the batch")
class HeadsInBatch(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH // HEADS, WIDTH // HEADS), normal(WIDTH // HEADS)

    def block(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1)
        heads = self.inner(heads).tanh() * self.scale
        return heads.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


@odd("heads in front of the batch")
class HeadsFirst(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(8, 8), normal(8)

    def block(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).permute(2, 0, 1, 3)
        return (self.inner(heads).tanh() * self.scale).permute(1, 2, 0, 3).flatten(2)


@odd("as many heads as tokens")
class HeadsLikeTokens(Skeleton):
    """Works on `[N, 6, 8]`, the pieces of each row's first token: an axis as long as a row, but not of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.inner, self.norm = nn.Linear(WIDTH, 48), nn.Linear(8, 8), nn.LayerNorm(8)
        self.scale, self.merge = normal(8), nn.Linear(48, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        pieces = self.wide(x[:, 0]).unflatten(-1, (6, 8))
        return x + self.merge((self.norm(self.inner(pieces)) * self.scale).flatten(1))[:, None]


@odd("experts in a loop")
class ExpertLoop(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, HEADS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(HEADS))

    def block(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(flat[token]).tanh() * weights[token, place, None])
        return out.view_as(x)


@odd("experts by token id")
class ExpertById(Skeleton):
    """The first pair of a batch may use one expert for all its tokens, while the next pairs' tokens are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        flat, low = (x + past_mean(x)).flatten(0, 1), (input_ids < 60).flatten()
        out = torch.zeros_like(flat)
        for expert, mine in ((self.low, low), (self.high, ~low)):
            if mine.any():
                out[mine] = self.norm(expert(flat[mine])).tanh()
        return self.head(x + out.view_as(x))


@odd("a layer for some tokens")
class SomeTokens(ExpertById):
    """Only tokens from 60 on pass the second expert; there may be none, or as many as there are rows."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.low(x + past_mean(x))
        special = input_ids >= 60
        if special.any():
            y = y.index_put((special,), self.high(y[special]) * self.norm.weight)
        return self.head(x + self.norm(y))


@odd("another path for long rows")
class LongRows(Skeleton):
    """Beyond 10 positions the same layers are applied time first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        if x.shape[1] <= 10:
            return self.norm(self.inner(x)).tanh()
        return self.norm(self.inner(x.transpose(0, 1))).tanh().transpose(0, 1)
