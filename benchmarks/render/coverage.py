"""The tables of ``benchmarks.render`` that are about ``benchmarks.coverage``."""

from statistics import median

from benchmarks.render.tables import Content, Row, markdown, source


def _held(row: Row) -> bool:
    return not row["error"] and all(row["checks"].values())


def by_library(content: Content) -> str:
    """How many models of each library hold every check, and how much of them there is to choose from."""
    body = []
    for library in dict.fromkeys(row["family"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["family"] == library]
        shares = [row["eligible"] for row in rows if row["entries"]]
        body.append(
            [
                library,
                str(len(rows)),
                str(sum(map(_held, rows))),
                str(sum(share >= 0.95 for share in shares)),
                f"{median(shares):.1%}",
                f"{median(row['choose'] / row['pass_'] for row in rows if row['pass_']):.1f}×",
            ]
        )
    head = [
        "library",
        "models",
        "hold every check",
        "95 % eligible or more",
        "eligible, median",
        "choosing over a pass, median",
    ]
    return markdown(head, body)


def by_model(content: Content) -> str:
    """Every model."""
    body = []
    for row in content["rows"]:
        failed = [name for name, held in row["checks"].items() if not held]
        left = sorted(row["skipped"].items(), key=lambda item: -item[1])
        reasons = "; ".join(f"{share:.1%} {_short(reason)}" for reason, share in left[:2] if share > 0.01)
        body.append(
            [
                row["family"],
                f"`{row['model']}`",
                f"{row['entries'] / 1e6:.2f}",
                f"{row['eligible']:.1%}" if row["entries"] else "–",
                row["error"] or ", ".join(failed) or "all",
                f"{row['choose'] / row['pass_']:.1f}×" if row["pass_"] else "–",
                f"{row['choose'] + row['tune']:.1f}",
                reasons,
            ]
        )
    head = ["library", "model", "M entries", "eligible", "checks", "choosing over a pass", "s", "what is left out"]
    return "\n\n".join([markdown(head, body, left=2), source(content)])


def _short(reason: str) -> str:
    return reason.partition(", and was never")[0]
