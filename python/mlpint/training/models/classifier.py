"""A BERT that names the class of a text, for fine-tuning (Devlin et al., 2019)."""

from __future__ import annotations

import torch
from torch import nn

from .bert import BERTEncoder
from .blocks import normal_
from .shape import Shape


class TextClassifier(BERTEncoder):
    """Logits of the classes of texts, [batch, sequence] int64 -> [batch, classes].

    The head is a linear map of the mean state of a text's tokens: this BERT is not pre-trained on a token that stands
    for the whole text, as the original is. All parameters but the head's have the names that they have in ``BERT``.

    Args:
        classes: number of classes.
        vocabulary, sequence, shape: as in :class:`BERTEncoder`.
    """

    def __init__(self, classes: int, vocabulary: int, sequence: int, shape: Shape) -> None:
        super().__init__(vocabulary, sequence, shape)
        self.classes = nn.Linear(shape.dim, classes)
        normal_(self.tokens, self.classes)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``lengths``: [batch] int64, at least 1; what stands behind them is padding and counts nothing."""
        return self.logits(self.states(tokens, lengths))

    def states(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """What the logits are made of, [batch, dim]."""
        states = self.encode(tokens, lengths)
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
        mean = states.masked_fill(padding.unsqueeze(-1), 0).sum(1) / lengths.unsqueeze(1)
        return self.dropout(mean)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of any number of states, [..., dim] -> [..., classes]."""
        return self.classes(states)
