"""Metrics in TensorBoard and Weights & Biases: what arrives there, and what may not stop a run."""

import importlib.util
import math
import struct
import threading
import time

import pytest

from poweropd_megatron.config.schema import TelemetryConfig
from poweropd_megatron.errors import ConfigError
from poweropd_megatron.telemetry import trackers
from poweropd_megatron.telemetry.trackers import BackgroundTracker, check_trackers, start_trackers


class Kept:
    """A tracker that keeps what it is given, and fails at a step."""

    def __init__(self, fails_at=None):
        self.given = []
        self.is_closed = False
        self.fails_at = fails_at

    def write(self, step, metrics):
        if step == self.fails_at:
            raise OSError("no space left")
        self.given.append((step, dict(metrics)))

    def close(self):
        self.is_closed = True


def test_everything_finite_arrives_in_order():
    kept, warnings = Kept(), []
    tracker = BackgroundTracker("A", lambda: kept, warnings.append)
    for step in range(100):
        tracker.write(step, {"loss": 0.5 * step, "bad": math.nan, "worse": math.inf, "none": None})
    tracker.close()
    assert kept.given == [(step, {"loss": 0.5 * step}) for step in range(100)]
    assert kept.is_closed
    assert warnings == []


@pytest.mark.parametrize("at", ["make", "write"])
def test_one_that_fails_is_warned_about_once_and_dropped(at):
    warnings, kept = [], Kept(fails_at=2)

    def make():
        if at == "make":
            raise TimeoutError("no answer")
        return kept

    tracker = BackgroundTracker("W&B", make, warnings.append)
    for step in range(5):
        tracker.write(step, {"loss": 1.0})
        time.sleep(0.02)
    tracker.close()
    why = "TimeoutError: no answer" if at == "make" else "OSError: no space left"
    end = "no more metrics go there; metrics.jsonl has them all"
    assert warnings == [f"W&B failed ({why}): {end}"]
    assert [step for step, _ in kept.given] == ([] if at == "make" else [0, 1])


@pytest.mark.parametrize("hanging", ["make", "write", "close"])
def test_one_that_hangs_holds_up_nobody(hanging):
    warnings, released = [], threading.Event()

    class Hangs(Kept):
        def write(self, step, metrics):
            super().write(step, metrics)
            if hanging == "write":
                released.wait()

        def close(self):
            released.wait()

    def make():
        if hanging == "make":
            released.wait()
        return Hangs()

    start = time.monotonic()
    tracker = BackgroundTracker("W&B", make, warnings.append)
    for step in range(1000):
        tracker.write(step, {"loss": 1.0})
    tracker.close(seconds=0.2)
    assert time.monotonic() - start < 2
    assert [text.partition(":")[0] for text in warnings] == [
        "W&B isn't done after 0.2 s, and is left behind"
    ]
    released.set()


@pytest.mark.parametrize(
    ("telemetry", "extra"),
    [
        (TelemetryConfig(tensorboard=True), "tensorboard"),
        (TelemetryConfig(wandb="offline"), "wandb"),
        (TelemetryConfig(wandb="auto"), "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(telemetry, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"poweropd_megatron\[{extra}\]"):
        check_trackers(telemetry)
    check_trackers(TelemetryConfig())


def track(telemetry, folder, *, step, steps, value):
    """Write steps as a run does that goes on after `step`; every value tells which start it is."""
    warnings = []
    found = start_trackers(telemetry, folder, step=step, settings={"seed": 1}, warn=warnings.append)
    assert len(found) == 1
    for number in steps:
        found[0].write(number, {"grad_norm": value + number, "eval/avg@4": 0.5})
    found[0].close()
    assert warnings == []


def test_no_tracker_is_started_that_is_not_asked_for(tmp_path):
    found = start_trackers(TelemetryConfig(), tmp_path, step=0, settings={}, warn=print)
    assert list(found) == []
    assert list(tmp_path.iterdir()) == []


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"grad_norm", "eval/avg@4"}
    return [(event.step, event.value) for event in events.Scalars("grad_norm")]


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    telemetry = TelemetryConfig(tensorboard=True)
    track(telemetry, tmp_path, step=0, steps=range(8), value=0)
    track(telemetry, tmp_path, step=4, steps=range(5, 11), value=100)
    expected = [(step, float(step)) for step in range(5)]
    expected += [(step, 100.0 + step) for step in range(5, 11)]
    assert read_tensorboard(tmp_path) == expected


def test_tensorboard_shows_nothing_of_a_run_that_was_started_anew(tmp_path):
    pytest.importorskip("tensorboard")
    telemetry = TelemetryConfig(tensorboard=True)
    track(telemetry, tmp_path, step=0, steps=range(3), value=0)
    track(telemetry, tmp_path, step=0, steps=range(2), value=100)
    assert read_tensorboard(tmp_path) == [(0, 100.0), (1, 101.0)]


def test_tensorboard_has_a_step_when_write_returns(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = trackers.TensorBoardTracker(tmp_path / "tensorboard", first_step=0)
    tracker.write(1, {"grad_norm": 2.0, "eval/avg@4": 0.5})
    assert read_tensorboard(tmp_path) == [(1, 2.0)]
    tracker.close()


def test_tensorboard_that_cannot_be_written_costs_a_warning(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file")
    warnings = []
    [tracker] = start_trackers(
        TelemetryConfig(tensorboard=True), tmp_path, step=0, settings={}, warn=warnings.append
    )
    tracker.write(1, {"loss": 1.0})
    tracker.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("TensorBoard failed (")


def wandb_records(path):
    """Yield the records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield b"".join(parts)
            parts = []


def read_wandb(folder):
    """Return (run id, steps) of each offline run, by what its file holds."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        run_id, steps = None, []
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                run_id = record.run.run_id
            if record.HasField("history"):
                steps.append(record.history.step.num)
        found.append((run_id, steps))
    return found


def test_wandb_offline_has_every_step_once_after_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    telemetry = TelemetryConfig(wandb="offline")
    track(telemetry, tmp_path, step=0, steps=range(8), value=0)
    track(telemetry, tmp_path, step=4, steps=range(5, 11), value=100)
    (first, before), (second, after) = read_wandb(tmp_path)
    assert first == second
    assert (before, after) == (list(range(8)), [8, 9, 10])
    track(telemetry, tmp_path, step=0, steps=range(2), value=0)
    ids = {run_id for run_id, _ in read_wandb(tmp_path)}
    assert len(ids) == 2
