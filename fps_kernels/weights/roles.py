"""What part a parameter plays in parameter selection: chosen from, trained whole, or frozen."""

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from fps_kernels.weights.survey import Survey

# First or last parts of the path of a classifier head in timm, torchvision and transformers models.
_HEAD_NAMES = frozenset(
    {"head", "heads", "head_dist", "classifier", "fc", "score", "lm_head", "cls", "qa_outputs", "aux_head", "logits"}
)

Patterns = str | Sequence[str]


def as_patterns(patterns: Patterns | None, argument: str) -> tuple[str, ...]:
    """Glob patterns as a tuple."""
    if patterns is None:
        return ()
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"{argument} must be glob patterns, got {pattern!r}")
    return found


def matching(patterns: Iterable[str], names: Iterable[str], argument: str, among: str) -> list[str]:
    """The names that match any of the glob patterns, in their own order.

    Raises:
        ValueError: a pattern that matches none.
    """
    names, hits = list(names), set()
    for pattern in patterns:
        matched = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            examples = ", ".join(names[:3])
            raise ValueError(f"{argument} pattern {pattern!r} matches none of the {among} (such as {examples})")
        hits |= matched
    return [name for name in names if name in hits]


def classifier_modules(model: nn.Module | Survey) -> list[str]:
    """Paths of the modules that make up the classifier head.

    timm models say so themselves; elsewhere it is the child of the model that carries one of the customary names. Wrappers
    (``torch.compile``, DataParallel), which have one child and no parameters of their own, are looked into.
    """
    survey = Survey.of(model)
    model, found = survey.model, _heads(survey)
    children = list(model.named_children())
    if not found and len(children) == 1 and next(model.parameters(recurse=False), None) is None:
        name, wrapped = children[0]
        return [f"{name}.{path}" for path in classifier_modules(wrapped)]
    return found


def _heads(survey: Survey) -> list[str]:
    model, modules = survey.model, survey.modules
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    declared = getattr(config, "get", lambda _: None)("classifier") if config is not None else None
    if declared:
        names = [declared] if isinstance(declared, str) else list(declared)
        return [name for name in names if name in modules]
    if callable(get := getattr(model, "get_classifier", None)):
        head = get()
        return [name for name, module in modules.items() if module is head and name][:1]  # its first name
    return [name for name, _ in model.named_children() if name in _HEAD_NAMES]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def default_dense(survey: Survey) -> tuple[str, ...]:
    """What the GPS and FPS protocols train whole: the classifier head, and every bias outside norm layers."""
    heads = tuple(f"{name}." for name in classifier_modules(survey))
    dense = []
    for p, name in survey.first_names.items():
        owner, leaf = survey.owner(name)
        is_bias = leaf.endswith("bias") and p.dim() == 1 and not _is_norm(owner)
        if name.startswith(heads) or is_bias:
            dense.append(name)
    return tuple(dense)
