"""Periodic tasks are due at their times, and throttled tasks at once and then after pauses."""

import math

from sortd.core.schedule import PeriodicTimer, Throttle


def test_periodic_timer_is_due_at_once_and_then_periodically() -> None:
    """A task that was put off is due later."""
    timer = PeriodicTimer()
    assert timer.next_deadline() == math.inf
    assert timer.is_due("scan", 10.0, 5.0)
    assert not timer.is_due("scan", 14.9, 5.0)
    assert timer.next_deadline() == 15.0
    timer.put_off("scan", 20.0)
    assert not timer.is_due("scan", 15.0, 5.0)
    assert timer.is_due("scan", 20.0, 5.0)


def test_throttle_first_request_is_due_at_once_and_one_task_serves_all() -> None:
    """Nothing is due before a request, nor again after the task began."""
    throttle = Throttle(1.0)
    assert not throttle.is_due(0.0)
    for _ in range(3000):
        throttle.ask()
    assert throttle.is_due(0.0)
    throttle.begin(0.0)
    throttle.end(0.01)
    assert not throttle.is_due(100.0)
    assert throttle.deadline == math.inf


def test_throttle_pauses_longer_after_a_long_task() -> None:
    """A task that takes ten seconds is not due again after one."""
    throttle = Throttle(1.0)
    throttle.begin(0.0)
    throttle.ask()
    throttle.end(0.01)
    assert (throttle.is_due(1.0), throttle.is_due(1.01)) == (False, True)
    throttle.begin(2.0)
    throttle.ask()
    throttle.end(12.0)
    assert (throttle.is_due(100.0), throttle.is_due(102.0)) == (False, True)
