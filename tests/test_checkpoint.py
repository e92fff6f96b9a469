"""Checkpoints: whole or absent, damage told by file, the same state back in any model, wrapped or not."""

import copy
import errno
import itertools
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import launch
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
    monkeypatch.setattr(checkpoint.manifest, "FORMAT", checkpoint.manifest.FORMAT + 1)
    with pytest.raises(CheckpointError, match="has format 1"):
        checkpoint.open_checkpoint(saved)


def test_a_full_disk_leaves_the_checkpoint_before(saved, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    model, before = make_model(0), sorted(saved.rglob("*"))
    monkeypatch.setattr(checkpoint.state, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(saved, 3, model)
    assert sorted(saved.rglob("*")) == before
    assert checkpoint.open_checkpoint(saved).step == 2


def test_saving_a_step_again_replaces_it(saved):
    model = make_model(5)
    checkpoint.save(saved, 2, model)
    again = make_model(6)
    assert checkpoint.load(saved, again).step == 2
    assert_same(again, model)
    assert sorted(p.name for p in saved.iterdir()) == ["latest", "step-00000001", "step-00000002.2"]
    assert checkpoint.open_checkpoint(saved / "step-00000002").path == saved / "step-00000002.2"
    checkpoint.save(saved, 3, model)
    checkpoint.save(saved, 2, make_model(6))
    assert checkpoint.load(saved, model).path == saved / "step-00000002"
    assert_same(model, make_model(6))


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


class Killed(BaseException):
    pass


class Mortal:
    """Counts the operations on files, and dies as by kill -9 at a given one: from then on none is carried out.

    What writes a file is killed half-way. No file is synced in earnest, for speed.
    """

    def __init__(self, monkeypatch, dies_at=-1):
        self.operations, self.dies_at = 0, dies_at
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "open", "scandir", "listdir"):
            monkeypatch.setattr(os, name, self.mortal(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.mortal(lambda descriptor: None))
        monkeypatch.setattr(Path, "write_text", self.mortal(Path.write_text, lambda path, *_, **__: path))
        monkeypatch.setattr(
            checkpoint.state, "save_file", self.mortal(checkpoint.state.save_file, lambda _, path: path)
        )

    def mortal(self, function, written=None):
        def call(*args, **options):
            self.operations += 1
            dead, alive = self.operations > self.dies_at >= 0, self.operations < self.dies_at or self.dies_at < 0
            if written and not dead:
                function(*args, **options)
                if not alive:
                    path = written(*args, **options)
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            if not alive:
                raise Killed
            return None if written else function(*args, **options)

        return call


def save_number(directory, step, number, keep=0):
    """A small checkpoint, which shows by its weights which one it is."""
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, number)
    return checkpoint.save(directory, step, model, info={"number": number}, keep=keep)


def saved_number(path):
    """The number of a checkpoint, all of which has been verified."""
    found, model = checkpoint.open_checkpoint(path), nn.Linear(2, 2)
    checkpoint.load(found, model)
    assert torch.equal(model.weight, torch.full((2, 2), float(found.info["number"])))
    return found.info["number"]


def killed_save(directory, dies_at, step, number, keep):
    """Whether the save was killed there, or came to its end before."""
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch, dies_at)
        try:
            save_number(directory, step, number, keep)
        except Killed:
            return True
        return mortal.operations >= dies_at


def check_whole(directory, numbers):
    """Whatever has the name of a checkpoint can be loaded, and latest names one of those numbers."""
    for path in directory.glob("step-*"):
        saved_number(path)
    if (directory / "latest").exists():
        assert saved_number(directory) in numbers


def check_tidy(directory):
    """There is latest, and one directory of each step, and nothing else."""
    names = sorted(path.name for path in directory.iterdir())
    assert names[0] == "latest" and len({name[:13] for name in names}) == len(names), names


@pytest.mark.parametrize(
    ("steps_before", "step", "keep"),
    [
        ((), 1, 0),
        ((1, 2), 3, 0),
        ((1, 2), 3, 1),
        ((1, 2, 3), 4, 2),
        ((1, 2), 2, 0),  # the one that latest names, again
        ((1, 2), 2, 1),
        ((1, 2, 2), 2, 1),
        ((1, 3, 2), 3, 2),  # resumed at step 2, and comes by step 3 again
    ],
)
def test_a_save_killed_at_any_operation_loses_nothing(steps_before, step, keep, tmp_path):
    before = tmp_path / "before"
    before.mkdir()
    for number, earlier in enumerate(steps_before):
        save_number(before, earlier, number)
    for dies_at in itertools.count(1):
        directory = tmp_path / f"{dies_at}"
        shutil.copytree(before, directory)
        killed = killed_save(directory, dies_at, step, 10, keep)
        check_whole(directory, {len(steps_before) - 1, 10})
        assert (directory / "latest").exists() or not steps_before
        following = step if dies_at % 2 else step + 1
        save_number(directory, following, 11, keep)
        assert saved_number(directory) == saved_number(directory / f"step-{following:08d}") == 11
        check_tidy(directory)
        shutil.rmtree(directory)
        if not killed:
            break
    assert dies_at > 15  # it was killed at each of them


def test_saves_killed_one_after_another(tmp_path):
    """Also while the next one clears away what the one before left."""
    numbers, chance = set(), random.Random(0)
    for number in range(150):
        step, keep = chance.randint(1, 4), chance.randint(0, 2)
        killed = killed_save(tmp_path / "c", chance.randint(1, 50), step, number, keep)
        numbers = numbers | {number} if killed else {number}
        check_whole(tmp_path / "c", numbers)
        if (tmp_path / "c" / "latest").exists():
            numbers = {saved_number(tmp_path / "c")}
        if not killed:
            check_tidy(tmp_path / "c")


def test_what_a_kill_left_earlier_is_deleted(saved):
    """As versions before this one left it, which then failed with "Directory not empty"."""
    for name in (".step-00000002.replaced", ".step-00000001.deleted", ".step-00000003.partial"):
        shutil.copytree(saved / "step-00000002", saved / name)
    (saved / ".latest.partial").write_text("step-000")
    (saved / ".notes").touch()  # not ours
    checkpoint.save(saved, 2, make_model(0), keep=1)
    assert sorted(p.name for p in saved.iterdir()) == [".notes", "latest", "step-00000002.2"]


SAVING = """
import os, random, signal, sys, threading
import torch, mlpint
from mlpint import LayerParallel, checkpoint
directory, seed = sys.argv[1], int(sys.argv[2])
comm, chance = mlpint.init(), random.Random(seed)
model = torch.nn.Sequential(LayerParallel([torch.nn.Linear(64, 64) for _ in range(4)], comm=comm))
step = checkpoint.load(directory, model).step if os.path.exists(os.path.join(directory, "latest")) else 0
if seed:
    victim, seconds = chance.randrange(comm.size), chance.uniform(0.02, 0.5)
    if comm.rank == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
while True:
    step = max(1, step + chance.choice([-1, 0, 1, 1]))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, step)
    checkpoint.save(directory, step, model, keep=2)
    if not seed:
        break
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_killed_at_random(tmp_path):
    """Ten jobs of two ranks, one of which is killed while they save; each goes on where the one before was killed."""
    directory = tmp_path / "c"
    for seed in [*range(1, 11), 0]:
        result = launch.run(SAVING, 2, args=(str(directory), str(seed)))
        assert (result.returncode == 0) == (seed == 0), result.stderr
        model = nn.Sequential(nn.ModuleList(nn.Linear(64, 64) for _ in range(4)))
        for path in (directory, *directory.glob("step-*")):
            step = checkpoint.load(path, model).step
            assert all(torch.equal(p, torch.full_like(p, step)) for p in model.parameters())
    check_tidy(directory)
