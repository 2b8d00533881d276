from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, Stage, TaskLoss, distill
from tutelage.knowledge.feature.internal_representation import (
    InternalRepresentation,
    attention_divergence,
    first_token_distance,
    layers_in_turn,
)
from tutelage.models import SmallCNN, SmallTransformer


def probabilities(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def masked(logits, mask):
    return logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


def test_the_divergence_is_the_loop_over_samples_heads_and_valid_rows():
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [False, True, True, True, True]])
    torch.manual_seed(0)
    student, teacher = (masked(torch.randn(3, 2, 5, 5, dtype=torch.float64), mask) for _ in range(2))
    total = 0.0
    for b in range(3):
        valid = [i for i in range(5) if mask[b, i]]
        for h in range(2):
            for i in valid:
                for j in valid:
                    p, q = teacher[b, h, i, j].item(), student[b, h, i, j].item()
                    total += p * math.log(p / q) / (2 * len(valid))
    assert attention_divergence(student, teacher, mask).item() == pytest.approx(total / 3)


def test_the_distance_is_the_loop_over_samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [False, False, True, True], [True, False, False, False]])
    cosines = [nn.functional.cosine_similarity(student[b, i], teacher[b, i], dim=0) for b, i in enumerate((0, 2, 0))]
    expected = sum(1 - c.item() for c in cosines) / 3
    assert first_token_distance(student, teacher, mask).item() == pytest.approx(expected)
    lengths = torch.rand(3, 4, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(
        first_token_distance(lengths * student, 7 * teacher, mask), first_token_distance(student, teacher, mask)
    )


def test_what_stands_at_padded_positions_changes_neither_value_nor_gradient():
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    logits, teacher = torch.randn(2, 2, 3, 5, 5, dtype=torch.float64)
    states, taught = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    found = []
    for junk in (0.0, 1e3, math.nan):
        s, t = logits.clone().requires_grad_(), masked(teacher, mask)
        p = masked(s, mask)
        h, h_t = states.clone().requires_grad_(), taught.clone()
        keep = (mask[:, None, :, None] & mask[:, None, None]).expand_as(p)
        h_t[~mask] = junk
        spoiled = h.masked_fill(~mask.unsqueeze(2), junk)
        value = attention_divergence(torch.where(keep, p, junk), torch.where(keep, t, junk), mask)
        value = value + first_token_distance(spoiled, h_t, mask)
        value.backward()
        found.append((value.detach(), s.grad, h.grad))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)
    short = attention_divergence(masked(logits, mask)[:, :, :3, :3], masked(teacher, mask)[:, :, :3, :3])
    torch.testing.assert_close(found[0][0], short + first_token_distance(states[:, :3], taught[:, :3]))


def test_a_sample_without_valid_positions_costs_nothing():
    p, q = (probabilities(seed, 2, 3, 4, 4).requires_grad_() for seed in (0, 1))
    h, g = torch.randn(2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    half = torch.tensor([[True] * 4, [False] * 4])
    torch.testing.assert_close(attention_divergence(p, q, half), attention_divergence(p[:1], q[:1]) / 2)
    torch.testing.assert_close(first_token_distance(h, g, half), first_token_distance(h[:1], g[:1]) / 2)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    value = attention_divergence(p, q, nothing) + first_token_distance(h, g, nothing)
    value.backward()
    assert value == 0
    assert p.grad.abs().max() == 0


def test_a_probability_of_zero_is_finite():
    student = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], requires_grad=True)
    teacher = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]])
    value = attention_divergence(student, teacher)
    value.backward()
    expected = (
        0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(torch.finfo(torch.float32).tiny)) + math.log(2)
    ) / 2
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert student.grad[0, 0, 0, 1] == 0
    assert student.grad.isfinite().all()


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"attentions differ in shape: student \(1, 2, 3, 3\), teacher \(1, 4, 3, 3\)"):
        attention_divergence(torch.ones(1, 2, 3, 3), torch.ones(1, 4, 3, 3))
    with pytest.raises(ValueError, match="hidden states differ in shape"):
        first_token_distance(torch.ones(1, 2, 3), torch.ones(1, 2, 4))


@pytest.mark.parametrize(
    ("order", "until", "expected"),
    [
        ("stacked", 1.0, [[0], [0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]),
        ("progressive", 1.0, [[0], [0], [1], [2], [2], [2]]),
        ("all", 1.0, [[0, 1, 2]] * 6),
        ("stacked", 0.5, [[0], [0, 1], [0, 1, 2], [], [], []]),
        ("progressive", 0.5, [[0], [1], [2], [], [], []]),
        ("all", 0.5, [[0, 1, 2]] * 3 + [[]] * 3),
    ],
)
def test_layers_take_turns_from_the_bottom(order, until, expected):
    found = [list(layers_in_turn(p, 3, order, until)) for p in (0.0, 0.2, 0.4, 2 / 3, 0.9, 1.0)]
    assert found == expected


def test_a_turn_begins_at_its_part_of_the_training():
    for layers in range(1, 25):
        for k in range(layers):
            assert len(layers_in_turn(k / layers, layers)) == k + 1


def networks(width=8, depth=2, heads=2):
    torch.manual_seed(0)
    return SmallTransformer(width, depth, heads), SmallTransformer(16, 4, 2)


def images(count=4, seed=0):
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def bound(loss, student, teacher, batch=None):
    d = Distillation(student, teacher, losses=[loss]).bind(images() if batch is None else batch)
    d.progress = 0.99
    return d


def test_the_term_is_the_sum_over_layers_of_its_two_parts():
    student, teacher = networks(width=16)
    loss = InternalRepresentation(attention=2.0, hidden=3.0)
    d = bound(loss, student, teacher)
    with torch.no_grad():
        s, t = student(images()), teacher(images())
    expected = 0
    for i, j in ((0, 1), (1, 3)):
        expected = expected + 2 * attention_divergence(s.attentions[i], t.attentions[j])
        expected = expected + 3 * first_token_distance(s.hidden_states[i + 1], t.hidden_states[j + 1])
    torch.testing.assert_close(d(images()).total.detach(), expected)
    assert not list(loss.parameters()), "equal widths need no layer"


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 3])]
)
def test_each_layer_reads_the_teachers_of_the_same_part_of_the_depth(depth, layers):
    loss = InternalRepresentation()
    bound(loss, *networks(depth=depth))
    assert loss.pairs[::2] == [(f"@attentions[{i}]", f"@attentions[{j}]") for i, j in enumerate(layers)]
    assert loss.pairs[1::2] == [(f"@hidden_states[{i + 1}]", f"@hidden_states[{j + 1}]") for i, j in enumerate(layers)]


def test_taps_inside_the_model_are_the_fields_of_its_output():
    student, teacher = networks()
    fields = bound(
        InternalRepresentation(("@attentions[0]", "@attentions[3]"), ("@hidden_states[1]", "@hidden_states[4]")),
        student,
        teacher,
    )
    inside = bound(
        InternalRepresentation(("layers.0.attention[1]", "layers.3.attention[1]"), ("layers.0", "layers.3")),
        student,
        teacher,
    )
    inside.load_state_dict(fields.state_dict())
    assert fields(images()).total == inside(images()).total


def test_upper_layers_learn_nothing_before_their_turn():
    student, teacher = networks(width=16)
    loss = InternalRepresentation()
    d = Distillation(student, teacher, losses=[loss]).bind(images())

    def reached(progress):
        d.progress = progress
        d.zero_grad()
        d(images()).total.backward()
        parts = (*student.layers, student.linear)
        return [any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters()) for part in parts]

    assert reached(0.0) == [True, False, False]
    assert reached(0.5) == [True, True, False]
    loss.until = 0.6
    assert reached(0.6) == [False, False, False]
    assert d(images()).total == 0


def test_progressive_has_the_difference_of_stacked():
    student, teacher = networks(width=16)
    values = {}
    for order in ("stacked", "progressive"):
        d = Distillation(student, teacher, losses=[InternalRepresentation(order=order)]).bind(images())
        for d.progress in (0.0, 0.5):
            values[order, d.progress] = d(images()).total
    assert values["stacked", 0.0] == values["progressive", 0.0]
    torch.testing.assert_close(values["stacked", 0.5], values["progressive", 0.5] + values["stacked", 0.0])


def test_the_gradient_reaches_the_student_and_not_the_teacher():
    student, teacher = networks()
    loss = InternalRepresentation()
    d = bound(loss, student, teacher)
    d(images()).total.backward()
    assert student.patches.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_same_network_costs_nothing():
    _, teacher = networks()
    d = bound(InternalRepresentation(), copy.deepcopy(teacher), teacher)
    assert d(images()).total.item() == pytest.approx(0, abs=1e-6)


def test_heads_in_another_order_cost_something_but_not_their_mean():
    _, teacher = networks()
    student = copy.deepcopy(teacher)
    for layer in student.layers:
        with torch.no_grad():
            for parameter in (layer.attention.qkv.weight, layer.attention.qkv.bias):
                parts = parameter.reshape(3, 2, 8, *parameter.shape[1:])
                parameter.copy_(parts.flip(1).reshape(parameter.shape))
            columns = layer.attention.out.weight
            columns.copy_(columns.reshape(16, 2, 8).flip(1).reshape(16, 16))
    torch.testing.assert_close(student(images()).logits, teacher(images()).logits)
    assert bound(InternalRepresentation(hidden=0), student, teacher)(images()).total > 1e-6
    mean = bound(InternalRepresentation(hidden=0, heads="mean"), student, teacher)
    assert mean(images()).total.item() == pytest.approx(0, abs=1e-7)


def test_other_numbers_of_heads_need_their_mean():
    with pytest.raises(ValueError, match=r"4 heads of the student at '@attentions\[0\]' and 2 of the teacher"):
        bound(InternalRepresentation(), *networks(heads=4))
    assert bound(InternalRepresentation(heads="mean"), *networks(heads=4))(images()).total > 0


def test_the_order_of_the_batch_does_not_matter_and_one_sample_is_finite():
    d = bound(InternalRepresentation(), *networks())
    torch.testing.assert_close(d(images().flip(0)).total, d(images()).total)
    assert d(images()[:1]).total.isfinite()


def test_float64_stays_float64():
    student, teacher = networks()
    d = bound(InternalRepresentation(), student.double(), teacher.double(), images().double())
    assert d(images().double()).total.dtype == torch.float64


def test_what_it_learns_is_saved_and_is_not_the_students():
    student, teacher = networks()
    keys = set(student.state_dict())
    loss = InternalRepresentation()
    d = bound(loss, student, teacher)
    assert {tuple(p.shape) for p in loss.parameters()} == {(16, 8), (16,)}
    assert {id(p) for p in loss.parameters()} < {id(p) for p in d.parameters()}
    assert set(student.state_dict()) == keys
    other = bound(InternalRepresentation(), copy.deepcopy(student), teacher)
    with torch.no_grad():
        other.losses["InternalRepresentation"].projectors[0].weight.mul_(-1)
    assert other(images()).total != d(images()).total
    other.load_state_dict(d.state_dict())
    assert other(images()).total == d(images()).total
    Distillation(student, teacher, losses=[loss]).bind(images())
    assert len(loss.projectors) == 2, "a second binding makes them anew"


def test_what_cannot_be_compared_is_named():
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"output of the student \(SmallCNN\) has 0 attentions"):
        bound(InternalRepresentation(), SmallCNN(2), teacher)
    with pytest.raises(
        ValueError, match=r"output of the teacher \(SmallCNN\) has 0 attentions .*output_attentions=True"
    ):
        bound(InternalRepresentation(), student, SmallCNN(2))
    with pytest.raises(ValueError, match="1 pairs of taps: expected two for each layer"):
        bound(InternalRepresentation("@attentions[0]"), student, teacher)
    with pytest.raises(ValueError, match=r"attention at '@hidden_states\[1\]' of the student is \(4, 17, 8\)"):
        bound(InternalRepresentation("@hidden_states[1]", "@hidden_states[2]"), student, teacher)
    with pytest.raises(ValueError, match=r"hidden states \(4, 2, 17, 17\) at '@attentions\[0\]'"):
        bound(InternalRepresentation("@hidden_states[1]", "@attentions[0]"), student, teacher)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="the student has 50 tokens and the teacher 17"):
        bound(InternalRepresentation(), SmallTransformer(8, 2, 2, patch=4), teacher)


@pytest.mark.parametrize(
    ("argument", "value"), [("attention", -1.0), ("order", "down"), ("heads", "some"), ("until", 0.0), ("until", 1.5)]
)
def test_arguments_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=f"InternalRepresentation: {argument}={value!r}"):
        InternalRepresentation(**{argument: value})


def bert(layers, hidden=16, dropout=0.0, seed=0, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=dropout,
            attn_implementation="eager",
            **({"output_attentions": True, "output_hidden_states": True} | options),
        )
    )


def sentences(padding=0, left=0):
    ids = torch.randint(1, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {
        "input_ids": nn.functional.pad(ids, (left, padding)),
        "attention_mask": nn.functional.pad(mask, (left, padding)),
    }


def test_padding_a_batch_of_bert_changes_neither_loss_nor_gradient():
    student, teacher = bert(2), bert(4, seed=1)
    d = bound(InternalRepresentation(), student, teacher, sentences())
    assert d.losses["InternalRepresentation"].pairs[0] == ("@attentions[0]", "@attentions[1]")
    found = []
    for padding in (0, 5):
        d.zero_grad()
        total = d(sentences(padding)).total
        total.backward()
        found.append((total.detach(), {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    (value, gradients), (padded, others) = found
    assert value > 1e-3
    torch.testing.assert_close(value, padded)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_what_bert_reads_at_padded_places_does_not_matter():
    d = bound(InternalRepresentation(), bert(2), bert(2, seed=1), sentences(3))
    batch = sentences(3)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7)}
    torch.testing.assert_close(d(changed).total, d(batch).total)
    left = sentences(left=2)
    other = {**left, "input_ids": torch.where(left["attention_mask"] > 0, left["input_ids"], 7)}
    torch.testing.assert_close(d(other).total, d(left).total, msg="the first token is the first valid one")


def test_attention_dropout_in_the_student_is_refused():
    with pytest.raises(ValueError, match=r"of the student has rows that do not sum to 1 .* attention dropout of 0"):
        bound(InternalRepresentation(), bert(2, dropout=0.3), bert(2, seed=1), sentences())
    assert bound(InternalRepresentation(), bert(2), bert(2, dropout=0.3, seed=1), sentences())(sentences()).total > 0
    assert bound(InternalRepresentation(attention=0), bert(2, dropout=0.3), bert(2, seed=1), sentences())


def test_masks_that_do_not_fit_are_named():
    batch = sentences()
    with pytest.raises(ValueError, match=r"the attention_mask \(3, 1, 1, 6\): expected \(B, T\)"):
        bound(
            InternalRepresentation(),
            bert(1),
            bert(1, seed=1),
            {**batch, "attention_mask": torch.ones(3, 1, 1, 6, dtype=torch.bool)},
        )
    with pytest.raises(ValueError, match=r"has 0 attentions and 0 hidden_states"):
        bound(InternalRepresentation(), bert(1, output_attentions=False, output_hidden_states=False), bert(1), batch)


def test_stages_as_published():
    student, teacher = networks()
    data = [(images(8, seed), torch.arange(8) % 10) for seed in range(2)]
    stages = [Stage([InternalRepresentation()], epochs=2), Stage([TaskLoss(weight=0.1), KD()], epochs=1)]
    result = distill(student, teacher, data, data, stages=stages, progress=False)
    assert [sorted(set(line.losses) - {"loss"}) for run in result.runs for line in run.history] == [
        ["InternalRepresentation"],
        ["InternalRepresentation"],
        ["KD", "TaskLoss"],
    ]


def test_training_brings_attention_and_the_first_token_to_the_teachers():
    def pictures(count, seed):
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (count,), generator=draw)
        x = 0.3 * torch.randn(count, 1, 28, 28, generator=draw)
        for i, label in enumerate(labels.tolist()):
            x[i, 0, 7 * label : 7 * label + 7] += 1
        return x, labels

    inputs, labels = pictures(64, 1)
    fresh, _ = pictures(64, 2)
    torch.manual_seed(0)
    teacher = SmallTransformer(16, depth=2, heads=2, num_classes=4)

    def steps(parameters, cost, count):
        optimizer = torch.optim.Adam(parameters, lr=0.005)
        for step in range(count):
            optimizer.zero_grad()
            cost(step / count).backward()
            optimizer.step()

    steps(teacher.parameters(), lambda _: nn.functional.cross_entropy(teacher(inputs).logits, labels), 40)

    def distances(*losses):
        torch.manual_seed(1)
        student = SmallTransformer(16, depth=2, heads=2, num_classes=4)
        d = Distillation(student, teacher, losses=[TaskLoss(), *losses]).bind((inputs, labels))

        def cost(progress):
            d.progress = progress
            return d((inputs, labels)).total

        steps(d.parameters(), cost, 120)
        with torch.no_grad():
            s, t = student.eval()(fresh), teacher.eval()(fresh)
        return [
            sum(attention_divergence(a, b) for a, b in zip(s.attentions, t.attentions, strict=True)),
            sum(first_token_distance(a, b) for a, b in zip(s.hidden_states[1:], t.hidden_states[1:], strict=True)),
        ]

    alone, stacked = distances(), distances(InternalRepresentation())
    assert all(taught < 0.5 * own for taught, own in zip(stacked, alone, strict=True)), (alone, stacked)
