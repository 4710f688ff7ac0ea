"""engine.profile: what it measures holds together, ends when it should, and changes nothing."""

import gc
import json
import logging
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

import zerograph
from tests.models import batch_for, loss_of, make
from tests.oracle import config_for
from tests.ranks import outcomes_of, run_ranks
from zerograph.engine import Engine
from zerograph.errors import PlanError
from zerograph.measured import CallEntry, Measured, StretchEntry
from zerograph.runtime.run import execute

STEPS = 3


def step(engine: Engine, rank: int) -> None:
    engine.backward(loss_of(engine(**batch_for("llama", rank))))
    engine.step()


def values(engine: Engine) -> list[Any]:
    """The state of this rank, to the bit."""
    storages = engine.state.storages.values()
    held = [t for s in storages for t in (s.shard, s.master, *s.states.values()) if t is not None]
    return [t.numpy().tobytes() for t in held]


def _profiled(rank: int, world: int, stage: int, folder: str) -> dict[str, Any]:
    plain = zerograph.compile(make("llama"), config_for(stage))
    for _ in range(STEPS + 2):
        step(plain, rank)
    engine = zerograph.compile(make("llama"), config_for(stage))
    step(engine, rank)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zerograph").addHandler(handler)
    logging.getLogger("zerograph").setLevel(logging.INFO)
    profile = engine.profile(STEPS)
    with pytest.raises(PlanError, match=f"seen 0 of {STEPS} updates"):
        print(profile)
    for _ in range(STEPS):
        assert engine._run.execute == engine._updates.execute == profile.execute
        step(engine, rank)
    assert engine._run.execute is engine._updates.execute is execute, "off again"
    before = profile.measured
    step(engine, rank)
    assert profile.measured is before, "what runs later is not in it"
    profile.save(f"{folder}/{rank}.json")
    planned = {name: t.nbytes for name, t in engine.plan.traffic.items()}
    signature = Counter(tuple(line.split()[:4]) for line in engine.plan.signature())
    return {
        "measured": before,
        "text": str(profile),
        "lines": lines,
        "planned": planned,
        "signature": signature,
        "same": values(engine) == values(plain),
        "end": engine.plan.timeline("cpu").seconds,
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_measured_holds_together(stage: int, tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(2, _profiled, stage, str(tmp_path))):
        measured = found["measured"]
        assert (measured.rank, measured.world, measured.stage) == (rank, 2, stage)
        assert measured.steps == STEPS
        assert found["same"], "numerics are the same, bit for bit"
        _is_of_the_plan(measured, found["planned"], found["signature"])
        _is_consistent(measured)
        assert found["lines"] == ([f"{measured.line()} over {STEPS} steps"] if rank == 0 else [])
        assert measured.line().startswith("communication ") and "hidden" in measured.line()
        for each in measured.collectives:
            assert each.kind in found["text"] and each.bucket in found["text"]
        _is_drawn(measured, json.loads((tmp_path / f"{rank}.json").read_text()), found["end"])


def _is_of_the_plan(measured: Measured, planned: dict[str, int], signature: Counter[Any]) -> None:
    """Each collective of the plan, once a step, with its bytes."""
    for kind, nbytes in planned.items():
        assert sum(c.nbytes for c in measured.collectives if c.kind == kind) == STEPS * nbytes
        sent = sum(c.sent for c in measured.collectives if c.kind == kind)
        around = 2 if kind in ("all_reduce", "any_rank", "sum_weights") else 1
        assert sent == STEPS * around * nbytes / 2
    calls: Counter[Any] = Counter()
    for c in measured.collectives:
        calls[c.region, c.kind, c.bucket or "-", str(c.nbytes // c.calls)] += c.calls
    assert calls == Counter({line: STEPS * count for line, count in signature.items()})


def _is_consistent(measured: Measured) -> None:
    for each in measured.collectives:
        assert 0 <= each.waited <= each.seconds
        assert 0 <= each.hidden <= 1 and each.bandwidth > 0
        if each.kind in ("gather", "refresh", "reduce_scatter"):
            assert each.seen == each.calls, "of what goes over channels every end is seen"
    assert 0 <= measured.waited <= measured.communication <= measured.seconds + 1e-3
    assert measured.waited == pytest.approx(sum(c.waited for c in measured.collectives))
    assert measured.communication <= sum(c.seconds for c in measured.collectives) + 1e-9
    for call in measured.calls:
        for start, end in call.waits:
            assert call.start <= start <= end <= call.end
    for one, other in pairwise(measured.stretches):
        assert one.end <= other.start
    assert [s.region for s in measured.stretches] == ["forward", "backward", "step"] * STEPS


def _is_drawn(measured: Measured, trace: dict[str, Any], predicted: float) -> None:
    """Both processes, and slices of which none overlaps another in its thread."""
    events = trace["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert names == {"predicted": 1, f"measured on rank {measured.rank}": 2}
    slices = sorted(
        (e for e in events if e["ph"] == "X"), key=lambda e: (e["pid"], e["tid"], e["ts"])
    )
    for one, other in pairwise(slices):
        if (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.002
    of = {pid: [e for e in slices if e["pid"] == pid] for pid in (1, 2)}
    assert max(e["ts"] + e["dur"] for e in of[1]) >= 1e6 * predicted - 1
    drawn = Counter(e["name"] for e in of[2] if e["tid"] >= 200)
    assert drawn == Counter(f"zero.{call.kind}" for call in measured.calls)
    assert {"forward", "backward", "step"} <= {e["name"] for e in of[2] if e["tid"] == 100}
    assert any(e["name"].startswith("wait ") for e in of[2])


def _late(rank: int, world: int) -> list[Measured]:
    """Rank 1 comes late to every backward: rank 0 has to wait for what needs it, and says so."""
    engine = zerograph.compile(make("llama"), config_for(2))
    step(engine, rank)
    with engine.profile(100) as profile:
        for _ in range(2):
            loss = loss_of(engine(**batch_for("llama", rank)))
            if rank == 1:
                time.sleep(0.2)
            engine.backward(loss)
            engine.step()
    return [profile.measured]


def test_time_that_is_waited_is_seen() -> None:
    (early,), (late,) = run_ranks(2, _late)
    reductions = [c for c in early.collectives if c.kind == "reduce_scatter"]
    assert sum(c.waited for c in reductions) > 0.3, "two times 0.2 s"
    assert early.communication > 0.3 and early.hidden < 0.7
    assert late.waited < 0.2
    assert early.steps == late.steps == 2


def _one(rank: int, world: int) -> bool:
    """Only rank 0 profiles, with a backward whose collectives are those of the others."""
    engine = zerograph.compile(make("llama"), config_for(3))
    profile = engine.profile(1) if rank == 0 else None
    for _ in range(2):
        step(engine, rank)
    return profile is None or (len(profile.collectives) > 3 and profile.done == 1)


def test_one_rank_may_profile_alone() -> None:
    assert run_ranks(2, _one) == [True, True]


def _lost(rank: int, world: int) -> str:
    """Rank 1 leaves while rank 0 profiles; what rank 0 hears, and that it goes on."""
    engine = zerograph.compile(make("llama"), config_for(3))
    step(engine, rank)
    if rank == 1:
        return "left"
    with pytest.raises(zerograph.errors.CommunicationError) as raised, engine.profile(5) as profile:
        step(engine, rank)
    assert engine._run.execute is execute and not profile.running
    assert isinstance(profile.collectives, tuple)
    return str(raised.value)


def test_a_lost_rank_is_named_as_without_a_profile() -> None:
    (kind, said), _ = outcomes_of(2, _lost, collectives=5.0, timeout=60)
    assert kind == "value", said
    assert said.startswith("rank 0: the gather of bucket b")


def test_of_one_rank_there_is_no_communication(tmp_path: Path) -> None:
    engine = zerograph.compile(make("llama"), config_for(3))
    with engine.profile(1) as nothing:
        pass
    assert nothing.collectives == () and nothing.measured.steps == 0
    profile = engine.profile(1)
    with pytest.raises(PlanError, match="recorded or profiled already"):
        engine.profile(1)
    with pytest.raises(PlanError, match="recorded or profiled already"), zerograph.record(engine):
        pass
    step(engine, 0)
    assert profile.collectives == () and profile.measured.line() == "no communication"
    assert "no communication" in str(profile)
    profile.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for steps in (0, -1, 1.5):
        with pytest.raises(PlanError, match="needs a number of updates"):
            engine.profile(steps)  # type: ignore[arg-type]
    engine.profile(1).end()
    step(engine, 0)


def call(bucket: str, start: float, end: float, *waits: tuple[float, float]) -> CallEntry:
    return CallEntry("gather", bucket, "forward", 100, 50.0, start, end, bucket != "late", waits)


def measured(*calls: CallEntry) -> Measured:
    stretches = (StretchEntry("forward", 0.0, 10.0),)
    return Measured("M", 3, 2, 0, 1, calls, stretches)


def test_sums_and_shares() -> None:
    found = measured(
        call("a", 0, 4, (3, 4)), call("b", 2, 6), call("late", 8, 9, (8.5, 9)), call("a", 0, 1)
    )
    assert found.communication == 7 and found.waited == 1.5
    assert found.hidden == pytest.approx(1 - 1.5 / 7)
    assert found.line() == "communication 7.00 s, 79 % hidden"
    a, b, late = found.collectives
    assert (a.calls, a.waited, a.seconds, a.hidden, a.sent) == (2, 1, 5, 0.8, 100)
    assert (b.hidden, b.bandwidth, late.seen) == (1, 12.5, 0)
    lines = [line for line in str(found).splitlines() if "gather" in line]
    assert "<= 1.00 s" in lines[2] and ">= 50 B/s" in lines[2] and "=" not in lines[1]


def test_the_table_of_many_buckets_shows_those_waited_for_longest() -> None:
    calls = [call(f"b{i}", i, i + 1, (i, i + i / 100)) for i in range(60)]
    text = str(measured(*calls))
    assert "21 others" in text and " b59 " in text and " b20 " not in text
    assert len(text.splitlines()) < 60


def _under_torch_profiler(rank: int, world: int) -> bool:
    """Steps under torch's profiler, which ends while the refreshes of the last step are under way."""
    engine = zerograph.compile(make("llama"), config_for(1))
    for _ in range(4):
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
            step(engine, rank)
        step(engine, rank)
        for _ in range(3):  # a corrupt heap is found by who uses it
            gc.collect()
            del [bytearray(size) for size in range(2000)][:]
    return len(seen.key_averages()) > 10


def test_torchs_profiler_may_end_while_something_is_under_way() -> None:
    """torch's own record of gloo's work would be written to after the profiler is gone."""
    assert run_ranks(2, _under_torch_profiler) == [True, True]
