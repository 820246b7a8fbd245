"""The tables of ``benchmarks.render``: Markdown made from the files in ``benchmarks/results`` and from nothing else."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.shared.measuring import RESULTS
from fps_kernels.memory import format_bytes

Row = dict[str, Any]
Content = dict[str, Any]
# What the README shows of kernels.json: operation and counterpart there, and what they are called here.
KERNELS = {
    ("column_norm_ [12608, 768] float32", "x.sum()"): ("`column_norm`, [12608, 768] float32", "`x.sum()`"),
    ("column_norm_ [12608, 768] float32", "x.abs().sum(0)"): ("`column_norm`, [12608, 768] float32", "`x.abs().sum(0)`"),
    ("score_topk k=1", "one read: W.sum()"): ("score + top-1, all of ViT-B's weights", "one read (`W.sum()`)"),
    ("score_topk k=8", "one read: W.sum()"): ("score + top-8, all of ViT-B's weights", "one read (`W.sum()`)"),
    ("score_topk k=8", "(W.abs() * a).topk(k)"): ("score + top-8, all of ViT-B's weights", "`(W.abs() * a).topk(k)`"),
    ("score_kth + score_select 1 %", "one read: W.sum()"): ("exact global 1 % of ViT-B's weights", "one read (`W.sum()`)"),
    ("score_kth + score_select 1 %", "torch.cat(scores).topk(k)"): (
        "exact global 1 % of ViT-B's weights",
        "`torch.cat(scores).topk(k)`",
    ),
    ("pack_groups [65536, 4096] float32, 8 bits", "copy of 688 MB"): (
        "activations to 8 bits, [65536, 4096] float32",
        "a copy of as many bytes",
    ),
    ("unpack_groups [65536, 4096] float32, 8 bits", "copy of 688 MB"): ("and back", "a copy of as many bytes"),
    ("masked_adamw_ k=8 per row", "torch.optim.AdamW(fused=True)"): (
        "AdamW step, 8 entries a row of ViT-B",
        "`torch.optim.AdamW(fused=True)`",
    ),
    ("masked_adamw_ random 1 %", "torch.optim.AdamW(fused=True)"): (
        "AdamW step, random 1 % of ViT-B",
        "`torch.optim.AdamW(fused=True)`",
    ),
}


def load(name: str) -> Content | None:
    """A results file, or ``None`` where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose columns but the first ``left`` are aligned to the right."""
    rules = ["---" if i < left else "---:" for i in range(len(head))]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *body)]
    return "\n".join([rows[0], "|" + "|".join(rules) + "|", *rows[1:]])


def source(content: Content) -> str:
    """The line under a table: the command that made it, where, with what, and when."""
    m = content.get("machine", content)
    parts = [m.get("processor"), f"{m['threads']} thread{'s' * (m['threads'] != 1)}" if "threads" in m else None]
    versions = (("torch", "torch"), ("triton", "Triton"), ("python", "Python"), ("commit", "commit"))
    parts += [f"{name} {m[key]}" if key in m else None for key, name in versions]
    parts.append(m.get("date"))
    return f"<sub>`{content['command']}`: {', '.join(part for part in parts if part)}</sub>"


def _over(ratio: float) -> str:
    return f"{ratio:.2f}×" if ratio > 0.5 else f"1/{1 / ratio:.1f}"


# ------------------------------------------------------------------------------------------------ one table each


def memory(content: Content) -> str:
    """Peak memory of choosing, by method and model, and how it was held against reality."""
    rows = content["rows"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["method"], row["model"]): f"{short_bytes(row['simulated'])} ({row['over_fps']:.1f}×)" for row in rows}
    names = {"forward": "forward pass alone", "FPS": "FPS, whole batch"}
    body = [
        [names.get(method, method), *(cells.get((method, model), "–") for model in models)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    real = {row["method"]: row for row in content["reality"]}
    ours, theirs = real["FPS, micro-batches of 1"], real["GPS, cross-entropy"]
    worst = max(abs(row["simulated"] / row["real"] - 1) for row in real.values())
    ratio, overlap = theirs["real"] / ours["real"], content["overlap_of_micro_batches"]
    note = (
        f"Batch {rows[0]['batch']}. × is over FPS in micro-batches of 1; the papers state at least 9× and 18×. Simulated;\n"
        f"{ours['model']} at batch {ours['batch']} was really run, too: FPS {short_bytes(ours['real'])}, "
        f"GPS {short_bytes(theirs['real'])} ({ratio:.1f}×),\nsimulation within {worst:.2%}, and the "
        f"micro-batched choice shares {overlap:.4%} of its entries with the unbatched one."
    )
    return "\n\n".join([markdown(["", *models], body), note, source(content)])


def short_bytes(count: float) -> str:
    """Bytes with as many digits as a table needs."""
    number, unit = format_bytes(count).split()
    return f"{float(number):.2f} {unit}" if unit == "GiB" else f"{float(number):.0f} {unit}"


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def selection_time(content: Content) -> str:
    """Time of choosing over a bare forward pass."""
    body = [[row["method"], f"{row['ms']:.0f}", f"{row['over_forward']:.3f}×"] for row in content["rows"]]
    return "\n\n".join([markdown(["", "ms", "over forward"], body), source(content)])


def kernels(content: Content, every: bool = False) -> str:
    """CPU kernels against their counterparts.

    Args:
        content: of ``kernels.json``.
        every: all rows under their own names, with targets, instead of the README's choice.
    """
    head = ["", "ms", "against", "ms", "ratio", "GB moved", "of copy bandwidth"] + ["target", ""] * every
    met = {True: "met", False: "missed", None: ""}
    body = []
    for row in content["rows"]:
        if not every and (row["op"], row["against"]) not in KERNELS:
            continue
        known = (f"`{row['op']}`", f"`{row['against']}`")
        ours, theirs = known if every else KERNELS[row["op"], row["against"]]
        cells = [ours, _ms(row["ms"]), theirs, _ms(row["against_ms"]), _over(row["ratio"]), f"{row['gbytes']:.3f}"]
        cells.append(f"{row['of_copy_bandwidth']:.0%}")
        body.append(cells + [row["target"], met[row["met"]]] * every)
    made = markdown(head, body).replace("|---|---:|---:|---:|", "|---|---:|---|---:|", 1)
    return "\n\n".join([made, f"`copy_` moves {content['copy_gbytes_per_s']:.0f} GB/s there.", source(content)])


def training(content: Content, model: str | None = None) -> str:
    """Peak memory and time of a training step, one table for each model that was run, and one of those simulated.

    Args:
        content: of ``training.json``.
        model: show this one only, and nothing simulated.
    """
    parts = []
    run = [row for row in content["rows"] if not row.get("simulated")]
    for name in dict.fromkeys(row["model"] for row in run) if model is None else [model]:
        rows = [row for row in run if row["model"] == name]
        body = [
            [
                row["method"],
                f"{row['trained']:,}",
                short_bytes(row["peak_bytes"]),
                f"{row['step_ms']:.0f}",
                f"{row['time_over_full']:.2f}×",
                f"{row['time_over_lora']:.2f}×",
            ]
            for row in rows
        ]
        head = [f"{name}, batch {rows[0]['batch']}", "trained", "peak memory", "ms a step", "over full", "over LoRA"]
        parts.append(markdown(head, body))
    if model is not None:
        return "\n\n".join([*parts, source(content)])
    if simulated := [row for row in content["rows"] if row.get("simulated")]:
        models = list(dict.fromkeys(row["model"] for row in simulated))
        cells = {(row["method"], row["model"]): short_bytes(row["peak_bytes"]) for row in simulated}
        body = [
            [method, *(cells.get((method, model), "–") for model in models)]
            for method in dict.fromkeys(row["method"] for row in simulated)
        ]
        parts += [f"Peak memory at batch {simulated[0]['batch']}, simulated; every column counts as needed for `attach`:"]
        parts.append(markdown(["", *models], body))
    if shares := content.get("shares_of_time"):
        kinds = list(next(iter(shares.values())))
        body = [[model, *(f"{found[kind]:.1%}" for kind in kinds)] for model, found in shares.items()]
        parts += ["Where the time of a step with 4 entries a neuron goes:", markdown(["", *kinds], body)]
    return "\n\n".join([*parts, source(content)])


def step_at_a_glance(content: Content, model: str) -> str:
    """The few rows of :func:`training` that say what this package is for."""
    wanted = ("full", "LoRA r=8", "attach, k=4", "attach, k=4, 8 bits")
    rows = {row["method"]: row for row in content["rows"] if row["model"] == model and not row.get("simulated")}
    full = rows["full"]
    body = []
    for method in wanted:
        row = rows[method]
        share = row["peak_bytes"] / full["peak_bytes"]
        ours = method.startswith("attach")
        name = f"**{method.replace('attach, k=4', '4 entries a neuron')}**" if ours else method
        body.append([name, short_bytes(row["peak_bytes"]), f"{share:.2f}×", f"{row['time_over_full']:.2f}×"])
    head = [f"a step of {model}, batch {full['batch']}, float32", "peak memory", "of full tuning's", "its time"]
    return markdown(head, body)


def weight_sync(content: Content) -> str:
    """What goes over the wire to an inference server."""
    body = [
        [
            str(row["k"]),
            f"{row['entries']:,}",
            *(format_bytes(row[key]) for key in ("full", "first", "further")),
            f"{row['further'] / row['full']:.2%}",
            format_bytes(row["trl_file"]),
        ]
        for row in content["rows"]
    ]
    head = [
        "k",
        "entries",
        "all weights",
        "first message",
        "every further one",
        "of all weights",
        "file of TRL's delta sync",
    ]
    note = (
        "Qwen3-0.6B's sizes, bfloat16, `k` entries of each output neuron of the blocks: bytes of all weights, of the first "
        "message of a selection (positions and values), and of every further one (values)."
    )
    return "\n\n".join([note, markdown(head, body, left=0), source(content)])


def streaming(content: Content) -> str:
    """Memory of choosing from and tuning a model in its files, and in memory."""
    body = [
        [row["task"], row["way"], short_bytes(row["anonymous"]), short_bytes(row["resident"]), f"{row['seconds']:.1f}"]
        for row in content["rows"]
    ]
    note = (
        f"{short_bytes(content['weights'])} of weights. Peaks above what the process had before: *anonymous* is what it "
        "holds itself, *resident* has also what the system keeps of files and can drop. Both choose the same entries and "
        "come to the same loss."
    )
    return "\n\n".join([markdown(["", "weights", "anonymous", "resident", "s"], body), note, source(content)])


def distributed(content: Content) -> str:
    """What processes send and hold."""
    keys = ("gathered", "reduced", "held", "peak")
    head = ["model", "processes", "tuned", "sent a step: weights", "sent a step: gradients", "held", "peak"]
    body = [
        [row["model"], str(row["ranks"]), row["way"], *(short_bytes(row[key]) if key in row else "" for key in keys)]
        for row in content["rows"]
    ]
    note = (
        "Per process, float32. Rows with a peak were run and give the formula's bytes, which the other rows are from. "
        "*Sent* is what a ring sends: frozen weights are gathered as ever, gradients are those of one entry a neuron, the "
        "classifier and the biases. *Held* is what a process has between steps: pieces of weights, gradients, optimizer "
        "states, indices."
    )
    return "\n\n".join([note, markdown(head, body), source(content)])


def beside(content: Content) -> str:
    """A layer with entries beside it, and LoRA there."""
    head = ["layer of ViT-B", "k", "over the frozen layer", "LoRA over it", "over LoRA", "bytes over LoRA's"]
    body = [
        [
            f"{row['layer']} [{row['outputs']}, {row['inputs']}]",
            str(row["k"]),
            *(f"{row[key]:.2f}×" for key in ("over_frozen", "lora_over_frozen", "over_lora")),
            f"{row['bytes'] / row['lora_bytes']:.2f}×",
        ]
        for row in content["rows"]
    ]
    note = (
        f"Forward and backward of {content['tokens']} tokens, float32, {content['rank']} ranks; medians of ratios in one "
        "round. Bytes of what is trained, gradients, moments and indices."
    )
    return "\n\n".join([note, markdown(head, body), source(content)])


def keeping(content: Content) -> str:
    """Errors of gradients by what is kept, and in how many bits."""
    columns = {
        "float32": "float32",
        "float32_8_bits": "8 bits",
        "float32_4_bits": "4 bits",
        "bfloat16": "bfloat16",
        "bfloat16_8_bits": "bfloat16, 8 bits",
    }
    body = [[row["operation"], *(f"{row[key]:.1e}" for key in columns)] for row in content["rows"]]
    return "\n\n".join([markdown(["", *columns.values()], body), source(content)])


def triton(content: Content) -> str:
    """What the Triton kernels need, calculated."""
    gpus = list(content["bandwidth_bytes_per_second"])
    body = []
    for case in content["cases"]:
        occupancy = [row["occupancy_calculated"] for row in case["kernels"] if row["target"] == "sm_90"]
        times = [f"{case['least_microseconds_calculated'][gpu]:.1f}" for gpu in gpus]
        spilled = sum(row["spilled"] for row in case["kernels"])
        body.append([case["case"], f"{case['least_bytes'] / 1e6:.1f}", *times, f"{min(occupancy):.0%}", str(spilled)])
    head = ["", "MB", *(f"least µs, {gpu}" for gpu in gpus), "least occupancy, sm_90", "spilled"]
    return "\n\n".join([markdown(head, body), source({"command": "python -m benchmarks.triton_report", **content})])


# ------------------------------------------------------------------------------------------------ scaling


def exponents(content: Content, sweep: str) -> str:
    """Every method of one sweep: its values and the fitted exponents."""
    parts = []
    for quantity, unit in (("memory", ""), ("time", ", ms")):
        rows = [row for row in content["rows"] if (row["sweep"], row["quantity"]) == (sweep, quantity)]
        if not rows:
            continue
        labels = list(dict.fromkeys(row["label"] for row in rows if not row["on_paper"]))
        fits = {
            (fit["method"], fit["of"]): fit
            for fit in content["fits"]
            if (fit["sweep"], fit["quantity"]) == (sweep, quantity)
        }
        body = []
        for method in dict.fromkeys(row["method"] for row in rows):
            values = {row["label"]: row["value"] for row in rows if row["method"] == method}
            shown = [short_bytes(values[x]) if quantity == "memory" else f"{values[x]:.1f}" for x in labels]
            ofs = ("value", "beyond_weights") if quantity == "memory" else ("value",)
            body.append([method, *shown, *(_exponent(fits.get((method, of))) for of in ofs)])
        kind = "simulated" if rows[0]["simulated"] else "run"
        head = [f"{quantity}{unit} ({kind}, batch {_batches(rows)})", *labels, "exponent"]
        parts.append(markdown(head + ["beyond the weights"] * (quantity == "memory"), body))
    return "\n\n".join(parts)


def _batches(rows: list[Row]) -> str:
    found = sorted({row["batch"] for row in rows})
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def _exponent(fit: Row | None) -> str:
    if fit is None:
        return "–"
    error = fit["standard_error"]
    return f"{fit['exponent']:.2f}" + ("" if error is None else f" ± {error:.2f}")


def on_paper(content: Content) -> str:
    """The largest shapes: simulated only, beside what the fit to the smaller ones foretells."""
    fits = {
        f["method"]: f for f in content["fits"] if (f["sweep"], f["quantity"], f["of"]) == ("parameters", "memory", "value")
    }
    rows = [row for row in content["rows"] if row["on_paper"]]
    labels = {row["label"]: f"{row['label']}, {row['x'] / 1e9:.2f} billion parameters" for row in rows}
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method]
        for label in labels:
            row = next(row for row in rows if (row["method"], row["label"]) == (method, label))
            foretold = fits[method]["factor"] * row["x"] ** fits[method]["exponent"]
            cells += [short_bytes(row["value"]), short_bytes(foretold)]
        body.append(cells)
    head = ["peak memory"]
    for label in labels.values():
        head += [label, "by the power law"]
    return markdown(head, body)
