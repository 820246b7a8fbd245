"""Tables of the Triton kernels that a CPU executed, of what ``python -m kernel_lab.ptx --json`` wrote."""

from benchmarks.render.tables import Content, Row, markdown, source


def by_case(content: Content, before: Content | None = None) -> str:
    """What the compiled Triton kernels did when a CPU executed them, and the same of earlier kernels beside it."""
    earlier = {} if before is None else {_case(row): row for row in before["cases"]}

    def figures(row: Row) -> tuple[str, str, str]:
        requested, unique = row["requested_bytes"], row["unique_bytes"]
        least = f"{unique / row['least_bytes']:.2f}"
        return f"{requested / unique:.2f}", least, f"{row['instructions_per_element']:.0f}"

    body = []
    for row in content["cases"]:
        now = figures(row)
        if then := earlier.get(_case(row)):
            now = tuple(f"{was} → {has}" for was, has in zip(figures(then), now, strict=True))
        exact = "exact" if row["error"] == 0 else f"{row['error']:.0e}"
        body.append([f"`{row['op']}` {row['dtype']} {row['name']}", exact, str(len(row["problems"])), *now])
    head = ["", "deviation", "problems", "sectors requested / distinct", "distinct / least bytes", "instructions an element"]
    return "\n\n".join([markdown(head, body), source(content)])


def by_op(content: Content) -> str:
    """Each op over its large cases in bfloat16: the worst deviation, and from the least to the most of what was counted."""
    ops: dict[str, list[Row]] = {}
    for row in content["cases"]:
        if row["dtype"] == "bf16":
            ops.setdefault(row["op"], []).append(row)
    body = []
    for op, rows in ops.items():
        worst = max(row["error"] for row in rows)
        ratios = [row["requested_bytes"] / row["unique_bytes"] for row in rows]
        instructions = [row["instructions_per_element"] for row in rows]
        problems = sum(len(row["problems"]) for row in rows)
        spread = _range(ratios, ".1f"), _range(instructions, ".0f")
        body.append([f"`{op}`", str(len(rows)), "exact" if worst == 0 else f"{worst:.0e}", str(problems), *spread])
    head = ["bfloat16, sm_90", "cases", "deviation", "problems", "sectors requested / distinct", "instructions an element"]
    return "\n\n".join([markdown(head, body), source(content)])


def _range(numbers: list[float], how: str) -> str:
    ends = dict.fromkeys((format(min(numbers), how), format(max(numbers), how)))
    return "–".join(ends)


def _case(row: Row) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["name"]
