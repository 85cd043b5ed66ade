from kinema.config.schema import Every
from kinema.training.progress import Progress, due


def steps_when_due(every: Every, total: int, examples: int = 3, steps_per_epoch: int = 5, start: int = 0) -> list[int]:
    progress = Progress()
    found = []
    for _ in range(total):
        after = progress.after_step(examples, (progress.step + 1) / steps_per_epoch)
        if progress.step >= start and due(every, progress, after):
            found.append(after.step)
        progress = after
    return found


def test_intervals_end_where_they_should():
    assert steps_when_due(Every(every_steps=4), 13) == [4, 8, 12]
    assert steps_when_due(Every(every_epochs=1), 13) == [5, 10]
    assert steps_when_due(Every(every_epochs=0.2), 6) == [1, 2, 3, 4, 5, 6]
    assert steps_when_due(Every(every_examples=7), 8) == [3, 5, 7]
    assert steps_when_due(Every(every_steps=4, every_epochs=1), 10) == [4, 5, 8, 10]
    assert steps_when_due(Every(), 100) == []


def test_a_resumed_run_is_due_at_the_same_steps():
    every = Every(every_epochs=0.3, every_examples=10)
    whole = steps_when_due(every, 40)
    assert [s for s in whole if s > 17] == steps_when_due(every, 40, start=17)


def test_the_counters_survive_a_checkpoint():
    progress = Progress(data_start=4).after_step(3, 0.25).after_step(2, 0.5)
    assert (progress.step, progress.examples, progress.epochs, progress.data_start) == (2, 5, 0.5, 4)
    assert Progress(**progress.to_dict()) == progress
