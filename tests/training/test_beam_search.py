"""Beam search against all sequences there are, and against what a greedy choice gives."""

import itertools

import pytest
import torch

from mlpint.training.beam_search import beam_search

START, END, VOCABULARY = 0, 1, 4


class Table:
    """Log-probabilities that depend on the whole of a sequence, at random but the same each time."""

    def __init__(self, count):
        self.sequences = [(n,) for n in range(count)]  # the number of the source, then the tokens

    def expand(self, count):
        self.sequences = [s for s in self.sequences for _ in range(count)]

    def logits(self, tokens):
        self.sequences = [(*s, t) for s, t in zip(self.sequences, tokens.tolist(), strict=True)]
        return torch.stack([self.row(s) for s in self.sequences])

    def select(self, rows):
        self.sequences = [self.sequences[r] for r in rows.tolist()]

    @staticmethod
    def row(sequence):
        seed = sum((t + 1) * 7**i for i, t in enumerate(sequence))
        return 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def score(source, tokens, alpha, never=()):
    """Of a sequence with its end token, if it has one."""
    total = 0.0
    for i, token in enumerate(tokens):
        steps = Table.row((source, START, *tokens[:i])).log_softmax(-1)
        if token in never:
            return -torch.inf
        total += float(steps[token])
    return total / len(tokens) ** alpha


def all_sequences(limit):
    """Every one that ends, or is cut off at the limit."""
    going_on = [t for t in range(VOCABULARY) if t != END]
    for length in range(limit):
        for start in itertools.product(going_on, repeat=length):
            yield (*start, END)
    yield from itertools.product(going_on, repeat=limit)


def search(count, **options):
    options = {"start": START, "end": END, "beams": 1} | options
    return beam_search(Table(count), options.pop("limits", [4] * count), **options)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("never", [(), (START, 2)])
def test_enough_beams_find_the_best_sequence_of_all(alpha, never):
    found = search(5, beams=300, alpha=alpha, never=never)
    for source, tokens in enumerate(found):
        best = max(all_sequences(4), key=lambda s: score(source, s, alpha, never))
        assert tokens == [t for t in best if t != END]
    assert len({len(tokens) for tokens in found}) > 1  # some end, some are cut off


def test_one_beam_is_greedy():
    for source, tokens in enumerate(search(20)):
        expected = ()
        while len(expected) < 4 and END not in expected:
            expected += (int(Table.row((source, START, *expected)).argmax()),)
        assert tokens == [t for t in expected if t != END]


def test_more_beams_find_better_sequences():
    scores = []
    for beams in (1, 2, 4):
        ended = [(*s, END) if len(s) < 4 else tuple(s) for s in search(100, beams=beams, alpha=0.0)]
        scores.append(sum(score(n, s, 0.0) for n, s in enumerate(ended)))
    assert scores[0] < scores[1] < scores[2]


def test_sources_do_not_meddle():
    together = search(6, beams=3)
    alone = []
    for n in range(6):
        table = Table(1)
        table.sequences = [(n,)]
        alone += beam_search(table, [4], beams=3, start=START, end=END)
    assert together == alone


def test_limits_are_each_sources_own():
    mixed = search(12, beams=3, limits=[2, 4, 6] * 4)
    for i, limit in enumerate((2, 4, 6)):
        assert mixed[i::3] == search(12, beams=3, limits=[limit] * 12)[i::3]
    assert [len(s) for s in search(3, limits=[2, 4, 6], never=[END])] == [2, 4, 6]
