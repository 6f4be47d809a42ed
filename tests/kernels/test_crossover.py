"""The price of a gram flop: measured once, kept on disk and in the process, asked for only where a choice needs it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gradent.kernels import crossover
from gradent.kernels.common.cost import WORTH, choose
from gradent.kernels.common.numerics import reduce_dense
from gradent.kernels.crossover import REPEATS, _key, _measure, _round, _timed, cache_file, is_measured, price
from gradent.record.atomic import write_whole
from tests.live import LiveBytes

LARGE = 2**40
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and a process that knows no price."""
    monkeypatch.setenv("GRADENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(crossover, "_known", {})
    monkeypatch.setattr(crossover, "_unsure", set())
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was measured; each measurement says that gram is 2.1 times as dear."""
    made: list[Any] = []

    def measure(*key: Any) -> tuple[float, bool]:
        made.append(key)
        return 2.1, True

    monkeypatch.setattr(crossover, "_measure", measure)
    return made


def again(monkeypatch: pytest.MonkeyPatch) -> float:
    """The price in a process that has not asked yet."""
    monkeypatch.setattr(crossover, "_known", {})
    return price(CPU, torch.float32)


def test_it_is_measured_in_the_process_and_on_disk(calls, monkeypatch) -> None:
    assert price(CPU, torch.float32) == price("cpu", torch.float32, path="torch") == 2.0
    assert len(calls) == 1
    kept = json.loads(cache_file().read_text())
    assert list(kept["prices"].values()) == [2.0]
    assert is_measured(CPU, torch.float32) and not is_measured(CPU, torch.float16)
    assert again(monkeypatch) == 2.0
    assert len(calls) == 1, "read from disk"


def test_a_small_budget_has_no_room_for_a_measurement(calls, monkeypatch) -> None:
    assert price(CPU, torch.float32, budget=2**20) == 1.0
    assert not calls and not is_measured(CPU, torch.float32)
    assert price(CPU, torch.float32, budget=2**23) == price(CPU, torch.float32, budget=2**20) == 2.0, "known by now"


def test_every_setting_has_a_price_of_its_own(calls, monkeypatch) -> None:
    price(CPU, torch.float32)
    price(CPU, torch.bfloat16)
    price(CPU, torch.float32, path="triton")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    price(CPU, torch.float32)
    monkeypatch.setattr(torch, "__version__", "3.0")
    price(CPU, torch.float32)
    assert len(calls) == 5
    assert len(json.loads(cache_file().read_text())["prices"]) == 5


BROKEN = {
    "not json": b"{",
    "not text": b"\xff\xfe\x00",
    "a list": b"[1]",
    "no version": b'{"prices": {}}',
    "of another version": b'{"version": 1, "prices": {"KEY": 0.5}}',
    "prices are a list": b'{"version": 2, "prices": [0.5]}',
    "a price that is none": b'{"version": 2, "prices": {"KEY": "cheap"}}',
    "a price off the grid": b'{"version": 2, "prices": {"KEY": 1.1}}',
    "a price out of bounds": b'{"version": 2, "prices": {"KEY": 64.0}}',
    "nan": b'{"version": 2, "prices": {"KEY": NaN}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_cache_is_measured_anew_and_mended(content, calls, monkeypatch) -> None:
    key = _key(CPU, torch.float32, "torch")
    write_whole(cache_file(), lambda handle: handle.write(content.replace(b"KEY", key.encode())))
    assert price(CPU, torch.float32) == 2.0
    assert len(calls) == 1
    assert again(monkeypatch) == 2.0
    assert len(calls) == 1


def test_a_directory_that_cannot_be_written_leaves_the_process_to_remember(calls, fresh, monkeypatch) -> None:
    fresh.write_text("a file stands where the directory would be")  # also root cannot write below it
    assert price(CPU, torch.float32) == price(CPU, torch.float32) == 2.0
    assert len(calls) == 1
    assert again(monkeypatch) == 2.0
    assert len(calls) == 2


def test_no_home_directory(calls, monkeypatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRADENT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert price(CPU, torch.float32) == 2.0


def test_where_the_cache_is(monkeypatch, tmp_path) -> None:
    assert cache_file() == tmp_path / "cache" / "crossover.json"
    monkeypatch.delenv("GRADENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "gradent" / "crossover.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "gradent" / "crossover.json"


def test_what_other_work_disturbed_does_not_count(monkeypatch) -> None:
    monkeypatch.setattr(crossover, "_measure", lambda *key: (3.9, False))
    assert price(CPU, torch.float32) == price(CPU, torch.float32) == 1.0
    assert not cache_file().exists()
    assert not is_measured(CPU, torch.float32)


def test_a_busy_machine_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(crossover.time, "process_time", lambda: 0.0)
    assert not _measure(CPU, torch.float32, "torch")[1]


def test_without_memory_a_flop_is_a_flop(monkeypatch) -> None:
    def full(*key: Any) -> tuple[float, bool]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(crossover, "_measure", full)
    assert price(CPU, torch.float32) == 1.0
    assert not cache_file().exists()


def test_prices_are_on_a_coarse_grid() -> None:
    assert [_round(ratio) for ratio in (0.01, 0.26, 0.9, 1.0, 1.15, 2.1, 1e9)] == [0.25, 0.25, 1, 1, 1, 2, 4]
    assert _round(1.3) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_real_measurement(dtype) -> None:
    before = torch.random.get_rng_state()
    began = time.perf_counter()
    got = price(CPU, dtype)
    assert time.perf_counter() - began < 5, "a fraction of a second on an idle machine"
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _round(got) == got


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            told.append(f"event on {stream}")

        def synchronize(self) -> None:
            told.append("waited")

        def elapsed_time(self, end: Any) -> float:
            return 4.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    seconds = _timed(lambda: told.append("call"), torch.device("cuda", 0))
    assert seconds == 0.004 / REPEATS
    assert told == ["call", "event on stream", *["call"] * REPEATS, "event on stream", "waited"]


def test_in_the_middle_of_a_backward_pass() -> None:
    made: list[bool] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: made.append(price(CPU, torch.float32) > 0))
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert made == [True]
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_nothing_is_measured_where_operators_are_counted(calls) -> None:
    with FlopCounterMode(display=False), LiveBytes() as live:
        assert price(CPU, torch.float32) == 1.0
        assert live.peak == 0
    assert calls == []
    assert price(CPU, torch.float32) == 2.0
    with LiveBytes():
        assert price(CPU, torch.float32) == 2.0, "what is known holds there too"


def refuse() -> float:
    raise AssertionError("the price was asked for")


@pytest.mark.parametrize(("rows", "cols"), [(4096, 16), (16, 4096), (14336, 16), (2048, 8), (4096, 64)])
def test_lora_never_measures(rows, cols) -> None:
    least = 1 if cols == 16 or rows == 16 else 300
    for tokens in (16, 64, 512, 2048, 8192):
        if tokens >= least:
            assert choose(tokens, tokens, rows, cols, itemsize=4, budget=LARGE, price=refuse).form == "outer"


def test_small_layers_and_clear_cases_never_measure() -> None:
    choose(40, 40, 64, 64, itemsize=4, budget=LARGE, price=refuse)
    assert choose(64, 64, 4096, 4096, itemsize=4, budget=LARGE, price=refuse).form == "gram"
    assert choose(8192, 8192, 4096, 1024, itemsize=4, budget=LARGE, price=refuse).form == "outer"
    assert choose(900, 900, 4096, 4096, itemsize=4, budget=LARGE, weighted=True, price=refuse).form == "outer"


@pytest.mark.parametrize(("price", "crossover"), [(0.5, 2048), (1.0, 1024), (2.0, 512), (4.0, 256)])
def test_the_choice_follows_the_price(price, crossover) -> None:
    # Of a [3072, 3072] weight, ⅔h is 1024.
    for tokens, form in ((int(0.95 * crossover), "gram"), (int(1.05 * crossover), "outer")):
        for given in (price, lambda: price):
            assert choose(tokens, tokens, 3072, 3072, itemsize=4, budget=LARGE, price=given).form == form


def test_a_reduction_takes_the_price(calls, monkeypatch) -> None:
    tokens, side = 200, 512  # ⅔h is 170.7: outer, unless gram is cheap
    assert choose(tokens, tokens, side, side, itemsize=4, budget=LARGE).flops > WORTH
    operands = [torch.randn(tokens, side) for _ in range(4)]
    forms = []
    monkeypatch.setattr(crossover, "_measure", lambda *key: (0.5, True))
    monkeypatch.setattr("gradent.kernels.common.numerics.reduce_planned", lambda *given: forms.append(given[4].form))
    reduce_dense(*operands, budget=LARGE)
    monkeypatch.setattr(crossover, "_known", {})
    cache_file().unlink()
    monkeypatch.setattr(crossover, "_measure", lambda *key: (2.0, True))
    reduce_dense(*operands, budget=LARGE)
    assert forms == ["gram", "outer"]
