"""What ``mlpint train`` can train: one file a task, chosen by the key ``task``.

A task brings data and model together: batches, the loss, what is measured on held-out data, a sample of what has been
learnt. It knows nothing of layer-parallel training but the ranks. May import the models and the data beside it,
:mod:`mlpint.parallel` and what that may. Nothing here is public but by way of ``mlpint train``.
"""

from ...errors import DataError
from ..config import TrainConfig
from ..memory import check_memory
from .base import Batch, Sample, Task
from .bert import BERTTask
from .classification import ClassificationTask
from .gpt import GPTTask
from .tagging import TaggingTask
from .translation import TranslationTask
from .vit import ViTTask

_TASKS: dict[str, type[Task]] = {
    "gpt": GPTTask,
    "bert": BERTTask,
    "vit": ViTTask,
    "tagging": TaggingTask,
    "classification": ClassificationTask,
    "translation": TranslationTask,
}


def make(config: TrainConfig, *, planned: bool = False) -> Task:
    """The task of a configuration, its data read; ``planned``: whatever memory its model would take.

    Raises:
        UserError: data that cannot be read or do not fit, naming the file; settings that no memory is large enough for.
    """
    if not planned:
        check_memory(config)
    try:
        return _TASKS[config.model.task](config)
    except OSError as error:
        raise DataError(f"{error.filename or config.data.data}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise DataError(f"data = {config.data.data!r}: do not fit into memory") from None


__all__ = ["Batch", "Sample", "Task", "make"]
