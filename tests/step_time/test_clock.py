"""The clock: phases add up by construction, on the host's time and on a device's events."""

from __future__ import annotations

import random

import pytest

from grpo_toolkit.step_time.clock import CudaStamps, StepClock, is_readable, measure, stamps_of


class Ticks:
    """A host's clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Device:
    """A device that works behind the host, and its events, with the interface of `torch.cuda.Event`."""

    def __init__(self, host: Ticks) -> None:
        self.host = host
        self.free_at_s = 0.0
        self.waits = 0
        self.made = 0

    def launch(self, seconds: float) -> None:
        self.free_at_s = max(self.free_at_s, self.host.now_s) + seconds

    def wait(self) -> None:
        self.host.now_s = max(self.host.now_s, self.free_at_s)

    def event(self) -> Event:
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at_s: float | None = None

    def record(self) -> None:
        self.at_s = max(self.device.free_at_s, self.device.host.now_s)

    def query(self) -> bool:
        return self.at_s is not None and self.device.host.now_s >= self.at_s

    def elapsed_time(self, end: Event) -> float:
        assert self.query()
        assert end.query(), "reading an event that was not reached waits for the device"
        assert self.at_s is not None
        assert end.at_s is not None
        return (end.at_s - self.at_s) * 1e3

    def synchronize(self) -> None:
        self.device.waits += 1


def test_each_moment_belongs_to_one_path() -> None:
    host = Ticks()
    clock = StepClock(now=host)
    clock.switch("rows")
    host.now_s = 2.0
    clock.switch("forward")
    host.now_s = 3.0
    clock.enter("forward", "vision")
    host.now_s = 7.0
    clock.leave()
    host.now_s = 8.0
    clock.switch("backward")
    host.now_s = 10.5
    found = measure(clock.take(), None)
    assert found.wall_s == 10.5
    assert found.paths_s == {
        ("other",): 0.0,
        ("rows",): 2.0,
        ("forward",): 2.0,
        ("forward", "vision"): 4.0,
        ("backward",): 2.5,
    }
    assert not found.is_stamped


def test_what_is_entered_goes_on_while_the_outside_switches() -> None:
    host = Ticks()
    clock = StepClock(now=host)
    clock.enter("rollout", "prefill")
    host.now_s = 1.0
    clock.switch("forward")
    host.now_s = 2.0
    clock.move_on("rollout", "decode")
    host.now_s = 5.0
    clock.leave()
    host.now_s = 6.0
    assert measure(clock.take(), None).paths_s == {
        ("other",): 0.0,
        ("rollout", "prefill"): 2.0,
        ("rollout", "decode"): 3.0,
        ("forward",): 1.0,
    }


def test_a_name_that_is_known_afterwards_and_a_border_in_the_past() -> None:
    host = Ticks()
    clock = StepClock(now=host)
    host.now_s = 1.0
    clock.switch("rows")
    border = clock.closed
    host.now_s = 4.0
    clock.rename("saving")
    clock.switch("rows")
    host.now_s = 5.0
    assert [one.path for one in clock.take(border)] == [("other",)]
    assert measure(clock.take(), None).paths_s == {("other",): 0.0, ("saving",): 3.0, ("rows",): 1.0}


def test_leaving_what_was_not_entered_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing was entered"):
        StepClock().leave()


def test_any_order_of_calls_adds_up() -> None:
    rng = random.Random(0)
    host = Ticks()
    clock = StepClock(now=host)
    for _ in range(500):
        host.now_s += rng.random()
        call = rng.choice(["switch", "enter", "leave", "move_on", "rename"])
        path = rng.choice([("a",), ("b", "c"), ("d",)])
        if call == "leave":
            if len(clock._stack) > 1:
                clock.leave()
        else:
            getattr(clock, call)(*path)
    found = measure(clock.take(), None)
    assert sum(found.paths_s.values()) == pytest.approx(host.now_s)
    assert found.wall_s == pytest.approx(host.now_s)
    assert found.paths_s["other",] == pytest.approx(0.0, abs=1.0)


def test_events_give_each_phase_the_devices_time_without_waiting() -> None:
    host = Ticks()
    device = Device(host)
    stamps = CudaStamps(device.event)
    clock = StepClock(now=host, stamps=stamps)
    clock.is_stamping = True
    clock.switch("forward")
    device.launch(5.0)
    host.now_s += 0.1  # the host has launched it and is gone
    clock.switch("backward")
    device.launch(10.0)
    host.now_s += 0.1
    clock.switch("optimizer")
    device.launch(1.0)
    clock.switch("rewards")
    device.wait()  # the loss is read
    host.now_s += 3.0
    clock.switch("rows")
    intervals = clock.take()
    found = measure(intervals[1:], stamps)
    assert found.is_stamped
    assert found.wall_s == pytest.approx(19.0)
    assert found.paths_s["forward",] == pytest.approx(5.0)
    assert found.paths_s["backward",] == pytest.approx(10.0)
    assert found.paths_s["optimizer",] == pytest.approx(1.0)
    assert found.paths_s["rewards",] == pytest.approx(3.0)
    assert found.paths_s["other",] == pytest.approx(0.0)
    assert device.waits == 0

    by_host = measure([one for one in intervals[1:]], None)  # noqa: C416
    assert by_host.paths_s["forward",] == pytest.approx(0.1), "the host alone would blame the wrong phase"


def test_a_step_is_read_when_the_device_got_there_and_its_events_are_used_again() -> None:
    host = Ticks()
    device = Device(host)
    stamps = CudaStamps(device.event)
    clock = StepClock(now=host, stamps=stamps)
    clock.is_stamping = True
    clock.switch("forward")
    device.launch(5.0)
    intervals = clock.take()
    assert not is_readable(intervals, stamps)
    device.wait()
    assert is_readable(intervals, stamps)
    measure(intervals[1:], stamps)
    stamps.give_back(stamps_of(intervals))
    made = device.made
    clock.switch("backward")
    assert device.made == made
    assert clock.take()[0].begin is intervals[-1].end, "the mark that two steps share was not given back"
