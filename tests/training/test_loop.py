from dataclasses import dataclass

from kinema.errors import UserError
from kinema.optim.scale import LossScale
from kinema.training.loop import NON_FINITE_LIMIT, _count_non_finite


@dataclass
class Counting:
    """What counting touches of a Trainer."""

    scale: LossScale | None
    non_finite: int = 0
    release: None = None


def steps_until_refused(trainer: Counting) -> int:
    for step in range(200):
        if trainer.scale is not None:
            trainer.scale.update(False)
        try:
            _count_non_finite(trainer, False, step)
        except UserError as error:
            assert f"{step + 1} steps in a row" in str(error)
            return step + 1
    raise AssertionError("never refused")


def test_gradients_that_stay_not_finite_end_the_run():
    assert steps_until_refused(Counting(None)) == NON_FINITE_LIMIT
    assert steps_until_refused(Counting(LossScale(initial=2.0**16))) == NON_FINITE_LIMIT  # at 2 ** -4
    assert steps_until_refused(Counting(LossScale(initial=2.0**30))) == 31  # a scale on its way down is given time


def test_a_finite_gradient_starts_the_count_afresh():
    trainer = Counting(None)
    for step in range(NON_FINITE_LIMIT - 1):
        _count_non_finite(trainer, False, step)
    _count_non_finite(trainer, True, NON_FINITE_LIMIT)
    assert trainer.non_finite == 0
