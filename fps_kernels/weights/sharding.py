"""Models whose weights are cut into pieces over processes in a way that is not served: refused by name."""

from torch import nn
from torch.distributed import is_available

from fps_kernels.weights.survey import Survey

_INSTEAD = "use DistributedDataParallel, which keeps weights whole, or one process"


def check_whole(survey: Survey) -> None:
    """Refuse models that something has sharded.

    Raises:
        ValueError: FullyShardedDataParallel, ``fully_shard``, tensor parallelism, or DeepSpeed's ZeRO-3. With the name of
            what is sharded.
    """
    check_sharding(survey)
    if survey.sharded:
        name = next(iter(survey.sharded))
        raise ValueError(
            f"{name} is a DTensor, a weight that fully_shard has cut into pieces, which needs attach(): {_INSTEAD}"
        )


def check_sharding(survey: Survey) -> None:
    """Refuse models that something else than ``fully_shard`` has sharded.

    Raises:
        ValueError: FullyShardedDataParallel, tensor parallelism, or DeepSpeed's ZeRO-3. With the name of what is sharded.
    """
    if is_available() and (name := _flattened(survey)) is not None:
        raise ValueError(
            f"{name or 'the model'} is wrapped in FullyShardedDataParallel, which flattens and cuts the weights in it: "
            f"use fully_shard, or {_INSTEAD}"
        )
    sharded = survey.sharded
    for name, p in survey.parameters.items():
        if type(p) is nn.Parameter and not p.numel() and hasattr(p, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed's ZeRO-3: {_INSTEAD}, or ZeRO-1, which shards optimizers only"
            )
        if name not in sharded and is_sharded(p):
            raise ValueError(
                f"{name} is a DTensor, a weight that tensor parallelism has cut into pieces: use fully_shard, or {_INSTEAD}"
            )


def is_sharded(parameter: object) -> bool:
    """Whether a parameter is a piece of one."""
    if type(parameter) is nn.Parameter or not is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _flattened(survey: Survey) -> str | None:
    if not any(type(module).__name__ == "FullyShardedDataParallel" for module in survey.modules.values()):
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel

    return next((path for path, module in survey.modules.items() if isinstance(module, FullyShardedDataParallel)), None)
