"""The learning rate is a pure function of the step."""

import pytest

from pipeline.training.config import OptimizerConfig, ScheduleConfig
from pipeline.training.schedule import learning_rate_factor

STEPS = 100


@pytest.mark.parametrize("kind", ["constant", "polynomial", "cosine", "tri_stage"])
def test_warmup_rises_in_a_straight_line_to_the_peak(kind):
    schedule = ScheduleConfig(kind=kind, warmup_steps=9)
    factors = [learning_rate_factor(schedule, step, STEPS) for step in range(10)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("constant", 1.0, 1.0), ("polynomial", 0.6, 0.2), ("cosine", 0.6, 0.2), ("tri_stage", 0.2**0.5, 0.2)],
)
def test_decay_ends_at_the_final_factor(kind, middle, last):
    schedule = ScheduleConfig(kind=kind, final_factor=0.2)
    assert learning_rate_factor(schedule, 50, 101) == pytest.approx(middle)
    assert learning_rate_factor(schedule, 100, 101) == pytest.approx(last)


def test_step_falls_at_its_milestones():
    schedule = ScheduleConfig(kind="step", warmup_steps=4, milestones=(30, 60), factor=0.1)
    steps = (0, 4, 29, 30, 59, 60, 99)
    assert [learning_rate_factor(schedule, step, STEPS) for step in steps] == pytest.approx(
        [0.2, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "step"}, "use steps that rise"),
        ({"kind": "step", "milestones": (60, 30)}, "use steps that rise"),
        ({"kind": "step", "milestones": (10,), "warmup_steps": 10}, "come after warmup_steps=10"),
        ({"kind": "cosine", "milestones": (10,)}, "mean nothing for kind=cosine"),
    ],
)
def test_milestones_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**values)


def test_momentum_belongs_to_sgd():
    with pytest.raises(ValueError, match=r"momentum=0.9 means nothing for kind=adamw"):
        OptimizerConfig(momentum=0.9)
    assert [OptimizerConfig(kind="sgd", momentum=momentum).moments for momentum in (0.0, 0.9)] == [0, 1]


def test_tri_stage_holds_the_peak():
    schedule = ScheduleConfig(kind="tri_stage", warmup_steps=10, hold_steps=20)
    assert [learning_rate_factor(schedule, step, STEPS) for step in (10, 29)] == [1.0, 1.0]
    assert learning_rate_factor(schedule, 40, STEPS) < 1.0


def test_decay_never_rises():
    for kind in ("polynomial", "cosine", "tri_stage"):
        schedule = ScheduleConfig(
            kind=kind, warmup_steps=5, final_factor=0.1, power=2.0 if kind == "polynomial" else 1.0
        )
        factors = [learning_rate_factor(schedule, step, STEPS) for step in range(5, STEPS)]
        assert factors == sorted(factors, reverse=True)


def test_hold_steps_belong_to_tri_stage():
    with pytest.raises(ValueError, match="hold_steps=5 means nothing for kind=cosine"):
        ScheduleConfig(kind="cosine", hold_steps=5)
