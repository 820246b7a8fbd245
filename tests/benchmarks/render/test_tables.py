"""What the accuracy tables show and say."""

from benchmarks.render import tables


def test_accuracy_waits_for_the_methods_that_it_is_compared_with():
    shared = {"split": "test", "dataset": "d", "k": 4, "lr": 0.1, "trained": 5, "accuracy": 0.5, "seed": 1}
    shared |= dict.fromkeys(("model", "image_size", "epochs", "batch_size", "processor", "torch", "commit", "date"), "x")
    lines = [{**shared, "method": method} for method in sorted(tables.NEEDED)]
    assert tables.accuracy(lines[1:]) is None
    table = tables.accuracy(lines)
    assert table is not None
    assert "| random | 50.0 (1) |" in table
    assert "lr d" not in table
    assert "FPS minus" not in table  # no pairs of runs yet
    tried = tables.accuracy([*lines, {**lines[0], "method": "FPS capped"}])
    assert tried == table
    twice = [{**line, "seed": seed} for line in lines for seed in (1, 2)]
    better = [{**line, "accuracy": 0.5 + 0.01 * line["seed"]} if line["method"] == "FPS" else line for line in twice]
    assert "GPS +1.5 [-4.9, +7.9] (2)" in tables.lead(better, "FPS")


def test_who_is_ahead_of_random_and_gps():
    shared = {"split": "test", "dataset": "d", "k": 4, "right": "", "total": 0}
    gains = {"random": (0.5, 0.5, 0.5), "GPS": (0.5, 0.52, 0.51), "noisy": (0.5, 0.7, 0.5), "steady": (0.6, 0.63, 0.61)}
    lines = [
        {**shared, "method": method, "seed": seed, "accuracy": value}
        for method, values in gains.items()
        for seed, value in enumerate(values)
    ]
    assert tables.clear_winners(lines).endswith(": steady of the 2 other methods.")
    lines = [line for line in lines if line["method"] != "steady"]
    assert tables.clear_winners(lines).endswith(": none of the 1 other methods.")
