"""The gradient-based baseline: GPS, "Gradient-based Parameter Selection for Efficient Fine-Tuning" (CVPR 2024).

GPS scores an entry by the magnitude of its gradient, accumulated over the data, and takes the best of every output
neuron. That needs labels, a loss, a backward pass and a dense gradient of every weight. It is here to be compared with,
so it is written to be a fair peer: only weights that are chosen from get gradients, micro-batches bound the
activations, and gradients accumulate in place.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fps_kernels.choosing.best_entries import best_entries
from fps_kernels.choosing.budgets import Budget, PerNeuron, ScoredWeight, check_budget
from fps_kernels.choosing.candidates import eligible_weights
from fps_kernels.choosing.feeding import (
    batches_of,
    default_forward,
    evaluation_mode,
    explained,
    split_batch,
    to_device,
    uncompiled,
)
from fps_kernels.selection import Selection
from fps_kernels.weights.matrix import MatrixLayout
from fps_kernels.weights.roles import Patterns, classifier_modules
from fps_kernels.weights.sharding import check_whole
from fps_kernels.weights.survey import Survey
from fps_kernels.weights.watching import WeightInterception, WeightUse

Loss = Literal["contrastive", "cross_entropy"] | Callable[[Any, Any], Tensor]


def supervised_contrastive_loss(features: Tensor, target: Tensor, temperature: float = 0.07) -> Tensor:
    """The supervised contrastive loss of Khosla et al. (NeurIPS 2020), equation 2, mean over the anchors.

    Args:
        features: ``[N, D]``, of any length; they are normalised here.
        target: class of each feature ``[N]``. An anchor's positives are the other features of its class.
        temperature: divides the cosine similarities.

    Returns:
        Scalar loss; anchors without a positive do not count.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> loss = supervised_contrastive_loss(torch.cat([first, second]), target.repeat(2))
    """
    if features.dim() != 2 or target.shape != features.shape[:1]:
        raise ValueError(f"features must be [N, D] and target [N], got {list(features.shape)} and {list(target.shape)}")
    z = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probability = (z @ z.t() / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    positive = (target[:, None] == target[None, :]) & ~itself
    counts = positive.sum(1)
    per_anchor = -log_probability.masked_fill(~positive, 0.0).sum(1) / counts.clamp(min=1)
    return per_anchor.sum() / (counts > 0).sum().clamp(min=1)


def random_views(images: Tensor, scale: tuple[float, float] = (0.3, 1.0)) -> tuple[Tensor, Tensor]:
    """Two random crops of every image, resized back and flipped at random: the two views of the contrastive loss.

    Args:
        images: ``[B, C, H, W]``.
        scale: range of the cropped share of an image's area.

    Returns:
        Two tensors of the same shape.

    Example:
        >>> gps_select(model, loader, views=fps.gps.random_views)
    """

    def crop() -> Tensor:
        n = len(images)
        side = torch.empty(n, device="cpu").uniform_(*scale).sqrt()
        transform = torch.zeros(n, 2, 3, device="cpu")
        transform[:, 0, 0] = side * (torch.randint(2, (n,), device="cpu") * 2 - 1)
        transform[:, 1, 1] = side
        transform[:, :, 2] = (torch.rand(n, 2, device="cpu") * 2 - 1) * (1 - side)[:, None]
        grid = F.affine_grid(transform.to(images.device, images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    return crop(), crop()


def gps_select(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Loss = "contrastive",
    budget: Budget | None = None,
    views: Callable[[Any], tuple[Any, Any]] | None = None,
    temperature: float = 0.07,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    dense: Patterns | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    micro_batch: int | None = None,
    progress: bool | None = None,
) -> Selection:
    """Choose entries by the magnitude of their gradient, accumulated over a full pass: the published GPS.

    Args:
        model: the model; its gradients, ``requires_grad`` flags and modes are put back afterwards.
        data: batches ``(inputs, target)``.
        loss: ``"contrastive"``, the published choice: supervised contrastive on the input of the classifier head (on
            the model's output if it has no head), over two views of every image; ``"cross_entropy"`` on the model's
            output; or ``loss(output, target)``, averaged over the batch.
        budget: how many entries; the published ``PerNeuron(1)`` by default.
        views: makes two views of a batch's inputs. Without it the inputs must be a pair of views already.
        temperature: of the contrastive loss.
        include: glob patterns of weights to choose from; all by default.
        exclude: glob patterns of weights to leave frozen.
        dense: glob patterns of parameters to train whole, instead of head and biases.
        forward: ``forward(model, inputs)`` runs the inputs your way.
        micro_batch: run the model on so many samples at a time. The contrastive loss compares all samples of a batch,
            so its gradient with respect to the features is taken first, and then carried back piece by piece
            (gradient caching, Gao et al. 2021), with the same result and one more forward pass.
        progress: show a progress bar; ``None`` shows it on a terminal.

    Returns:
        :class:`Selection`, with the same roles of parameters as :func:`fps_kernels.select`.

    Raises:
        ValueError: no data, no pair of views, a batch that is no ``(inputs, target)``, no weight to choose from,
            gradients with NaN or Inf, or a call inside ``torch.inference_mode``.
        TypeError: a ``loss`` or a budget that is none.

    Example:
        >>> selection = fps.gps_select(model, loader, views=fps.gps.random_views, budget=fps.PerNeuron(1))
    """
    if isinstance(loss, str) and loss not in ("contrastive", "cross_entropy"):
        raise ValueError(f"loss must be 'contrastive', 'cross_entropy' or a function, got {loss!r}")
    if not isinstance(loss, str) and not callable(loss):
        raise TypeError(f"loss must be 'contrastive', 'cross_entropy' or a function, got {loss!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    if torch.is_inference_mode_enabled():
        raise ValueError("GPS needs gradients: call it outside torch.inference_mode")
    budget = PerNeuron(1) if budget is None else budget
    check_budget(budget)
    survey = Survey.of(model)
    check_whole(survey)
    survey.check_has_values()
    eligible, dense_names, skipped = eligible_weights(survey, include, exclude, dense)
    layouts: dict[str, MatrixLayout] = {}

    def note_layout(use: WeightUse) -> None:
        layouts[use.name] = use.layout

    watch = WeightInterception(eligible, note_layout)
    feed = forward or default_forward
    with evaluation_mode(survey), _only_gradients_of(survey, eligible), uncompiled():
        for index, batch in enumerate(batches_of(data, "gps", progress)):
            inputs, target = _inputs_and_target(to_device(batch, survey.device))
            with explained(index, batch), watch:
                if loss == "contrastive":
                    _backward_contrastive(survey, inputs, target, feed, views, temperature, micro_batch)
                else:
                    function = F.cross_entropy if isinstance(loss, str) else loss
                    _backward_loss(model, inputs, target, feed, function, micro_batch)
        scored = []
        for name, p in eligible.items():
            if name in watch.hidden:
                skipped[name] = watch.why_hidden(name)
            elif name in layouts and p.grad is not None:
                budget.check(name, layouts[name])
                ones = torch.ones(1, layouts[name].shape[1], device=p.device)
                scored.append(ScoredWeight(name, layouts[name], p.grad, ones))
            else:
                skipped[name] = survey.reason_unused(name, p, watch.other_uses)
        if not scored:
            raise ValueError("no weight is left to choose from: none got a gradient")
        if remark := budget.remark({w.name: w.layout for w in scored}):
            warnings.warn(remark, stacklevel=2)
        chosen = best_entries(budget.groups(scored), budget, "gradient")
    description = {"scorer": f"GPS(loss={loss if isinstance(loss, str) else 'custom'})", "budget": repr(budget)}
    return Selection(chosen, dense_names, skipped, dict(survey.tied), description)


def _inputs_and_target(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ValueError("data must give (inputs, target) batches: GPS needs labels")
    return batch[0], batch[1]


@contextmanager
def _only_gradients_of(survey: Survey, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Only ``weights`` collect gradients, from none; afterwards flags and gradients are as they were."""
    found = [(p, p.requires_grad, p.grad) for p in survey.first_names]
    wanted = {id(p) for p in weights.values()}
    try:
        for p, _, _ in found:
            p.grad = None
            p.requires_grad_(id(p) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for p, requires_grad, grad in found:
            p.requires_grad_(requires_grad)
            p.grad = grad


def _backward_loss(
    model: nn.Module,
    inputs: Any,
    target: Tensor,
    feed: Callable[[nn.Module, Any], Any],
    loss: Callable[[Any, Any], Tensor],
    micro_batch: int | None,
) -> None:
    for piece_inputs, piece_target in split_batch((inputs, target), micro_batch):
        share = len(piece_target) / len(target)
        (loss(feed(model, piece_inputs), piece_target) * share).backward()


def _backward_contrastive(
    survey: Survey,
    inputs: Any,
    target: Tensor,
    feed: Callable[[nn.Module, Any], Any],
    views: Callable[[Any], tuple[Any, Any]] | None,
    temperature: float,
    micro_batch: int | None,
) -> None:
    pair = inputs if views is None else views(inputs)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError(
            "the contrastive loss compares two views of every image: let data give ((view, view), target), or pass "
            "views=fps.gps.random_views"
        )
    labels = target.repeat(2)
    pieces = [piece for view in pair for piece in split_batch(view, micro_batch)]
    if len(pieces) == 2:
        features = torch.cat([_features(survey, piece, feed) for piece in pieces])
        supervised_contrastive_loss(features, labels, temperature).backward()
        return
    with torch.no_grad():
        cached = torch.cat([_features(survey, piece, feed) for piece in pieces])
    cached.requires_grad_()
    supervised_contrastive_loss(cached, labels, temperature).backward()
    assert cached.grad is not None
    start = 0
    for piece in pieces:
        features = _features(survey, piece, feed)
        features.backward(cached.grad[start : start + len(features)])
        start += len(features)


def _features(survey: Survey, inputs: Any, feed: Callable[[nn.Module, Any], Any]) -> Tensor:
    """The input of the classifier head ``[B, D]``, or the model's output if it has no head."""
    model = survey.model
    heads = [h for h in map(model.get_submodule, classifier_modules(survey)) if next(h.parameters(), None) is not None]
    if not heads:
        return torch.flatten(feed(model, inputs), 1)
    seen: list[Tensor] = []
    handle = heads[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    try:
        feed(model, inputs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError("the classifier head did not run: pass forward= that returns features of a model without a head")
    return torch.flatten(seen[-1], 1)
