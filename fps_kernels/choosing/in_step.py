"""Several forward passes at once, block by block: what is brought in for one of them serves all.

Each pass has a thread of its own. One runs at a time: it goes on to the next block and waits before it, with whatever it has
computed until then, until the others have come there too. The block's weights are brought in, it is run for one pass after
the other, in their order, and the weights are let go of. Nothing has to be known of a model for that but where its blocks
are; passes that take different ways through it wait for each other where they meet.

Blocks are run by the thread that started the passes, which are left what lies between: libraries keep scratch memory for
each thread that multiplies matrices.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

from fps_kernels.weights.offloading import Presence


def in_step(
    passes: Sequence[Callable[[], None]],
    presence: Presence,
    device: torch.device,
    on_turn: Callable[[int], object] = lambda number: None,
    on_block: Callable[[nn.Module], object] = lambda block: None,
) -> None:
    """Run forward passes of a model together, without gradients.

    Each sees the modes and the autocast of the caller's thread. In a block they run in their order, so that what adds up
    over them, adds up as if one had followed the other.

    Args:
        passes: each runs the model once.
        presence: of its weights.
        device: where it runs.
        on_turn: told which pass is going to run, whenever one goes on or a block is run for it.
        on_block: told of each block that all have gone through.

    Raises:
        Exception: what the first of them raised to raise one; the others are given up.
    """
    surroundings = _Surroundings(device)
    lanes = [_Lane(run, surroundings) for run in passes]
    with ExitStack() as stack:
        for module in presence.blocks:
            stack.enter_context(_run_elsewhere(module))
        stack.enter_context(presence.shared())
        try:
            for number, lane in enumerate(lanes):
                on_turn(number)
                lane.go_on()
            while waiting := [(i, lane, lane.call.block) for i, lane in enumerate(lanes) if lane.call is not None]:
                *_, block = waiting[0]
                with presence.held(block):
                    for number, lane, its_block in waiting:
                        if its_block is block:
                            on_turn(number)
                            lane.run_block(surroundings)
                            lane.go_on()
                on_block(block)
        finally:
            for lane in lanes:
                lane.give_up()


@contextmanager
def _run_elsewhere(block: nn.Module) -> Iterator[None]:
    """Inside, a pass that comes to a block waits until it was run for it."""
    own, forward = block.__dict__.get("forward"), block.forward

    def waiting(*args: Any, **kwargs: Any) -> Any:
        lane = _Lane.current()
        if lane is None:  # the block within the one that is run, or in a thread that the model has started
            return forward(*args, **kwargs)
        return lane.wait(_Call(block, partial(forward, *args, **kwargs), _Surroundings(lane.surroundings.device)))

    block.__dict__["forward"] = waiting
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own


@dataclass
class _Call:
    """A pass waits for what a block makes of its inputs, or for the error that it raises.

    Attributes:
        block: the block.
        run: runs it.
        surroundings: of the pass.
    """

    block: nn.Module
    run: Callable[[], Any]
    surroundings: "_Surroundings"
    result: Any = None
    error: Exception | None = None


class _GivenUpError(BaseException):
    """Ends a pass that nobody waits for any more; no ``except Exception`` of a model stops it."""


class _Lane:
    """One pass, in a thread of its own that runs when it is told to.

    Attributes:
        call: of the block that it waits for; ``None`` before its start and after its end.
        surroundings: what is around it at its start.
    """

    _here = threading.local()

    def __init__(self, run: Callable[[], None], surroundings: "_Surroundings") -> None:
        self.call: _Call | None = None
        self._run, self.surroundings = run, surroundings
        self._error: BaseException | None = None
        self._is_given_up = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @classmethod
    def current(cls) -> "_Lane | None":
        """The pass that this thread runs."""
        return getattr(cls._here, "lane", None)

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._is_given_up:
                type(self)._here.lane = self
                with self.surroundings.entered():
                    self._run()
        except _GivenUpError:
            pass
        except BaseException as error:  # raised where the passes were started
            self._error = error
        finally:
            self._stopped.release()

    def go_on(self) -> None:
        """Let it run up to the next block, or to its end."""
        self.call = None
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """Let its thread end."""
        self._is_given_up = True
        self._go.release()
        self._thread.join()

    def run_block(self, surroundings: "_Surroundings") -> None:
        """Run the block that it waits for, from other surroundings."""
        assert self.call is not None
        try:
            with self.call.surroundings.entered(surroundings):
                self.call.result = self.call.run()
        except Exception as error:  # the model may expect it
            self.call.error = error

    def wait(self, call: _Call) -> Any:
        """Called in its thread: what the block returns."""
        self.call = call
        self._stopped.release()
        self._go.acquire()
        if self._is_given_up:
            raise _GivenUpError
        if call.error is not None:
            raise call.error
        return call.result


class _Surroundings:
    """What torch keeps for each thread, of the thread that makes this.

    Attributes:
        device: where a model runs.
        functions: modes that are told of functions.
        dispatch: modes that are told of operations.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        kinds = dict.fromkeys(("cpu", device.type))
        self._autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self.functions, self.dispatch = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
        self._stream: Any = None
        if device.type != "cpu" and torch.accelerator.is_available():
            self._stream = torch.accelerator.current_stream()

    @contextmanager
    def entered(self, here: "_Surroundings | None" = None) -> Iterator[None]:
        """In another thread: as in that one, without gradients.

        Args:
            here: what surrounds that thread already; nothing if ``None``.
        """
        if self._stream is not None:
            torch.accelerator.set_stream(self._stream)  # and its device
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind, dtype, enabled in self._autocast:  # a weight is used once: no copy of it is kept for a second time
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            # Entered anew, modes would begin what they do at their start once more.
            for mode in self.functions[0 if here is None else len(here.functions) :]:
                _push_function_mode(mode)
                stack.callback(_pop_function_mode)
            for mode in self.dispatch[0 if here is None else len(here.dispatch) :]:
                _push_dispatch_mode(mode)
                stack.callback(_pop_dispatch_mode)
            yield
