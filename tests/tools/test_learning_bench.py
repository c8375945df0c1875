"""What the learning bench makes of the curves of finished runs."""

import pytest

from tools.learning_bench import Learned, best, crossing, table


@pytest.mark.parametrize(
    ("curve", "rows"),
    [
        ([(320, 0.7), (640, 0.6)], 480),  # halfway
        ([(320, 0.65), (640, 0.6)], 320),
        (
            [(320, 0.6), (640, 0.7)],
            320,
        ),  # that it rises again is not hidden: `last` says so
        ([(320, 0.7), (640, 0.66)], None),
        ([(320, 0.66), (640, 0.67), (960, 0.63)], 800),
    ],
)
def test_the_rows_to_a_loss_lie_on_the_line_between_two_evaluations(
    curve: list[tuple[float, float]], rows: float | None
) -> None:
    found = crossing(curve, 0.65)
    assert found == (None if rows is None else pytest.approx(rows))


def test_each_method_stands_with_its_own_best_rate() -> None:
    def at(method: str, lr: float, rows: float | None, last: float) -> Learned:
        return Learned(method, lr, 4, rows, last, 0.01, 2.0, [])

    found = [at("plain", 1e-5, None, 0.60), at("plain", 1e-4, 900, 0.70), at("plain", 2e-4, 1200, 0.5)]
    found += [at("other", 1e-5, None, 0.70), at("other", 1e-4, None, 0.68)]
    chosen = best(found)
    assert [(one.method, one.lr) for one in chosen] == [("plain", 1e-4), ("other", 1e-4)]
    assert "| plain | 0.0001 | 900 | 1.00 | 0.7000 ± 0.0100 | 4 | 2.00 |" in table(chosen, 0.65)
    assert "| other | 0.0001 | not reached |  |" in table(chosen, 0.65)
