"""Ways of choosing that are tried against FPS, GPS and random; none is part of the package.

All see forward passes only, and all but one (``class std``) no labels. They are written for clarity, with a score matrix
for one weight at a time; what a score or a key per entry decides, the fused ops could choose without one.

Entries are drawn in proportion to a weight by exponential races (Efraimidis & Spirakis 2006): an entry with weight ``p``
gets the key ``log(p) - log(-log(u))``, ``u`` uniform, and the largest keys win.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fps_kernels as fps
from fps_kernels.choosing.feeding import run_forward
from fps_kernels.selection import Selection, WeightSelection
from fps_kernels.weights.kinds.convolution import Convolution2d
from fps_kernels.weights.survey import Survey
from fps_kernels.weights.watching import WeightUse

# ``score(W, moments)``: ``[O, C]``, or ``[1, C]`` where the weights do not matter.
Score = Callable[[Tensor, "Moments"], Tensor]


@dataclass(frozen=True)
class Moments:
    """What the inputs of one weight look like.

    Attributes:
        mean: per column, over all tokens of all images ``[C]``.
        std: likewise.
        magnitude: mean of ``|a|``, likewise.
        images: mean over the tokens of each image ``[N, C]``.
        first: the first token of each image ``[N, C]``, in a ViT its class token.
        target: class of each image ``[N]``.
        growth: ``magnitude`` over that of the anchor ``[C]``; ones without an anchor.
    """

    mean: Tensor
    std: Tensor
    magnitude: Tensor
    images: Tensor
    first: Tensor
    target: Tensor
    growth: Tensor


def moments(o: Any) -> dict[str, Moments]:
    """One forward pass over the training images, float64 sums."""
    sums: dict[str, list[Any]] = {}

    def note(use: WeightUse) -> None:
        x = use.input
        if isinstance(use.kind, Convolution2d):
            c = use.kind.geometry
            x = F.unfold(x, c.kernel_size, c.dilation, c.padding[0], c.stride).transpose(1, 2)
        tokens = x.reshape(len(x), -1, x.shape[-1]).double()
        part = [tokens.sum((0, 1)), tokens.square().sum((0, 1)), tokens.abs().sum((0, 1)), tokens.shape[0] * tokens.shape[1]]
        found = sums.setdefault(use.name, [0, 0, 0, 0, [], []])
        for i, value in enumerate(part):
            found[i] = found[i] + value
        found[4].append(tokens.mean(1).float())
        found[5].append(tokens[:, 0].float())

    batches = o.batches()
    run_forward(Survey.of(o.model), batches, note, forward=None, micro_batch=None, max_batches=None, progress=False)
    target = torch.cat([y for _, y in batches])
    anchor = o.anchor_stats() if o.anchor is not None else None
    result = {}
    for name, (total, squares, magnitudes, count, images, first) in sums.items():
        mean, magnitude = total / count, (magnitudes / count)
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        growth = torch.ones_like(magnitude)
        if anchor is not None and name in anchor:
            before = anchor[name].mean()[0]
            growth = magnitude / (before + 1e-6 * before.mean())
        rows = torch.cat(images), torch.cat(first)
        result[name] = Moments(mean.float(), std.float(), magnitude.float(), *rows, target, growth.float())
    return result


def _moments(o: Any) -> dict[str, Moments]:
    found: dict[str, Moments] = o.remember("moments", lambda: moments(o))
    return found


def _frame(o: Any) -> Selection:
    """A selection whose roles, names and layouts are those of every other method."""
    return fps.select(o.model, stats=o.stats(1), scorer=fps.Random(o.seed), budget=fps.PerNeuron(o.k), progress=False)


def _matrix(o: Any, w: WeightSelection, name: str) -> Tensor:
    return w.layout.matrix(o.model.get_parameter(name).detach()).float()


def _rows_to_selection(w: WeightSelection, columns: Tensor) -> WeightSelection:
    """``columns`` ``[O, k]`` without repetition in a row."""
    O, k = columns.shape
    return WeightSelection(w.layout, torch.arange(O + 1, dtype=torch.int32) * k, columns.sort(1).values.int().flatten())


def _generator(o: Any, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{o.seed} {name}".encode()))


def top(score: Score, o: Any) -> Selection:
    """The highest scores of every row."""
    frame, known = _frame(o), _moments(o)
    chosen = {}
    for name, w in frame.items():
        scores = score(_matrix(o, w, name), known[name]).expand(w.layout.shape)
        chosen[name] = _rows_to_selection(w, scores.topk(o.k, 1).indices)
    return replace(frame, weights=chosen)


def drawn(score: Score, power: float, o: Any) -> Selection:
    """Entries of every row drawn without replacement, in proportion to ``score ** power``."""
    frame, known = _frame(o), _moments(o)
    chosen = {}
    for name, w in frame.items():
        scores = score(_matrix(o, w, name), known[name]).clamp(min=1e-20).expand(w.layout.shape)
        u = torch.rand(w.layout.shape, generator=_generator(o, name)).clamp(1e-12, 1 - 1e-7)
        chosen[name] = _rows_to_selection(w, (power * scores.log() - (-u.log()).log()).topk(o.k, 1).indices)
    return replace(frame, weights=chosen)


def capped(score: Score, slack: float, o: Any) -> Selection:
    """The highest scores of every row, after factors per column have been lowered until none is chosen too often.

    A column may hold ``slack`` times its even share. Every pass lowers the price of crowded columns, as in an auction.
    """
    frame, known = _frame(o), _moments(o)
    chosen = {}
    for name, w in frame.items():
        O, C = w.layout.shape
        scores = score(_matrix(o, w, name), known[name]).expand(O, C).clamp(min=1e-20).log()
        cap, price = max(1.0, slack * o.k * O / C), torch.zeros(C)
        columns = scores.topk(o.k, 1).indices
        for step in range(200):
            counts = columns.flatten().bincount(minlength=C)
            if counts.max() <= cap:
                break
            rate = 0.3 if step < 100 else 0.05
            price += rate * (counts / cap).log().clamp(min=0)
            columns = (scores - price).topk(o.k, 1).indices
        chosen[name] = _rows_to_selection(w, columns)
    return replace(frame, weights=chosen)


def permuted(choice: Callable[[Any], Selection], o: Any) -> Selection:
    """A control: a choice with the columns of every weight relabelled at random: as concentrated, but blind."""
    selection = choice(o)
    chosen = {}
    for name, w in selection.items():
        relabelled = torch.randperm(w.layout.shape[1], generator=_generator(o, name))
        chosen[name] = _rows_to_selection(w, relabelled[w.columns.long()].view(-1, o.k))
    return replace(selection, weights=chosen)


def few_columns(width: int, o: Any) -> Selection:
    """A control: every row draws from the same ``width * k`` columns, themselves drawn at random."""
    frame = _frame(o)
    chosen = {}
    for name, w in frame.items():
        O, C = w.layout.shape
        g = _generator(o, name)
        pool = torch.randperm(C, generator=g)[: width * o.k]
        picks = torch.rand(O, len(pool), generator=g).topk(o.k, 1).indices
        chosen[name] = _rows_to_selection(w, pool[picks])
    return replace(frame, weights=chosen)


def only(kept: Callable[[str, int], bool], choice: Callable[[Any], Selection], o: Any) -> Selection:
    """The whole budget in some weights: as many entries as ``PerNeuron(k)`` has everywhere, the same number in every row.

    Args:
        kept: ``kept(name, blocks)`` says whether a weight gets entries, given the number of blocks of the model.
        choice: made within the larger budget.
        o: with the budget for all weights.
    """
    frame = _frame(o)
    blocks = 1 + max(_block(name) for name in frame)
    names = [name for name in frame if kept(name, blocks)]
    rows = sum(frame[name].layout.shape[0] for name in names)
    selection = choice(replace(o, k=round(frame.nnz / rows)))
    return replace(selection, weights={name: selection[name] for name in names})


def rising(choice: Callable[[Any], Selection], o: Any) -> Selection:
    """Entries per row that grow in proportion to depth, from about none in the first block to about ``2k`` in the last.

    What is in no block keeps ``k``, so that there are as many entries in all as ``PerNeuron(k)`` has.
    """
    frame = _frame(o)
    blocks = 1 + max(_block(name) for name in frame)
    quotas = {name: o.k if _block(name) < 0 else round(2 * o.k * (_block(name) + 0.5) / blocks) for name in frame}
    return _within_quotas(quotas, choice, o)


def rising_by_rows(choice: Callable[[Any], Selection], o: Any) -> Selection:
    """As :func:`rising`, for any network: depth is the position of a weight's middle row among the rows of all weights.

    A row gets ``round(2 k t)`` entries, with ``t`` in (0, 1) that position over the number of rows. The mean of ``t`` over
    all rows is exactly one half, whatever the shapes, so that there are as many entries as ``PerNeuron(k)`` has but for the
    rounding.
    """
    frame = _frame(o)
    rows = [w.layout.shape[0] for w in frame.values()]
    middles = [end - O / 2 for O, end in zip(rows, accumulate(rows), strict=True)]
    quotas = {name: round(2 * o.k * middle / sum(rows)) for name, middle in zip(frame, middles, strict=True)}
    return _within_quotas(quotas, choice, o)


def _within_quotas(quotas: dict[str, int], choice: Callable[[Any], Selection], o: Any) -> Selection:
    """A choice within a number of entries per row for every weight."""
    choices = {k: choice(replace(o, k=k)) for k in set(quotas.values()) if k}
    return replace(_frame(o), weights={name: choices[k][name] for name, k in quotas.items() if k})


def _block(name: str) -> int:
    """Which block of a ViT a weight is in; -1 for none."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def _within(*parts: str) -> Callable[[str, int], bool]:
    return lambda name, _: any(part in name for part in parts)


def pivots(o: Any) -> Selection:
    """Columns by pivoted Cholesky of the covariance of their activations between images, spread evenly over the rows.

    Each pivot is the column with the most variance that those before do not explain. As many pivots as are needed for half
    of the columns; every row draws ``k`` of them in proportion to the standard deviation left unexplained.
    """
    frame, known = _frame(o), _moments(o)
    chosen = {}
    for name, w in frame.items():
        O, C = w.layout.shape
        x = known[name].images.double()
        x = x - x.mean(0)
        residual, gains = x.clone(), torch.zeros(C, dtype=torch.float64)
        for _ in range(min(C // 2, len(x) - 1)):
            energy = residual.square().sum(0)
            j = int(energy.argmax())
            if energy[j] <= 1e-12 * x.square().sum():
                break
            gains[j] = energy[j].sqrt()
            direction = residual[:, j] / energy[j].sqrt()
            residual -= direction[:, None] * (direction @ residual)
            residual[:, j] = 0
        u = torch.rand(O, C, generator=_generator(o, name)).clamp(1e-12, 1 - 1e-7)
        keys = gains.clamp(min=1e-20).log().float() - (-u.log()).log()
        chosen[name] = _rows_to_selection(w, keys.topk(o.k, 1).indices)
    return replace(frame, weights=chosen)


def budgeted(budget: Callable[[float], Any], scorer: Any, o: Any) -> Selection:
    """The package's other budgets, with as many entries in all as ``PerNeuron(k)`` has."""
    density = _frame(o).density
    return fps.select(o.model, stats=o.stats(scorer.ord or 1), scorer=scorer, budget=budget(density), progress=False)


def _random(o: Any) -> Selection:
    return _frame(o)


def _between(m: Moments) -> Tensor:
    return m.images.std(0)


def _class_std(m: Moments) -> Tensor:
    """Standard deviation between the classes' mean activations."""
    classes = m.target.unique()
    return torch.stack([m.images[m.target == c].mean(0) for c in classes]).std(0)


def _fps(W: Tensor, m: Moments) -> Tensor:
    return W.abs() * m.magnitude


def _row(v: Tensor) -> Tensor:
    return v[None]


IDEAS: dict[str, Callable[[Any], Selection]] = {
    # Controls: is it the concentration on few columns, or the score, that costs accuracy?
    "FPS permuted": partial(permuted, partial(top, _fps)),
    "random, 2k columns": partial(few_columns, 2),
    # The gradient's energy at an entry is about that of its row's output gradient times that of its column's input, whatever
    # the weight: without it every row takes the same columns.
    "strongest columns": partial(top, lambda W, m: _row((m.mean.square() + m.std.square()).sqrt())),
    "most varying columns": partial(top, lambda W, m: _row(m.std)),
    # FPS spread out.
    "FPS drawn": partial(drawn, _fps, 1.0),
    "FPS drawn, root": partial(drawn, _fps, 0.5),
    "FPS capped": partial(capped, _fps, 2.0),
    "FPS row- and column-normalised": partial(
        top, lambda W, m: W.abs() / W.norm(dim=0) / W.norm(dim=1, keepdim=True) * m.magnitude.sqrt()
    ),
    # A bias is trained beside the entries, and does what a constant activation would: only what varies is new.
    "centred": partial(top, lambda W, m: W.abs() * m.std),
    "std drawn": partial(drawn, lambda W, m: _row(m.std), 1.0),
    "variance drawn": partial(drawn, lambda W, m: _row(m.std), 2.0),
    "std capped": partial(capped, lambda W, m: W.abs() * m.std, 2.0),
    "between-image std drawn": partial(drawn, lambda W, m: _row(_between(m)), 1.0),
    "between-image variance drawn": partial(drawn, lambda W, m: _row(_between(m)), 2.0),
    "class-token std drawn": partial(drawn, lambda W, m: _row(m.first.std(0)), 1.0),
    "class std drawn": partial(drawn, lambda W, m: _row(_class_std(m)), 1.0),
    "signal to noise": partial(top, lambda W, m: W.abs() * m.std / (m.mean.abs() + 0.1 * m.std)),
    "pivoted columns": pivots,
    # Growth since pre-training.
    "Wanda x growth": partial(top, lambda W, m: W.abs() * m.magnitude * m.growth),
    "growth drawn": partial(drawn, lambda W, m: _row(m.std * m.growth), 1.0),
    # The other end.
    "lowest FPS": partial(top, lambda W, m: -W.abs() * m.magnitude),
    "small weights drawn": partial(drawn, lambda W, m: m.std / (W.abs() + W.abs().mean(1, keepdim=True)), 1.0),
    # The budget between rows and between layers.
    "FPS per tensor": partial(budgeted, fps.PerTensor, fps.FPS()),
    "FPS global": partial(budgeted, fps.Global, fps.FPS()),
    "random, attention": partial(only, _within(".attn."), _random),
    "random, MLP": partial(only, _within(".mlp."), _random),
    "random, fc2+proj": partial(only, _within(".fc2.", ".attn.proj."), _random),
    "random, qkv+fc1": partial(only, _within(".qkv.", ".fc1."), _random),
    "random, first half": partial(only, lambda name, blocks: 0 <= _block(name) < blocks // 2, _random),
    "random, last half": partial(only, lambda name, blocks: _block(name) >= blocks // 2, _random),
    # FPS where random entries gained most.
    "FPS, last half": partial(only, lambda name, blocks: _block(name) >= blocks // 2, partial(top, _fps)),
    "FPS, last third": partial(only, lambda name, blocks: _block(name) >= blocks - blocks // 3, partial(top, _fps)),
    "centred, last half": partial(
        only, lambda name, blocks: _block(name) >= blocks // 2, partial(top, lambda W, m: W.abs() * m.std)
    ),
    "FPS, rising": partial(rising, partial(top, _fps)),
    "FPS, rising by rows": partial(rising_by_rows, partial(top, _fps)),
    "random, rising": partial(rising, _random),
    "FPS, attention": partial(only, _within(".attn."), partial(top, _fps)),
    "FPS x activation": partial(top, lambda W, m: W.abs() * m.magnitude.square()),
}
