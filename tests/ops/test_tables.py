"""Tables on a device are copied once, are never made inside of a capture, and do not add up."""

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fps_kernels.ops.records import AdamWOptions, AdamWTensors
from fps_kernels.ops.triton import PreparedAdamW, launching, masked_adamw_, tables
from tests.support.pretended_gpu import DEVICE, pretended_gpu


class Streams:
    """Streams and captures that a test controls, and the copies that were made."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.copies = "first", False, []
        self.waits, self.recorded = [], []
        fake = self

        class Stream:
            def __init__(self):
                self.cuda_stream = fake.current

            def __eq__(self, other):
                return self.cuda_stream == other.cuda_stream

            __hash__ = None

            def record_event(self):
                return f"copied on {self.cuda_stream}"

            def wait_event(self, event):
                fake.waits.append((self.cuda_stream, event))

        def staged(values):
            fake.copies.append(values.tolist())
            return torch.frombuffer(values, dtype=torch.int64).pin_memory()

        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: self.capturing, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.current, raising=False)
        monkeypatch.setattr(torch._subclasses.FakeTensor, "record_stream", lambda t, s: self.recorded.append(s.cuda_stream))
        monkeypatch.setattr(tables, "_staged", staged)


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(tables, "_cache", tables.TableCache(tables.MOST_BYTES))
    monkeypatch.setattr(tables, "_captured", tables.CapturedTables())
    with pretended_gpu() as gpu, gpu.waiting(0), monkeypatch.context() as patch:
        yield Streams(patch)


def memory():
    return torch.empty(4, device="cuda")


def numbers(*values):
    return np.array(values, dtype=np.int64)


# ------------------------------------------------------------------------------------------------ the cache


def test_a_table_is_copied_once_and_other_streams_wait_for_it(streams):
    table = tables.device_table((1, 2, 3), DEVICE)
    assert tables.device_table((1, 2, 3), DEVICE) is table
    assert (streams.copies, streams.waits) == ([[1, 2, 3]], [])
    tables.block_map(((0, 2), (1, 0), (2, 1)), DEVICE)
    assert streams.copies[1:] == [[0, 1, 2 << 32]]
    streams.current = "second"
    assert tables.device_table((1, 2, 3), DEVICE) is table
    assert (streams.waits, streams.recorded) == ([("second", "copied on first")], ["second"])


def test_nothing_is_copied_inside_a_capture(streams):
    table = tables.device_table((1, 2, 3), DEVICE)
    streams.capturing = True
    assert tables.device_table((1, 2, 3), DEVICE) is table
    with pytest.raises(RuntimeError, match="warm-up step"):
        tables.device_table((4,), DEVICE)
    assert len(streams.copies) == 1


def test_what_was_not_used_for_longest_goes_first(streams, monkeypatch):
    monkeypatch.setattr(tables, "_cache", tables.TableCache(10 * 8))
    for n in range(10):
        tables.device_table((n,), DEVICE)
    tables.device_table((0,), DEVICE)
    tables.device_table((10,), DEVICE)
    assert len(tables._cache) == 10
    before = len(streams.copies)
    tables.device_table((0,), DEVICE)
    assert len(streams.copies) == before
    tables.device_table((1,), DEVICE)
    assert len(streams.copies) == before + 1
    large = tables.device_table(tuple(range(100)), DEVICE)  # more than all that may be kept: it is, until the next
    assert (len(tables._cache), tables.device_table(tuple(range(100)), DEVICE) is large) == (1, True)


def test_a_table_that_a_graph_has_is_found_again_and_kept_once(streams, monkeypatch):
    monkeypatch.setattr(tables, "_cache", tables.TableCache(10 * 8))
    table = tables.device_table((1, 2, 3), DEVICE)
    for _ in range(3):
        streams.capturing = True
        assert tables.device_table((1, 2, 3), DEVICE) is table
        streams.capturing = False
        for n in range(50):
            tables.device_table((n,), DEVICE)
        assert len(tables._cache) == 10 + 1  # it does not count
    assert streams.copies.count([1, 2, 3]) == 1


def test_threads_that_want_the_same_table_share_one(streams):
    found, start = [], threading.Barrier(8)

    def want():
        start.wait()
        found.append([tables._cache.get(((n,), DEVICE), lambda n=n: (n,)) for n in range(50)])

    with pytest.MonkeyPatch.context() as patch:  # fakes belong to the thread that entered their mode
        copy = SimpleNamespace(to=lambda device, non_blocking: torch.zeros(1, dtype=torch.int64))
        patch.setattr(tables, "_staged", lambda values: streams.copies.append(values.tolist()) or copy)
        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    assert all(mine is theirs for other in found for mine, theirs in zip(found[0], other, strict=True))
    assert sorted(streams.copies) == [[n] for n in range(50)]


# ------------------------------------------------------------------------------------------------ tables of one's own


def test_a_table_of_ones_own_is_written_in_place_unless_a_graph_has_it(streams):
    table = tables.OwnTable((1, 2), memory())
    first = table.read()
    table.write(numbers(3, 4))
    assert (streams.copies, table.read() is first, streams.waits) == ([[1, 2], [3, 4]], True, [])
    streams.current = "second"
    assert table.read() is first
    assert (streams.waits, streams.recorded) == ([("second", "copied on first")], ["second"])
    streams.capturing = True
    assert table.read() is first
    assert table.read() is first
    with pytest.raises(RuntimeError, match="warm-up step"):
        table.write(numbers(5, 6))
    streams.capturing = False
    table.write(numbers(5, 6))
    assert table.read() is not first
    assert len(tables._captured) == 1


def test_graphs_of_the_same_numbers_share_a_table(streams):
    """Whoever captures again and again, with numbers that come again, keeps as many tables as there are numbers."""
    where = memory()
    table = tables.OwnTable((0, 0), where)
    for turn in range(20):
        table.write(numbers(1, turn % 2))
        streams.capturing = True
        table.read()
        streams.capturing = False
        assert len(tables._captured) == min(turn + 1, 2)
    assert len(streams.copies) == 1 + 2
    streams.capturing = True
    tables.OwnTable.read(table)
    streams.capturing = False
    copies = len(streams.copies)
    other = tables.OwnTable((1, 1), where)  # as an optimizer makes that works out its step anew
    assert (other.read() is table.read(), len(streams.copies)) == (True, copies)


def test_a_captured_table_lives_as_long_as_the_memory_it_points_to(streams):
    where = memory()
    table = tables.OwnTable((1, 2), where)
    streams.capturing = True
    table.read()
    streams.capturing = False
    del table
    gc.collect()
    assert len(tables._captured) == 1  # the graph may be replayed
    view = where[1:]
    del where
    gc.collect()
    assert len(tables._captured) == 1
    del view
    gc.collect()
    assert len(tables._captured) == 0


# ------------------------------------------------------------------------------------------------ optimizers


def tensors(count=20):
    def there(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    one = there(64, 32), there(40), there(65, dtype=torch.int32), there(40, dtype=torch.int32)
    parts = (*one, there(40), there(40), there(40), there(), there(40))
    return AdamWTensors(*([part.clone() for _ in range(count)] for part in parts))


def options(lrs):
    return AdamWOptions(lrs, [0.0] * 20, 0.9, 0.999, 1e-8, False, None, None, False)


def test_nine_optimizers_that_take_turns_copy_their_tables_once(streams):
    lrs = torch.empty(20, dtype=torch.float64, device="cuda")
    optimizers = [tensors() for _ in range(9)]
    for _ in range(5):
        for one in optimizers:
            masked_adamw_(one, options(lrs))
    assert len(streams.copies) == 9 * 2 + 1  # what stays and what may change; the map is the same for all


def test_nine_prepared_steps_copy_what_changed_only(streams):
    optimizers = [tensors() for _ in range(9)]
    steps = [PreparedAdamW(one) for one in optimizers]
    copies = len(streams.copies)
    for number in range(5):
        for step, one in zip(steps, optimizers, strict=True):
            step.run(one.grads, options([0.1 / (1 + number)] * 20))
    assert len(streams.copies) == copies + 9 * 5
    for step, one in zip(steps, optimizers, strict=True):
        step.run(one.grads, options([0.1 / 5] * 20))
    assert len(streams.copies) == copies + 9 * 5


def test_steps_that_are_captured_in_turn_do_not_add_up(streams):
    one = tensors()
    for _ in range(4):
        step = PreparedAdamW(one)
        step.run(one.grads, options([0.1] * 20))
        streams.capturing = True
        step.run(one.grads, options([0.1] * 20))
        streams.capturing = False
        assert len(tables._captured) == 3
    copies = len(streams.copies)
    step.run(one.grads, options([0.2] * 20))
    assert len(streams.copies) == copies + 1
    del one, step
    gc.collect()
    assert len(tables._captured) == 0


def test_plans_are_noted_and_found_by_threads(monkeypatch):
    """Of more shapes than are kept, so that they are forgotten meanwhile; what is found is always what belongs there."""
    monkeypatch.setattr(launching, "MOST_PLANS", 10)
    plans, wrong, start = launching.Plans(), [], threading.Barrier(8)

    def work():
        start.wait()
        for n in range(2000):
            found = plans.find(n % 17)
            if found is None:
                plans.note(n % 17, (n % 17, "plan"))
            elif found != (n % 17, "plan"):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launching._all_plans.remove(plans)
    assert not wrong
    assert len(plans._plans) <= 10
