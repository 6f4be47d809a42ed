"""Odd models: layers that torch fuses, wraps or differentiates in its own way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.odd_skeleton import HEADS, VOCAB, WIDTH, Skeleton, normal, odd, past_mean
from tests.odd_weights import CalledTwice


@odd("causal Conv1d")
class Convolution(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel_size=3)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, kernel_size=4, groups=WIDTH, padding=3)

    def block(self, x: Tensor) -> Tensor:
        mixed = self.conv(F.pad(x.transpose(1, 2), (2, 0)))
        return F.silu(self.depthwise(mixed)[..., : x.shape[1]]).transpose(1, 2)


@odd("long convolution by FFT")
class FourierConvolution(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = normal(WIDTH, 16)

    def block(self, x: Tensor) -> Tensor:
        size = 2 * x.shape[1]
        spectrum = torch.fft.rfft(x.transpose(1, 2), n=size) * torch.fft.rfft(self.kernel[:, : x.shape[1]], n=size)
        return torch.fft.irfft(spectrum, n=size)[..., : x.shape[1]].transpose(1, 2)


@odd("weight-normed linear")
class WeightNormed(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.rotation = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH, bias=False), orthogonal_map="cayley")

    def block(self, x: Tensor) -> Tensor:
        return self.rotation(self.normed(x).relu())


@odd("pruned linear")
class Pruned(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.pruned = prune.random_unstructured(nn.Linear(WIDTH, WIDTH), "weight", amount=0.4)

    def block(self, x: Tensor) -> Tensor:
        return self.pruned(x)


class _OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


class _NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


@odd("custom autograd function")
class CustomFunction(Skeleton):
    function: type[torch.autograd.Function] = _OldStyle

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight)


@odd("custom autograd function for functorch")
class CustomFunctorch(CustomFunction):
    function = _NewStyle


@odd("padding_idx in the text")
class PaddingInText(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.last = nn.Embedding(VOCAB, WIDTH, padding_idx=-1)

    def block(self, x: Tensor) -> Tensor:
        return x.tanh()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.last((input_ids + 5) % VOCAB)
        return self.head(x + self.block(past_mean(x)))


@odd("embedding scaled by frequency")
class ScaledByFrequency(PaddingInText):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, scale_grad_by_freq=True)


@odd("sparse embedding")
class SparseEmbedding(PaddingInText):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, sparse=True)


@odd("nn.MultiheadAttention")
class FusedAttention(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=False)

    def block(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@odd("nn.TransformerEncoder, time first")
class EncoderTimeFirst(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def block(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
        return self.encoder(x.transpose(0, 1), mask=mask, is_causal=True).transpose(0, 1)


@odd("nn.GRU")
class Gru(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def block(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@odd("nn.LSTM, projected")
class Lstm(Gru):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 24, proj_size=WIDTH, batch_first=True)


@odd("nn.LSTMCell in a loop")
class Cell(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)


@odd("bilinear gate")
class BilinearGate(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.slope = nn.PReLU(WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.slope(self.gate(x, past_mean(x)).transpose(1, 2)).transpose(1, 2)


@odd("batch norm in eval mode")
class Normed(Skeleton):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.groups = nn.BatchNorm1d(WIDTH), nn.GroupNorm(2, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return self.groups(self.norm(x.transpose(1, 2)).transpose(1, 2).flatten(0, 1)).view_as(x)


@odd("checkpointed block")
class Checkpointed(CalledTwice):
    def block(self, x: Tensor) -> Tensor:
        return checkpoint(super().block, x, use_reentrant=False)
