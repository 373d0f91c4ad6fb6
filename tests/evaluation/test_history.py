"""A log read back: each step once, and what a kill and a resume did to it."""

from __future__ import annotations

from pipeline.evaluation.history import read_history


def line(step: int, loss: float, attempt: int) -> dict[str, float]:
    return {"step": step, "attempt": attempt, "loss": loss, "seconds": 2.0}


def test_a_run_without_a_break() -> None:
    history = read_history([line(10, 3.0, 1), line(20, 2.0, 1)])
    assert history.curve("loss") == ([10, 20], [3.0, 2.0])
    assert history.resumed == []
    assert history.repeated == []
    assert history.largest_difference("loss") is None
    assert history.names == ["loss", "seconds"]


def test_a_resume_does_steps_again() -> None:
    """Killed after 30, resumed from a checkpoint at 10: steps 20 and 30 are logged twice."""
    log = [line(10, 3.0, 1), line(20, 2.0, 1), line(30, 1.5, 1), line(20, 2.0, 2), line(30, 1.25, 2), line(40, 1.0, 2)]
    history = read_history(log)
    assert history.curve("loss") == ([10, 20, 30, 40], [3.0, 2.0, 1.25, 1.0])
    assert history.repeated_points("loss") == ([20, 30], [2.0, 1.5])
    assert history.resumed == [30]
    assert history.largest_difference("loss") == 0.25
    assert history.seconds == 12.0


def test_two_kills_are_two_marks() -> None:
    history = read_history([line(10, 3.0, 1), line(20, 2.0, 2), line(30, 1.0, 3)])
    assert history.resumed == [10, 20]
    assert history.repeated == []


def test_long_logs_are_averaged_and_gaps_left_out() -> None:
    log = [line(step, float(step % 2), 1) for step in range(1000)] + [
        {"step": 1000, "attempt": 1, "loss": float("nan")}
    ]
    steps, values = read_history(log).curve("loss", points=100)
    assert len(steps) == 100
    assert values == [0.5] * 100
    assert steps[0] == 4.5


def test_an_empty_log() -> None:
    history = read_history([])
    assert history.names == []
    assert history.curve("loss") == ([], [])
