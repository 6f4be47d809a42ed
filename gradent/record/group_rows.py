"""One row for each token and positive rollout, from the record of a group: what tables print and pages colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradent.record.documents import GroupTokenRecord
from gradent.record.token_rows import name_token, rank_ends

__all__ = ["GroupTokenRow", "list_group_tokens", "rank_group_tokens"]


@dataclass(frozen=True, kw_only=True)
class GroupTokenRow:
    """What one token does to one positive rollout."""

    positive: int  # the rollout that is moved
    rollout: int  # the rollout that the token is in
    position: int  # in it, counted from 0
    text: str
    influence: float  # nats for each unit of the learning rate; below 0 it pulls the positive down
    nthr: float | None  # NTHR's score; None where the token's rollout is not lowered, or the model hides its head

    @property
    def name(self) -> str:
        """Position and text."""
        return name_token(self.position, self.text)


def list_group_tokens(record: GroupTokenRecord) -> list[GroupTokenRow]:
    """All tokens of all other rollouts, positive by positive."""
    rows = []
    for part in record["influence"]:
        texts, values = record["rollouts"][part["rollout"]]["tokens"], part["values"]
        scores = part["nthr"] if part["nthr"] is not None else [None] * len(texts)
        rows += [
            GroupTokenRow(
                positive=part["positive"], rollout=part["rollout"], position=position, text=text, influence=value,
                nthr=score,
            )
            for position, (text, value, score) in enumerate(zip(texts, values, scores, strict=True))
        ]  # fmt: skip
    return rows


def rank_group_tokens(
    record: GroupTokenRecord, rows: Sequence[GroupTokenRow], count: int
) -> tuple[list[GroupTokenRow], list[GroupTokenRow]]:
    """The negatives' tokens that pull each positive down most, and those that push it up: `count` for each positive."""
    pulls: list[GroupTokenRow] = []
    pushes: list[GroupTokenRow] = []
    for positive in dict.fromkeys(row.positive for row in rows):
        own = [row for row in rows if row.positive == positive and record["rollouts"][row.rollout]["weight"] < 0]
        up, down = rank_ends(own, lambda row: row.influence, count)
        pulls, pushes = pulls + down, pushes + up
    return pulls, pushes
