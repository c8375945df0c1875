"""All ranks stop after the same step, whichever of them a signal reaches first."""

import os
import signal

import pytest
import torch.distributed as dist

from mezo_scale.distributed import signals
from mezo_scale.distributed.signals import Interrupted, Interruption, watch


def steps_until_stopped(signalled: dict[int, int], order: list[int]) -> dict[int, int]:
    """Rank -> the step it stops after. `signalled`: rank -> the step in which the signal reaches it.

    Within a step the ranks look in the given order; none ends a step before all have begun it (all-reduce).
    """
    store = dist.HashStore()
    ranks = {rank: Interruption(store) for rank in order}
    for step in range(1, 10):
        for rank in order:
            if signalled.get(rank) == step:
                ranks[rank].receive(signal.SIGUSR1)
        stopped = {rank: step for rank in order if ranks[rank].after(step)}
        if stopped:
            return stopped
    return {}


@pytest.mark.parametrize("signalled", [{0: 3}, {2: 3}, {0: 3, 1: 4, 2: 3}, {0: 4, 1: 3, 2: 5}])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_ranks_stop_together(signalled: dict[int, int], order: list[int]) -> None:
    first = min(signalled.values())
    assert steps_until_stopped(signalled, order) == dict.fromkeys(order, first + 1)


def test_a_process_alone_stops_after_the_step_in_flight() -> None:
    def steps() -> None:
        with watch(None) as interruption:
            assert interruption.after(6) == 0
            os.kill(os.getpid(), signal.SIGTERM)
            raise Interrupted(interruption.after(7))

    with pytest.raises(Interrupted) as stopped:
        steps()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert stopped.value.signal == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)  # the second of a pair finds the process still deaf
    for number in signals.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def test_a_second_signal_ends_the_process_at_once_and_an_echo_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with watch(None):
        for later_s, ended in ((0.0, []), (0.5, []), (1.5, [130])):
            now[0] = 100.0 + later_s
            os.kill(os.getpid(), signal.SIGINT)
            assert codes == ended
    assert capfd.readouterr().err.count("stopped at once by SIGINT") == 1


def test_signals_mean_what_they_did_once_the_loop_is_over() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    assert signal.SIGINT in signals.SIGNALS
    with watch(None):
        assert all(signal.getsignal(number) not in before for number in signals.SIGNALS)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
