"""What every test stands on: no network, one thread per test process, and models small enough to build per test."""

from __future__ import annotations

import gc
import os
import platform
import sys
from pathlib import Path

# Before anything imports transformers or wandb: both read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# `pytest -m cuda` is for a GPU. Anything else runs as on a machine without one, kernels in Triton's interpreter: torch
# and triton read these once. A session's other processes inherit them.
if "-m cuda" not in " ".join(sys.argv) and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import tokenizers
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.budgets import tell
from tests.shared import remember_session

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Examples are the same in every run; HYPOTHESIS_PROFILE=searching draws others, and more of them.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None, max_examples=40)
hypothesis.settings.register_profile("searching", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

SPECIALS = ("<pad>", "<bos>", "<eos>")


def pytest_report_header() -> str:
    """What the results were obtained on."""
    return (
        f"python {platform.python_version()}, torch {torch.__version__} ({torch.get_num_threads()} threads), "
        f"transformers {transformers.__version__}"
    )


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: trainers and audits collect often, at half a second each."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """So that the interpreter takes everything down in order."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Files that took longer than they should."""
    tell(terminalreporter)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device, or not asked for one: pytest -m cuda"))


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What `tests.shared` keeps is this session's."""
    remember_session(tmp_path_factory)


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (259 with pad, BOS and EOS), BOS in front, and a chat template."""
    return make_tokenizer()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """What `tiny_tokenizer` is, for fixtures that several tests share."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=128
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture
def tiny_gpt2() -> GPT2LMHeadModel:
    """GPT-2 in float64 throughout, 2 layers of width 16, tied embeddings, for `tiny_tokenizer`'s ids; in eval mode."""
    config = GPT2Config(vocab_size=259, n_positions=128, n_embd=16, n_layer=2, n_head=2, **_special_ids())
    return _build(GPT2LMHeadModel, config).double()


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Llama in float32, 2 layers of width 16, grouped-query attention, for `tiny_tokenizer`'s ids; in eval mode."""
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **_special_ids(),
    )
    return _build(LlamaForCausalLM, config)


@pytest.fixture
def local_model(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Directory of `tiny_llama` and `tiny_tokenizer`, as `from_pretrained` reads it: `tmp_path / "my-model"`."""
    path = tmp_path / "my-model"
    tiny_llama.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def _special_ids() -> dict[str, int]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _build(kind: type[torch.nn.Module], config: transformers.PretrainedConfig) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()
