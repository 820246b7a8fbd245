"""timm: ``MaskedAdamW`` under a name that timm's optimizer factory and training scripts know."""

from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry

from fps_kernels.tuning.masked_adamw import MaskedAdamW

NAME = "maskedadamw"


def register() -> str:
    """Make :class:`fps_kernels.MaskedAdamW` known to timm as ``"maskedadamw"``; a second call does nothing.

    Attach first: timm then builds its groups (weight decay, layer decay) from what is trainable, the compact values among
    it. These are one-dimensional, so that timm's usual filter spares them weight decay, and their names say which layer
    they belong to, so that layer decay finds it.

    Returns:
        The name, for ``timm.optim.create_optimizer_v2(model, opt=...)`` or a script's ``--opt``.

    Example:
        >>> tuner = fps.attach(model, selection)
        >>> optimizer = timm.optim.create_optimizer_v2(model, opt=register(), lr=1e-3, layer_decay=0.75)
    """
    if NAME not in default_registry.list_optimizers():
        default_registry.register(
            OptimInfo(
                name=NAME,
                opt_class=MaskedAdamW,
                description="AdamW on the chosen entries of attached weights (fps_kernels)",
                has_betas=True,
            )
        )
    return NAME
