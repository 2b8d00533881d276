from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import Distillation, TaskLoss, evaluate
from tutelage.data import fashion_loaders
from tutelage.deploy.export import export
from tutelage.distilling import distill
from tutelage.models import MLP, SmallCNN
from tutelage.schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, Exits
from tutelage.schemes.self_distillation.early_exits import (
    UntilExit,
    early_exit_curve,
    evaluate_exits,
    exit_costs,
)


def small_exits(seed: int = 0) -> Exits:
    torch.manual_seed(seed)
    return Exits(SmallCNN(6), at=["stage1", "stage2"], example=(1, 16, 16), width=8)


def data(n: int = 90):
    g = torch.Generator().manual_seed(2)
    x, y = 3 * torch.randn(n, 1, 16, 16, generator=g), torch.randint(0, 10, (n,), generator=g)
    return list(zip(x.split(40), y.split(40), strict=True))


def answers(exits: Exits, batches) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every exit's probabilities, the deepest last, and the labels."""
    exits.eval()
    with torch.no_grad():
        said = [exits(x) for x, _ in batches]
    exits.train()
    logits = [torch.cat([s.exits[i] for s in said]) for i in range(len(exits.at))]
    return [z.softmax(1) for z in [*logits, torch.cat([s.logits for s in said])]], torch.cat([y for _, y in batches])


def test_the_costs_are_those_counted_by_hand():
    exits = small_exits()
    stage1, stage2, stage3 = 9 * 6 * 256, 9 * 6 * 12 * 64, 9 * 12 * 24 * 16
    # bottlenecks: 1×1 to 8 channels, strided to 4×4, 1×1 to 24; then the classifier on the mean
    first = 6 * 8 * 256 + 8 * 8 * 16 * 16 + 8 * 24 * 16 + 24 * 10
    second = 12 * 8 * 64 + 8 * 8 * 4 * 16 + 8 * 24 * 16 + 24 * 10
    expected = [stage1 + first, stage1 + first + stage2 + second]
    expected.append(expected[1] + stage3 + 24 * 10)
    assert exit_costs(exits, torch.zeros(5, 1, 16, 16)) == expected
    assert exit_costs(exits, data()[0]) == expected


def test_the_curve_equals_leaving_one_by_one():
    exits, batches = small_exits(), data()
    probabilities, labels = answers(exits, batches)
    costs = exit_costs(exits, batches[0])
    sure = probabilities[0].max(1).values
    thresholds = [0.0, *sure.quantile(torch.tensor([0.2, 0.5, 0.9])).tolist(), 1.01]  # an untrained network's are small
    points = early_exit_curve(exits, batches, thresholds)
    for threshold, point in zip(thresholds, points, strict=True):
        right, spent, left = 0, 0, [0, 0, 0]
        for n in range(len(labels)):
            for i, p in enumerate(probabilities):
                if i == 2 or p[n].max() >= threshold:
                    right += int(p[n].argmax() == labels[n])
                    spent += costs[i]
                    left[i] += 1
                    break
        assert point.threshold == threshold
        assert point.accuracy == pytest.approx(right / len(labels))
        assert point.macs == pytest.approx(spent / len(labels))
        assert point.shares == pytest.approx([n / len(labels) for n in left])
    assert points[0].shares == (1.0, 0.0, 0.0)
    assert points[-1].shares == (0.0, 0.0, 1.0)
    assert len({point.shares for point in points}) > 3
    assert exits.training


def test_every_exits_figures_and_their_ensemble_in_one_pass():
    exits, batches = small_exits(), data()
    passes = []
    handle = exits.model.register_forward_hook(lambda *_: passes.append(1))
    found = evaluate_exits(exits, batches)
    handle.remove()
    assert len(passes) == len(batches)
    assert list(found) == ["stage1", "stage2", "deepest", "ensemble"]
    assert found["deepest"] == evaluate(exits, batches)
    for i, name in enumerate(exits.at):
        alone = evaluate(UntilExit(exits, i), batches)
        assert found[name].accuracy == alone.accuracy
        assert found[name].nll == pytest.approx(alone.nll, rel=1e-5)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.exits = exits

        def forward(self, x):
            said = self.exits(x)
            return (said.exits[0] + said.exits[1] + said.logits) / 3

    assert found["ensemble"].nll == pytest.approx(evaluate(Mean(), batches).nll, rel=1e-5)


def test_nothing_runs_after_the_exit():
    exits, x = small_exits().eval(), torch.randn(3, 1, 16, 16)
    ran = []
    for name, module in exits.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    wanted = exits(x).exits
    for i, exit in enumerate(exits.at):
        until = UntilExit(exits, exit).eval()
        ran.clear()
        torch.testing.assert_close(until(x), wanted[i], rtol=0, atol=0)
        assert not any("stage3" in name or "linear" in name or f"bottlenecks.{1 - i}" in name for name in ran)
        assert ("model.stage2" in ran) == (i == 1)
    copied = copy.deepcopy(UntilExit(exits, 0))
    torch.testing.assert_close(copied(x), wanted[0])
    copied(x).sum().backward()
    assert exits.model.stage1[0].weight.grad is None


@pytest.mark.parametrize("exit", [0, 1])
def test_an_exported_file_holds_the_network_up_to_the_exit_and_agrees(tmp_path, exit):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    exits, x = small_exits().eval(), torch.randn(4, 1, 16, 16)
    done = export(UntilExit(exits, exit), x, tmp_path / "until.onnx")
    assert done.max_abs_error < 1e-5
    graph = onnx.load(str(tmp_path / "until.onnx")).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == (exit + 1) + 3
    assert not any("stage3" in w.name or "model.linear" in w.name for w in graph.initializer)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "until.onnx"))
    (said,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(said), exits(x).exits[exit].detach(), rtol=1e-4, atol=1e-5)


def test_wrong_use_is_refused_by_name():
    exits = small_exits()
    with pytest.raises(ValueError, match=r"exit=2: expected one of 0 \(stage1\), 1 \(stage2\)"):
        UntilExit(exits, 2)
    with pytest.raises(ValueError, match=r"exit='stage11'.*nearest: 'stage1'"):
        UntilExit(exits, "stage11")
    with pytest.raises(ValueError, match="thresholds"):
        early_exit_curve(exits, data(), [float("nan")])
    with pytest.raises(ValueError, match="thresholds"):
        early_exit_curve(exits, data(), [])
    with pytest.raises(ValueError, match="the loader is empty"):
        early_exit_curve(exits, [], [0.5])
    with pytest.raises(ValueError, match="no sample has a label"):
        early_exit_curve(exits, [(x, torch.full_like(y, -100)) for x, y in data()], [0.5])
    with pytest.raises(ValueError, match="labels"):
        evaluate_exits(exits, [data()[0][0]])


def trained(losses, seed: int) -> tuple[dict[str, float], Exits, list]:
    """Each exit's accuracy on unseen images."""
    torch.manual_seed(seed)
    held = fashion_loaders(batch_size=64, limit=700, validation=1000)
    exits = Exits(SmallCNN(6), at=["stage1", "stage2"], example=(1, 28, 28), width=8)
    how = {"epochs": 6, "optimizer": "adamw", "lr": 0.02, "scheduler": "onecycle", "progress": False, "cpu": True}
    distill(exits, BeYourOwnTeacher(), held.train, losses=losses, seed=seed, **how)
    batches = list(held.validation)
    return {n: m.accuracy for n, m in evaluate_exits(exits, batches).items()}, exits, batches


def test_going_on_costs_more_and_is_right_more_often():
    accuracies, exits, batches = trained(BeYourOwnTeacher().losses(), seed=0)
    thresholds = [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 1.01]
    points = early_exit_curve(exits, batches, thresholds)
    macs = [point.macs for point in points]
    assert macs == sorted(macs)
    assert macs[0] < macs[3] < macs[-1]
    assert points[0].accuracy == pytest.approx(accuracies["stage1"])
    assert points[-1].accuracy == pytest.approx(accuracies["deepest"])
    assert points[-1].accuracy > points[0].accuracy + 0.03


def test_a_perceptron_and_losses_that_read_labels_alone():
    torch.manual_seed(0)
    exits = Exits(MLP(8, (16, 16), 3), at=["hidden.0"], example=(8,))
    raw = torch.randn(6, 8), torch.arange(6) % 3
    Distillation(exits, BeYourOwnTeacher(), [TaskLoss()]).bind(raw)(raw).total.backward()
    assert UntilExit(exits, 0)(raw[0]).shape == (6, 3)
