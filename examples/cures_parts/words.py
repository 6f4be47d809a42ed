"""The words of the page that hold whatever the figures are."""

__all__ = ["HEAD", "METHOD"]

HEAD = """# The cures, measured

Does a likelihood term (fixed, or as large as the account of each step asks for), SimPO's length normalization or one of
the two designs of the paper's Section 5 keep chosen from falling where DPO lets it fall, and what does it cost? Written
by `python examples/cures.py`: no number on this page was typed in, and all of them are in
[data/cures.csv](data/cures.csv).
"""

METHOD = """## What was done

One model is fine-tuned (SFT) as in `gradent demo`. From there every method trains on the same pairs in the same order,
in float32, at a constant rate, without clipping and weight decay. Chosen names a statement's sentiment in one of the
demo's four styles, rejected the other one; they differ in one token. No EOS is trained on. *Generated* statements are
the demo's; *tweets* come from a file (`--tweets FILE`), which is no part of the repository: the positive and negative
rows of the Kaggle competition tweet-sentiment-extraction, of which the paper's experiment takes a copy from the hub:

```python
from datasets import load_dataset

rows = load_dataset("mteb/tweet_sentiment_extraction", split="train")
rows = rows.filter(lambda row: row["label_text"] in ("positive", "negative")).select_columns(["text", "label_text"])
rows.rename_column("label_text", "label").to_json("tweets.jsonl")
```

- **DPO**: TRL's `DPOTrainer`, β = 0.1. **RPO**: the same with `loss_type=["sigmoid", "sft"]` and
  `loss_weights=[1, 1]`; **RPO 0.1** with weights 1 and 0.1. **adaptive**: `AdaptiveNLLDPOTrainer`, DPO with that term
  as large as the last steps ask for, from 0 to 1. **CPO**: TRL's `CPOTrainer`, β = 0.1, λ = 1; TRL's likelihood term is
  a mean over chosen's tokens, so that λ of the paper's Table 2, which is of the sum, is 1/|y_w|. **SimPO**: the same
  trainer with `loss_type="simpo"`, β = 0.1, γ = 0.5, no likelihood term. **calibrated**: Reward Calibration (Wu et al.
  2026) of DPO: `d_w` times and `d_l` divided by one α a step, at which their ratio is `‖g_l‖/‖g_w‖` as it is on average
  over the batch, smoothed over steps (0.98), norms over all parameters; **calibrated head**: over the head alone, as
  published. **pairwise**: `PairwiseNormalizedDPOTrainer`
  (Section 5.1), **masked**: `TokenMaskedDPOTrainer` (Section 5.2), both on DPO's loss with β = 0.1.
- **Learning rates.** One rate for all would compare scales of losses. DPO's rate is given; every other method gets, in
  each style, the rate of a grid (DPO's rate times powers of 2) at which its held-out margin
  `log π(chosen) - log π(rejected)` gains nearest to what DPO's gains in as many steps. So the methods are compared near
  one separation; where one of them is not, its part says so. This is chosen on a seed that is not reported, and so are
  the masks.
- **Masks.** η and the head's rate are those of a small grid with the largest change of chosen's log-prob for each nat
  of the margin's gain, among settings that gain at least half of DPO's, in the long suffix, at DPO's rate. The
  threshold is not tuned: all masks start at one value, which puts the scores that far above it wherever it lies.
- **Measured** with `gradent.measure` on held-out statements. *Right label*: share of statements whose right label is
  the most probable of all tokens where the label stands, after the prompt and chosen's words. *Preferred*: share with
  `log π(chosen) > log π(rejected)`. *Label token*: log-prob of the right label there. *Answers*: log-prob of held-out
  answers with the right label, worded as SFT's in all styles: what it loses, the run has forgotten.
"""
