"""How `mlpint train` refuses bad input."""

from mlpint import cli


def fails(tmp_path, capsys, *arguments):
    """The one line of a run that ends before its first step and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", *map(str, arguments), f"--out={tmp_path}/never"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mlpint: error: ") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err
