"""``mlpint plan`` says what is fastest, what to type, and what cannot be."""

import re

import pytest

from mlpint import cli

SMALL = "plan --layers 32 --ranks 2 --open-layers 0 --close-layers 0 --dim 16 --heads 2"


def rows_of(out):
    """Time and way of each row."""
    lines = out.split("way\n")[1].split("fastest")[0].splitlines()
    return [(float(line.split()[0]), re.split(r"  +", line.strip(), maxsplit=5)[-1]) for line in lines]


def test_the_fastest_comes_first_and_can_be_typed(capsys):
    assert cli.main([*SMALL.split(), "--batch", "1"]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert [t for t, _ in rows] == sorted(t for t, _ in rows)
    best = rows[0][1]
    assert best == "(1,1) cf 8 injection, consistency 1" and f"fastest: {best}" in out
    command = out.splitlines()[-1].strip()
    assert command.startswith("mpirun -n 2 mlpint train --dim 16 --heads 2") and "--consistency 1" in command
    arguments = command.split("mlpint train ")[1].split()
    import argparse

    from mlpint.cli.flags import add_flag, flag_values  # the command is one that the parser knows
    from mlpint.training.config import KEYS, TrainConfig

    parser = argparse.ArgumentParser()
    for key in KEYS.values():
        add_flag(parser, key)
    config = TrainConfig.of(flag_values(parser.parse_args(arguments)))
    assert config.solver.cfactor == 8 and config.data.batch == 1


def test_what_is_exact_and_faster_is_said(capsys):
    assert cli.main([*SMALL.split(), "--batch", "64"]) == 0
    assert "Layer-parallel training brings nothing here: data parallelism" in capsys.readouterr().out
    arguments = [*SMALL.split(), "--batch", "8", "--layer-ms", "10", "--hop-us", "5", "--bandwidth-GBps", "0.00001"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "ms" in out and "data parallelism" not in out  # gradients go slowly there


def test_a_setting_is_priced_as_it_is_given(capsys):
    assert cli.main([*SMALL.split(), "--forward-iters", "1", "--coarse", "injection", "--chain-slices", "2"]) == 0
    time, way = rows_of(capsys.readouterr().out)[0]
    assert way == "(1,1) cf 4 injection, 2 slices, consistency 1  <- as given" and 50 < time < 60
    assert cli.main([*SMALL.split(), "--cfactor", "4", "--memory-GB", "0.000001"]) == 0
    assert "as given" in capsys.readouterr().out


def test_measured(capsys):
    assert cli.main([*SMALL.split(), "--layers", "8", "--sequence", "8", "--measure", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "measured on 1 rank; messages as MPI's on one machine" in out and len(rows_of(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--layout cyclic --coarse injection", "coarse='sum'"),
        ("--ranks 3 --layout cyclic --coarse sum", "multiple of cfactor or divide it"),
        ("--ranks 100 --cfactor 4", "there are 8 intervals of cfactor = 4 layers: 92 would have nothing to do"),
        ("--data-parallel 3", "data_parallel = 3: must divide the 2 ranks"),
        ("--chain-slices 16", "chain_slices = 16: must be at most the 8 sequences of a batch"),
        ("--chain-slices 8 --data-parallel 2", "8 slices of the batch, which has 4 samples for each of 2 replicas"),
        ("--ranks 0", "ranks = 0: must be an integer of at least 1"),
        ("--layer-ms -1", "layer_ms = -1.0: must be a positive number"),
        ("--hop-us 3", "layer_ms: is needed beside"),
        ("--measure --layer-ms 3", "measure: measures what --layer-ms"),
    ],
)
def test_what_cannot_be(capsys, arguments, why):
    assert cli.main([*SMALL.split(), *arguments.split()]) == 2
    assert why in capsys.readouterr().err
