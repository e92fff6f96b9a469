"""transformers.Trainer with the layers of its model spread over ranks: checkpoints that are whole, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import checkpoint as checkpoints
from ..comm.collectively import collectively
from ..errors import UserError
from ..nn import BlockStack
from ..nn.settings import NORMS, Weights
from ..parallel.optimizer_marks import foreign_states_left_out
from .saving import ranks_of, save_pretrained

FOLDER = "mlpint"  # in a checkpoint of Trainer's


class TrainerMixin:
    """Goes before :class:`transformers.Trainer` where a model's layers are spread over ranks.

    ::

        class Trainer(mlpint.hf.TrainerMixin, transformers.Trainer):
            pass

    Every rank makes the trainer and calls its methods, under mpirun or SLURM. Checkpoints hold the whole model in
    ``save_pretrained``'s format, written once, and the optimiser's state by the names of its parameters: any number of
    ranks can resume. Without several ranks nothing changes.

    Raises:
        UserError: on all ranks; ranks that Trainer itself would share the data out over (torchrun's), ``push_to_hub``,
            a checkpoint that cannot be written, or one without the optimiser's state of all ranks.
    """

    model: Any
    optimizer: Any
    args: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if ranks_of(self.model) is not None and self.args.world_size > 1:
            raise UserError(
                f"Trainer would give each of its {self.args.world_size} processes other samples, and ranks that share "
                "a model's layers need the same ones: start with mpirun or srun, where Trainer sees one process a rank"
            )

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Refused where the model has its layers on several ranks; else as Trainer's, which ``push_to_hub`` calls."""
        if ranks_of(self.model) is not None:
            raise UserError(
                "push_to_hub: a model with its layers on several ranks is saved first; push the folder from one process"
            )
        super().init_hf_repo(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, on every rank; rank 0 writes."""
        model = self._unwrapped()
        comm = ranks_of(model)
        if comm is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        directory = output_dir or self.args.output_dir
        save_pretrained(model, directory)

        def write_the_rest() -> None:
            tokenizer = getattr(self, "processing_class", None)
            if comm.rank == 0 and tokenizer is not None:
                tokenizer.save_pretrained(directory)
            if comm.rank == 0:
                torch.save(self.args, Path(directory, "training_args.bin"))

        collectively(comm, write_the_rest)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        whole = self._unwrapped()
        comm = ranks_of(whole)
        if comm is None:
            super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
            return
        # Each process takes itself for the only one and would write what rank 0 writes.
        if comm.rank == 0:
            super()._save_checkpoint(model, trial, *args, **kwargs)  # type: ignore[misc]
        else:
            self.save_model(_internal_call=True)
        found = {
            "best": getattr(self.state, "best_model_checkpoint", None),
            "folder": str(Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")),  # type: ignore[attr-defined]
        }
        found = collectively(comm, lambda: found)[0]
        self.state.best_model_checkpoint = found["best"]
        if not self.args.save_only_model:
            folder = Path(found["folder"], FOLDER)
            checkpoints.save(folder, self.state.global_step, whole, self.optimizer, keep=1, comm=comm)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        model = self._unwrapped()
        comm = ranks_of(model)
        if comm is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        with foreign_states_left_out():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        folder = Path(checkpoint, FOLDER)

        def find() -> None:
            if not folder.is_dir():
                raise UserError(
                    f"{checkpoint} lacks {FOLDER}/, the optimiser's state of all ranks: it was not saved by "
                    "mlpint.hf.TrainerMixin, or with save_only_model=True. Start from its weights instead of resuming"
                )

        collectively(comm, find)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        checkpoints.load(folder, model, optimizer, comm=comm)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As Trainer's, whose rules go by layers' names: biases and norms of stacked ones have no decay either."""
        spared = {
            f"{path}.{field}"
            for path, stack in model.named_modules()
            if isinstance(stack, BlockStack)
            for field in Weights._fields
            if field.startswith(NORMS) or field.endswith("bias")
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]  # type: ignore[misc]

    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
