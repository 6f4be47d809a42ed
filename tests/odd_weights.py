"""Odd models: parameters used raw, shared, borrowed, copied, tied, or multiplied loosely."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.odd_skeleton import HEADS, VOCAB, WIDTH, Skeleton, normal, odd, past_mean


@odd("shared layer called twice")
class CalledTwice(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.norm(self.shared(past_mean(self.norm(self.shared(x)).tanh())))


@odd("one parameter under two names")
class TwoNames(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sigmoid())


@odd("autoencoder tied by transposition")
class TiedTranspose(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.code = normal(WIDTH, 6)

    def block(self, x: Tensor) -> Tensor:
        return (x @ self.code).relu() @ self.code.T


@odd("embedding and head in one parameter")
class OneTable(Skeleton):
    """Both are parts of a `[2, V, width]` tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = normal(2, VOCAB, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = past_mean(F.embedding(input_ids, self.tables[0]))
        return F.linear(x + self.head.bias[:WIDTH].tanh(), self.tables[1])


@odd("raw x @ weight.T")
class RawMatmul(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = normal(WIDTH, WIDTH), normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        inner = torch.matmul(x @ self.weight.T, self.other.transpose(0, 1).contiguous()).tanh()
        return torch.addmm(self.weight[0], inner.flatten(0, 1), self.other).view_as(x)


@odd("weight on the left")
class LeftMatmul(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return (self.weight @ x.transpose(1, 2)).transpose(1, 2)


@odd("F.linear with another module's weight")
class BorrowedWeight(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.never_called = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = past_mean(F.embedding(input_ids, self.head.weight))
        x = x + F.linear(x, self.never_called.weight, self.never_called.bias).relu()
        return F.linear(x, self.head.weight)


@odd("embedding by indexing")
class Indexing(Skeleton):
    def forward(self, input_ids: Tensor) -> Tensor:
        x = past_mean(self.embed.weight[input_ids])
        return x @ self.embed.weight[:VOCAB].mT + self.head.bias


@odd("embedding by one-hot product")
class OneHot(Skeleton):
    def forward(self, input_ids: Tensor) -> Tensor:
        weight = self.embed.weight
        return self.head(past_mean(F.one_hot(input_ids, VOCAB).to(weight.dtype) @ weight))


@odd("loose parameters")
class Loose(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gate, self.shift = normal(WIDTH), nn.Parameter(torch.tensor(0.3)), normal(1, 1, WIDTH)
        self.decay = normal(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        x = self.scale * x + self.gate * past_mean(x) - self.shift
        return x * torch.exp(-self.decay.exp()) / (1 + self.scale.square()).sqrt()


@odd("mixing weights through a softmax")
class SoftmaxWeights(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.mix = normal(3)
        self.layers = nn.ParameterList([normal(WIDTH, WIDTH) for _ in range(3)])

    def block(self, x: Tensor) -> Tensor:
        return sum(share * F.linear(x, layer) for share, layer in zip(self.mix.softmax(0), self.layers, strict=True))


@odd("a copy of the weight, changed in place")
class ChangedCopy(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other, self.bias = normal(WIDTH, WIDTH), normal(WIDTH, WIDTH), normal(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        centred = self.weight.clone()
        centred -= centred.mean(1, keepdim=True)
        masked = self.other.t().contiguous()
        masked[:, ::2] = 0.0
        return F.linear(x, centred, self.bias.clone().mul_(0.5)) @ masked


@odd("straight-through rounding")
class StraightThrough(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        rounded = (self.weight * 4).round() / 4
        return F.linear(x, self.weight + (rounded - self.weight).detach())


@odd("in-place activation after a linear")
class InPlaceActivation(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH, bias=False)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def block(self, x: Tensor) -> Tensor:
        return self.act(self.down(self.act(self.up(x))))


@odd("in-place sums on layer outputs")
class InPlaceSums(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.types = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Embedding(2, WIDTH)
        self.bias = normal(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x *= 2.0
        x += self.types((input_ids > 40).long())
        y = self.inner(past_mean(x))
        y += x
        y += self.bias
        y[:, 1:] += x[:, :-1]
        return self.head(self.norm(y).mul_(1.5))


@odd("in-place activation on flat tokens")
class InPlaceFlat(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        return self.down(F.relu_(self.up(flat))).view_as(x)


@odd("own norm on a functional")
class OwnNorm(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.bias = normal(HEADS, WIDTH // HEADS), normal(HEADS, WIDTH // HEADS)

    def block(self, x: Tensor) -> Tensor:
        heads = F.layer_norm(x.unflatten(-1, (HEADS, -1)), (WIDTH // HEADS,)) * (1 + self.gain) + self.bias
        return F.rms_norm(heads.flatten(2), (WIDTH,), self.gain.view(-1))


@odd("weights joined and cut")
class Joined(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.both = normal(WIDTH, WIDTH), normal(WIDTH, WIDTH), normal(2 * WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        joined = F.linear(x, torch.cat([self.query, self.key])).tanh()
        first, second = self.both.chunk(2)
        return joined[..., :WIDTH] @ first + F.linear(joined[..., WIDTH:], second) @ (self.query @ self.key)


@odd("low rank beside a frozen weight")
class LowRank(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(WIDTH, WIDTH), normal(4, WIDTH), normal(WIDTH, 4)
        self.base.requires_grad_(False)
        self.embed.requires_grad_(False)

    def block(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(x, self.b @ self.a) + (x @ self.a.T) @ self.b.T


@odd("only a bias in the middle trains")
class OnlyBias(CalledTwice):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.shared.bias.requires_grad_(True)


@odd("a part without gradient")
class PartlyDetached(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.cut, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(3, 3)
        self.live = nn.Linear(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            quiet = self.cut(x)
        return quiet + self.live(x) * self.live(x).detach()


@odd("logits in a tuple")
class TupleOutput(CalledTwice):
    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids), None


@odd("parameters on the head's own axis")
class LooseHead(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.prior = nn.Parameter(torch.tensor([1.3])), normal(VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        return logits / self.temperature + F.log_softmax(self.prior, -1)

    def block(self, x: Tensor) -> Tensor:
        return x.sigmoid()
