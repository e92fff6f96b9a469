"""Beam search: the likeliest of the sequences that a model may go on with, nearly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch


class Decoder(Protocol):
    """A model that is told one token of each sequence after the other."""

    def expand(self, count: int) -> None:
        """Goes on with ``count`` copies of each sequence, next to each other."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes the next token of each sequence, [N], and says what may follow it, [N, vocabulary]."""

    def select(self, rows: torch.Tensor) -> None:
        """Goes on with other sequences: row i is what row ``rows[i]`` was."""


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    limits: Sequence[int],
    *,
    beams: int,
    start: int,
    end: int,
    never: Collection[int] = (),
    alpha: float = 1.0,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """The best sequence found for each source, without start and end token.

    A sequence that has ended keeps its place among the beams until ``beams`` better ones push it out; the search ends
    when all have. At the end the one with the largest log-probability / length^alpha counts (Wu et al., 2016, in its
    simple form). ``beams = 1`` is greedy.

    Args:
        decoder: before its first token, with one sequence for each source.
        limits: most tokens of a sequence by source, its end token included; a longer one is cut off.
        beams: sequences kept for each source.
        start, end: tokens.
        never: tokens that are not to be produced.
        alpha: weight of the length; 0 prefers short sequences.
    """
    count, most = len(limits), torch.tensor(limits, device=device).unsqueeze(1)
    decoder.expand(beams)
    first_row = torch.arange(count, device=device).unsqueeze(1) * beams
    scores = torch.full((count, beams), -torch.inf, device=device)
    scores[:, 0] = 0  # all copies are alike at first: one of them counts
    ended = torch.zeros(count, beams, dtype=torch.bool, device=device)
    lengths = torch.zeros(count, beams, device=device)
    sequences = torch.zeros(count, beams, 0, dtype=torch.int64, device=device)
    tokens = torch.full((count * beams,), start, device=device)
    for _ in range(max(limits)):
        steps = decoder.logits(tokens).float().log_softmax(-1).view(count, beams, -1)
        vocabulary = steps.shape[-1]
        steps[..., list(never)] = -torch.inf
        steps[ended] = -torch.inf
        steps[..., end][ended] = 0  # goes on with end tokens, at no cost
        scores, best = (scores.unsqueeze(-1) + steps).flatten(1).topk(beams)
        beam, token = best // vocabulary, best % vocabulary
        lengths = lengths.gather(1, beam) + ~ended.gather(1, beam)
        ended = ended.gather(1, beam) | (token == end) | (lengths >= most)
        before = sequences.gather(1, beam.unsqueeze(-1).expand(sequences.shape))
        sequences = torch.cat([before, token.unsqueeze(-1)], -1)
        if ended.all():
            break
        decoder.select((first_row + beam).flatten())
        tokens = token.flatten()
    chosen = (scores / lengths**alpha).argmax(1)
    best_of = sequences[torch.arange(count, device=device), chosen].tolist()
    return [sequence[: sequence.index(end)] if end in sequence else sequence for sequence in best_of]
