"""A tiny random model, a tokenizer and preference data, made on the spot: what the other examples run on by default."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the film soup book was felt truly quite a quiet joy loud bore warm cold dull bright good bad . !".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word.

    Returns:
        The tokenizer.
    """
    vocab = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model() -> LlamaForCausalLM:
    """A Llama of 4 layers and width 64.

    Returns:
        The model, with random weights.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def make_pairs(count: int = 64) -> Dataset:
    """Pairs whose responses end alike, so that their gradients overlap.

    Args:
        count: rows.

    Returns:
        A dataset with prompt, chosen and rejected.
    """
    things, ends = ("film", "soup", "book"), ("truly good .", "quite warm .", "a quiet joy !")
    rows = []
    for number in range(count):
        thing, end = things[number % 3], ends[number % 5 % 3]
        rows.append({"prompt": f"the {thing} was", "chosen": f" bright {end}", "rejected": f" dull {end}"})
    return Dataset.from_list(rows)
