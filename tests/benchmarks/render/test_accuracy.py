"""What the accuracy tables show and say."""

from benchmarks.render import accuracy


def test_accuracy_waits_for_the_methods_that_it_is_compared_with():
    shared = {"split": "test", "dataset": "d", "k": 4, "lr": 0.1, "trained": 5, "accuracy": 0.5, "seed": 1}
    shared |= dict.fromkeys(("model", "image_size", "epochs", "batch_size", "processor", "torch", "commit", "date"), "x")
    lines = [{**shared, "method": method} for method in sorted(accuracy.NEEDED)]
    assert accuracy.accuracy(lines[1:]) is None
    table = accuracy.accuracy(lines)
    assert table is not None
    assert "| random | 50.0 (1) |" in table
    assert "lr d" not in table
    assert "FPS minus" not in table  # no pairs of runs yet
    tried = accuracy.accuracy([*lines, {**lines[0], "method": "FPS capped"}])
    assert tried == table
    twice = [{**line, "seed": seed} for line in lines for seed in (1, 2)]
    better = [{**line, "accuracy": 0.5 + 0.01 * line["seed"]} if line["method"] == "FPS" else line for line in twice]
    assert "GPS +1.5 [-4.9, +7.9] (2)" in accuracy.lead(better, "FPS")


def test_who_is_ahead_of_random_and_gps():
    shared = {"split": "test", "dataset": "d", "k": 4, "right": "", "total": 0}
    gains = {"random": (0.5, 0.5, 0.5), "GPS": (0.5, 0.52, 0.51), "noisy": (0.5, 0.7, 0.5), "steady": (0.6, 0.63, 0.61)}
    lines = [
        {**shared, "method": method, "seed": seed, "accuracy": value}
        for method, values in gains.items()
        for seed, value in enumerate(values)
    ]
    assert accuracy.clear_winners(lines).endswith(": steady of the 2 other methods.")
    lines = [line for line in lines if line["method"] != "steady"]
    assert accuracy.clear_winners(lines).endswith(": none of the 1 other methods.")


def test_fewer_bits_stand_beside_the_same_method_with_all_and_nowhere_else():
    shared = {"split": "test", "dataset": "d", "k": 4, "lr": 0.1, "trained": 5, "bits": "ff0", "total": 12}
    shared |= dict.fromkeys(("model", "image_size", "epochs", "batch_size", "processor", "torch", "commit", "date"), "x")
    lines = [
        {**shared, "method": method, "seed": seed, "accuracy": 0.5 + 0.01 * seed + gain}
        for method, gain in {"FPS": 0.0, "FPS, 8 bits": 0.02, "random": 0.1}.items()
        for seed in (1, 2, 3)
    ]
    found = accuracy.fewer_bits(lines)
    assert found is not None
    assert "| FPS, 8 bits | 54.0 ± 0.6 / 52.0 ± 0.6 | FPS | +2.0 [+2.0, +2.0] (3) | ± 0.0 |" in found
    assert {line["method"] for line in accuracy.in_all_bits(lines)} == {"FPS", "random"}
    assert accuracy.fewer_bits([line for line in lines if line["method"] != "FPS, 8 bits"]) is None
