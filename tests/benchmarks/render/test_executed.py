"""What the tables say of kernels that a CPU executed."""

from benchmarks.render import executed


def test_executed_kernels_before_and_after():
    def row(op: str, name: str, requested: int, error: float = 0.0, problems: tuple[str, ...] = ()) -> dict[str, object]:
        figures = {"requested_bytes": requested, "unique_bytes": 100, "least_bytes": 80, "instructions_per_element": 12.4}
        return {"op": op, "dtype": "bf16", "name": name, "error": error, "problems": list(problems), **figures}

    now = {
        "command": "c",
        "cases": [row("a", "small", 150), row("a", "large", 220, 3e-7, ("a race",)), row("b", "new", 100)],
    }
    before = {"command": "c", "cases": [row("a", "small", 480)]}
    lines = executed.by_case(now, before).splitlines()
    assert "| `a` bf16 small | exact | 0 | 4.80 → 1.50 | 1.25 → 1.25 | 12 → 12 |" in lines
    assert "| `b` bf16 new | exact | 0 | 1.00 | 1.25 | 12 |" in lines
    lines = executed.by_op(now).splitlines()
    assert "| `a` | 2 | 3e-07 | 1 | 1.5–2.2 | 12 |" in lines
