"""Of a cache, a comparison, a compression or an exchange a byte is changed on disk, or the end is missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from damage import damages, judged
from torch import nn

from tutelage import KD, Cached, Distillation
from tutelage.cache_folder import Cache
from tutelage.checked import read_json, write_json
from tutelage.comparison import Compared, Comparison
from tutelage.comparison.cells import Cell, CellResult, read_result
from tutelage.comparison.pool import prepare, read_known
from tutelage.deploy.steps import Steps
from tutelage.run import Epoch
from tutelage.schemes.online.exchange import DamagedWeights, Exchange


def network(width: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def test_a_cache(tmp_path):
    folder = tmp_path / "cache"
    role = Cached(network(7, seed=1).eval(), str(folder), "float32")
    data = [(torch.randn(8, 4), torch.arange(8) % 3, torch.arange(8 * n, 8 * n + 8)) for n in range(2)]
    d = Distillation(network(), role, [KD()]).bind(data[0])
    for raw in data:
        d(raw)

    def read() -> Any:
        cache = Cache(folder)
        cache.held()
        records, there = cache.read(["@logits"], np.arange(20))
        return [cache.decode("@logits", records["@logits"]), there.tolist(), cache.about]

    (shard,) = folder.glob("*.rows")
    # behind the 16 rows that are there are those that are not yet
    found = judged([shard], read, used=16 * Cache(folder).rows["@logits"].dtype.itemsize)
    found += judged([folder / "manifest.json"], read)
    assert found.keys() <= {"noticed", "harmless"}
    assert found["noticed"] >= 26


# a comparison


def results() -> tuple[Cell, CellResult]:
    cell = Cell("KD", "narrow", "big", 3, {"student": "SmallCNN", "training": {"epochs": 2}})
    metrics = {"accuracy": 0.8125, "nll": 0.51}
    history = [asdict(Epoch(n, 8 * n + 8, 0.5, 0.05, {"loss": 1 / 3 + n}, metrics)) for n in range(2)]
    return cell, CellResult(cell.key, "KD", "narrow", "big", 3, "done", metrics=metrics, history=history, seconds=2.5)


def test_a_comparison(tmp_path):
    cell, result = results()
    comparison = Comparison({"student": "SmallCNN"}, {"KD": {}}, {"narrow": {}}, {"big": {}}, [3])
    file = Compared(comparison, [result]).save_json(tmp_path / "comparison.json")

    def read() -> Any:
        compared = Compared.from_json(file)
        return [asdict(compared.comparison), *map(asdict, compared.results)]

    def known() -> Any:
        return {key: asdict(found) for key, found in read_known(file).items()}

    for use in (read, known):
        found = judged([file], use)
        assert found.keys() <= {"noticed", "harmless"}
        assert found["noticed"] >= 12
    folder = tmp_path / "cells" / cell.key
    prepare(cell, folder, ["mine"])
    found = judged([folder / "cell.json"], lambda: read_json(folder / "cell.json"))
    assert found.keys() <= {"noticed", "harmless"}


def test_a_cell_whose_result_is_damaged_is_run_again(tmp_path):
    cell, result = results()
    write_json(tmp_path / "result.json", asdict(result), checked=True)
    true = read_result(tmp_path, cell)
    assert true == result
    found = Counter[str]()
    content = (tmp_path / "result.json").read_bytes()
    for damaged in damages(content, np.random.default_rng(0)):
        (tmp_path / "result.json").write_bytes(damaged)
        read = read_result(tmp_path, cell)
        assert read is None or read == true
        found["again" if read is None else "harmless"] += 1
    assert found["again"] >= 12


# others


def test_a_step_whose_file_is_damaged_is_done_again(tmp_path):
    steps, done = Steps(tmp_path), []

    def work() -> dict[str, Any]:
        done.append(1)
        return {"accuracy": 0.75, "channels": [3, 5]}

    steps.do("prune", {"of": 1}, work)
    content = (tmp_path / "prune.json").read_bytes()
    for damaged in damages(content, np.random.default_rng(0)):
        (tmp_path / "prune.json").write_bytes(damaged)
        assert steps.do("prune", {"of": 1}, work) == {"accuracy": 0.75, "channels": [3, 5]}
    assert len(done) >= 12


def test_weights_that_peers_exchange(tmp_path):
    exchange = Exchange(tmp_path)
    exchange.publish(0, 10, network().state_dict())
    (published,) = exchange.found(0)
    found = judged([published.path], lambda: exchange.read(published))
    assert found.keys() <= {"noticed", "harmless"}
    assert found["noticed"] >= 12
    published.path.write_bytes(b"")
    with pytest.raises(DamagedWeights, match=str(published.path)):
        exchange.read(published)
