"""Checkpoints: whole or absent, damage told by file, the same state back in any model, wrapped or not."""

import copy
import errno
import shutil

import pytest
import torch
from torch import nn

from mlpint import MGRIT, LayerParallel, checkpoint
from mlpint.errors import CheckpointError, UserError
from mlpint.training.models import GPT, Shape


def make_model(seed, layers=4):
    torch.manual_seed(seed)
    return GPT(vocabulary=32, sequence=8, shape=Shape(layers, dim=16, heads=2))


def make_optimizer(model, kind):
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def steps(model, optimizer, seeds):
    for seed in seeds:
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()


def assert_same(model, other):
    expected = dict(other.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints of steps 1 and 2."""
    model = make_model(0)
    optimizer = make_optimizer(model, "adamw")
    for step in (1, 2):
        steps(model, optimizer, [step])
        checkpoint.save(tmp_path / "c", step, model, optimizer, info={"position": 10 * step, "lr": 1e-3})
    return tmp_path / "c"


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_going_on_is_as_if_never_stopped(kind, tmp_path):
    model = make_model(0)
    optimizer = make_optimizer(model, kind)
    steps(model, optimizer, [1, 2])
    checkpoint.save(tmp_path, 2, model, optimizer)
    steps(model, optimizer, [3, 4])

    again = make_model(1)
    optimizer = make_optimizer(again, kind)
    steps(again, optimizer, [9])  # other weights and another state, all to be replaced
    checkpoint.load(tmp_path, again, optimizer)
    steps(again, optimizer, [3, 4])
    assert_same(again, model)


def test_wrapped_and_unwrapped_models_share_checkpoints(tmp_path):
    plain, wrapped = make_model(0), make_model(1)
    wrapped.blocks = LayerParallel(wrapped.blocks, MGRIT(cfactor=2))
    checkpoint.save(tmp_path, 1, plain)
    checkpoint.load(tmp_path, wrapped)
    assert_same(wrapped, plain)
    steps(wrapped, make_optimizer(wrapped, "sgd"), [1])
    checkpoint.save(tmp_path, 2, wrapped)
    checkpoint.load(tmp_path, plain)
    assert_same(wrapped, plain)


def test_a_view_of_stacked_storage_is_saved_alone(tmp_path):
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(1000, 4, 4)[500])
    path = checkpoint.save(tmp_path, 1, model)
    assert (path / "rank-00000.safetensors").stat().st_size < 1000
    again = nn.Linear(4, 4, bias=False)
    checkpoint.load(path, again)
    assert torch.equal(again.weight, model.weight)


def test_what_is_opened(saved):
    for path in (saved, saved / "step-00000002"):
        found = checkpoint.open_checkpoint(path)
        assert (found.path, found.step) == (saved / "step-00000002", 2)
        assert found.info == {"position": 20, "lr": 1e-3}
    saved.rename(saved.parent / "checkpoints")  # as in a run directory
    assert checkpoint.open_checkpoint(saved.parent).step == 2
    assert checkpoint.open_checkpoint(saved.parent / "checkpoints" / "step-00000001").step == 1


FILES = ["rank-00000.safetensors", "manifest.json"]


def refuses(path, name):
    """Loading fails, names the file, and leaves model and optimiser as they were."""
    model = make_model(1)
    optimizer = make_optimizer(model, "adamw")
    steps(model, optimizer, [1])
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path, model, optimizer)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert_same(model, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_wherever_it_is(name, saved):
    path = saved / "step-00000002" / name
    intact = path.read_bytes()
    # Any byte: header, first and last tensor, the very end.
    for n, place in enumerate([0, 9, *range(40, len(intact), len(intact) // 10), len(intact) - 1]):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << n % 8
        path.write_bytes(damaged)
        refuses(saved, name)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_found(name, saved):
    path = saved / "step-00000002" / name
    intact = path.read_bytes()
    for length in (0, 1, len(intact) // 2, len(intact) - 2):
        path.write_bytes(intact[:length])
        refuses(saved, name)
    path.write_bytes(intact + b" " * 8)
    if name != "manifest.json":  # whose content is what counts
        refuses(saved, name)
    path.unlink()
    refuses(saved, name)


def test_a_damaged_pointer_is_found(saved):
    for text in ("", "step-0000000\x32\x01", "../../etc", "step-00000009"):
        (saved / "latest").write_text(text)
        refuses(saved, "latest" if text != "step-00000009" else "step-00000009")


def test_another_shape_or_depth_is_found(saved):
    with pytest.raises(CheckpointError, match=r"model\.tokens\.weight is \[32, 16\] in the checkpoint, \[64, 16\]"):
        checkpoint.load(saved, GPT(64, 8, Shape(4, 16, 2)))
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.blocks\.4\."):
        checkpoint.load(saved, make_model(0, layers=5))


def test_a_newer_format_is_refused(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(CheckpointError, match="has format 1"):
        checkpoint.open_checkpoint(saved)


def test_a_full_disk_leaves_the_checkpoint_before(saved, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model, before = make_model(0), sorted(saved.rglob("*"))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(saved, 3, model)
    assert sorted(saved.rglob("*")) == before
    assert checkpoint.open_checkpoint(saved).step == 2


@pytest.mark.parametrize("function", ["save_file", "_commit", "_write_text"])
def test_a_killed_save_leaves_the_checkpoint_before(function, saved, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    model = make_model(0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function, killed)
        with pytest.raises(Killed):
            checkpoint.save(saved, 3, model)
    assert checkpoint.load(saved, make_model(1)).step == 2
    checkpoint.save(saved, 3, model)  # what was left behind is in nobody's way
    assert checkpoint.load(saved, make_model(1)).step == 3
    assert not list(saved.glob(".*"))


def test_saving_a_step_again_replaces_it(saved):
    model = make_model(5)
    checkpoint.save(saved, 2, model)
    again = make_model(6)
    assert checkpoint.load(saved, again).step == 2
    assert_same(again, model)
    assert not list(saved.glob(".*"))


def test_older_checkpoints_are_deleted(saved):
    model = make_model(0)
    checkpoint.save(saved, 7, model)
    checkpoint.save(saved, 4, model, keep=2)  # a run that was resumed at step 2
    assert sorted(p.name for p in saved.iterdir()) == ["latest", *(f"step-0000000{n}" for n in (2, 4, 7))]
    checkpoint.save(saved, 5, model, keep=1)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", *(f"step-0000000{n}" for n in (5, 7))]
    assert checkpoint.open_checkpoint(saved).step == 5


def test_a_directory_without_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such run or checkpoint directory"):
        checkpoint.open_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        checkpoint.open_checkpoint(tmp_path)


def test_a_renamed_tensor_file_is_not_taken(saved):
    shutil.copy(saved / "step-00000001" / FILES[0], saved / "step-00000002" / FILES[0])
    refuses(saved, FILES[0])
