"""Metrics against plain Python over the same pairs, one pair at a time."""

import math
import random

import pytest
import torch

from bfpo_pl.batch import Annotations, Label, LogProbs, PairBatch
from bfpo_pl.metrics import PAIR_METRICS, QUADRANTS, PreferenceMetrics, TokenMetrics, quadrant_weights

STREAMS = ("safety", "helpfulness", "unused")
SCALE = 0.25


def random_pairs(seed, size, flags="soft"):
    """Plain records of pairs: two responses each, a label and a loss."""
    dice = random.Random(seed)

    def flag():
        return {"soft": dice.random(), "hard": float(dice.random() < 0.6), None: None}[flags]

    return [
        {
            "stream": dice.randrange(2),
            "policy": (dice.gauss(-20, 9), dice.gauss(-20, 9)),
            "reference": (dice.gauss(-20, 9), dice.gauss(-20, 9)),
            "safe": (flag(), flag()),
            "target": dice.choice([-1.0, -0.5, 0.0, 0.5, 1.0]),
            "weight": dice.choice([0.0, 1.0, 2.0]),
            "loss": dice.expovariate(0.1),
        }
        for _ in range(size)
    ]


def tensors_of(records, reference=True, float_type=torch.float64):
    """The batch, log-probs, label and losses of some records; the pair table is shuffled over the responses."""
    size = len(records)
    order = list(range(2 * size))
    random.Random(size).shuffle(order)  # order[2 i], order[2 i + 1]: where the pair's responses lie
    pairs = torch.tensor(order, dtype=torch.int64).view(size, 2)

    def response_column(name):
        column = [0.0] * (2 * size)
        for i, record in enumerate(records):
            for side in (0, 1):
                column[order[2 * i + side]] = record[name][side]
        return torch.tensor(column, dtype=float_type)

    has_flags = not records or records[0]["safe"][0] is not None
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PairBatch(
        tokens=nothing,
        positions=nothing,
        segment_start=torch.zeros(2 * size, dtype=torch.int64),
        segment_length=torch.ones(2 * size, dtype=torch.int64),
        response_segment=torch.zeros(2 * size, dtype=torch.int64),
        prompt_segment=torch.zeros(2 * size, dtype=torch.int64),
        response_stream=torch.zeros(2 * size, dtype=torch.int64),
        pair_stream=torch.tensor([record["stream"] for record in records], dtype=torch.int64),
        stream_weight=torch.ones(len(STREAMS)),
        annotations=Annotations(pairs, {"safe": response_column("safe")} if has_flags else {}),
        streams=STREAMS,
    )
    log_probs = LogProbs(
        response_column("policy"),
        torch.ones(2 * size, dtype=torch.int64),
        pairs,
        {"reference": response_column("reference")} if reference else {},
    )
    label = Label(
        torch.tensor([record["target"] for record in records], dtype=float_type),
        torch.tensor([record["weight"] for record in records], dtype=float_type),
    )
    return batch, log_probs, label, torch.tensor([record["loss"] for record in records], dtype=float_type)


def half(sign):
    return (1 + sign) / 2


def sign(x):
    return (x > 0) - (x < 0)


def values_of(record):
    """The metrics of one pair; None where it does not count."""
    (c, r), (ref_c, ref_r) = record["policy"], record["reference"]
    margin = (c - ref_c) - (r - ref_r)
    counts = record["weight"] > 0
    return {
        "loss": record["loss"] if counts else None,
        "margin": margin,
        "target": record["target"],
        "log_prob_chosen": c,
        "log_prob_rejected": r,
        "log_ratio_chosen": c - ref_c,
        "log_ratio_rejected": r - ref_r,
        "reward_chosen": SCALE * (c - ref_c),
        "reward_rejected": SCALE * (r - ref_r),
        "reward_margin": SCALE * margin,
        "accuracy": half(sign(margin) * sign(record["target"])) if counts and record["target"] != 0 else None,
        "accuracy_helpfulness": half(sign(margin)),
    }


def plain_means(records):
    """{stream}/{quadrant}/{metric} by explicit loops."""
    sums = {}
    for record in records:
        s_c, s_r = record["safe"]
        quadrants = {"all": 1.0}
        if s_c is not None:
            quadrants["safe_safe"] = s_c * s_r
            quadrants["safe_unsafe"] = s_c * (1 - s_r)
            quadrants["unsafe_safe"] = (1 - s_c) * s_r
            quadrants["unsafe_unsafe"] = (1 - s_c) * (1 - s_r)
        for metric, value in values_of(record).items():
            for quadrant, share in quadrants.items():
                for stream in ("all", STREAMS[record["stream"]]):
                    if value is not None and share > 0:
                        total, count = sums.get(f"{stream}/{quadrant}/{metric}", (0.0, 0.0))
                        sums[f"{stream}/{quadrant}/{metric}"] = (total + share * value, count + share)
    return {name: total / count for name, (total, count) in sums.items()}


def computed(*groups, **arguments):
    metric = PreferenceMetrics(STREAMS)
    for records in groups:
        metric.update(*tensors_of(records, **arguments), SCALE)
    return metric.compute()


@pytest.mark.parametrize("flags", ["hard", "soft"])
@pytest.mark.parametrize("seed", range(3))
def test_means_equal_plain_python(flags, seed):
    records = random_pairs(seed, 37, flags)
    assert computed(records) == pytest.approx(plain_means(records), rel=1e-12)


def test_ragged_batches_add_up_to_one():
    records = random_pairs(7, 40)
    pieces = [records[:1], records[1:1], records[1:18], records[18:20], records[20:]]
    assert computed(*pieces) == pytest.approx(plain_means(records), rel=1e-12)


def test_names():
    names = set(computed(random_pairs(1, 30)))
    # Pairs lie in two of the three streams; groups without a pair are left out.
    groups = ("all", "safety", "helpfulness")
    assert names == {f"{s}/{q}/{m}" for s in groups for q in ("all", *QUADRANTS) for m in PAIR_METRICS}
    assert QUADRANTS == ("safe_safe", "safe_unsafe", "unsafe_safe", "unsafe_unsafe")


def test_hard_flags_put_a_pair_in_one_quadrant():
    (record,) = random_pairs(2, 1)
    for safe, quadrant in [((1, 1), 0), ((1, 0), 1), ((0, 1), 2), ((0, 0), 3)]:
        names = set(computed([{**record, "safe": safe, "weight": 1.0, "target": 0.5}]))
        assert {name.split("/")[1] for name in names} == {"all", QUADRANTS[quadrant]}


def test_quadrants_of_soft_flags_sum_to_one():
    weights = quadrant_weights(torch.tensor([0.25, 1.0]), torch.tensor([0.5, 0.75]))
    assert weights.tolist() == [[0.125, 0.75], [0.125, 0.25], [0.375, 0.0], [0.375, 0.0]]


def test_without_flags_there_is_only_all():
    records = random_pairs(4, 12, flags=None)
    got = computed(records)
    assert got == pytest.approx(plain_means(records), rel=1e-12)
    assert {name.split("/")[1] for name in got} == {"all"}


def test_pairs_of_weight_zero_count_in_neither_loss_nor_accuracy():
    records = [{**record, "weight": 0.0} for record in random_pairs(5, 6, "hard")]
    metrics = {name.split("/")[2] for name in computed(records)}
    assert metrics == set(PAIR_METRICS) - {"loss", "accuracy"}


def test_target_zero_counts_in_no_accuracy():
    records = [{**record, "weight": 1.0, "target": 0.0} for record in random_pairs(5, 6, "hard")]
    metrics = {name.split("/")[2] for name in computed(records)}
    assert metrics == set(PAIR_METRICS) - {"accuracy"}


def test_a_margin_of_zero_is_half_right():
    (record,) = random_pairs(6, 1)
    tie = {**record, "policy": (-3.0, -5.0), "reference": (-2.0, -4.0), "weight": 1.0, "target": 1.0}
    got = computed([tie])
    assert got["all/all/accuracy"] == got["all/all/accuracy_helpfulness"] == 0.5


def test_a_nan_stays_in_its_group():
    records = random_pairs(8, 30, "hard")
    records[0] = {**records[0], "stream": 0, "safe": (1.0, 0.0), "weight": 1.0, "loss": math.nan}
    got = computed(records)
    want = plain_means(records)
    bad = {name for name, value in got.items() if math.isnan(value)}
    assert bad == {f"{s}/{q}/loss" for s in ("all", "safety") for q in ("all", "safe_unsafe")}
    good = got.keys() - bad
    assert {n: got[n] for n in good} == pytest.approx({n: want[n] for n in good}, rel=1e-12)


def test_a_nan_of_a_dropped_pair_is_not_seen():
    records = random_pairs(9, 20)
    records[0] = {**records[0], "weight": 0.0, "loss": math.nan}
    assert not any(math.isnan(value) for value in computed(records).values())


def test_methods_without_labels_or_references():
    records = random_pairs(10, 15, "hard")
    batch, log_probs, _, _ = tensors_of(records, reference=False)
    metric = PreferenceMetrics(STREAMS)
    metric.update(batch, log_probs, None, None, SCALE)
    got = metric.compute()
    shown = {name.split("/")[2] for name in got}
    assert shown == {"margin", "log_prob_chosen", "log_prob_rejected", "accuracy_helpfulness"}
    differences = [record["policy"][0] - record["policy"][1] for record in records]
    assert got["all/all/margin"] == pytest.approx(sum(differences) / 15)


def test_float32_inputs_are_summed_in_float64():
    records = random_pairs(11, 50, "hard")
    assert computed(*[[r] for r in records], float_type=torch.float32) == pytest.approx(plain_means(records), rel=1e-4)
    metric = PreferenceMetrics(STREAMS)
    big = {**records[0], "loss": 2.0**24, "weight": 1.0}
    small = {**records[0], "loss": 1.0, "weight": 1.0}
    for record in (big, small, small):
        metric.update(*tensors_of([record], float_type=torch.float32), SCALE)
    assert metric.compute()["all/all/loss"] == pytest.approx((2.0**24 + 2) / 3, rel=1e-12)


def test_reset_and_no_pairs():
    metric = PreferenceMetrics(STREAMS)
    metric.update(*tensors_of(random_pairs(1, 3)), SCALE)
    metric.reset()
    metric.update(*tensors_of([]), SCALE)
    assert metric.compute() == {}
    assert metric.state_dict() == {}


def test_token_metrics():
    def batch_of(streams, lengths):
        size = len(streams)
        return PairBatch(
            tokens=torch.zeros(0, dtype=torch.int64),
            positions=torch.zeros(0, dtype=torch.int64),
            segment_start=torch.zeros(size, dtype=torch.int64),
            segment_length=torch.tensor(lengths),
            response_segment=torch.arange(size),
            prompt_segment=torch.arange(size),
            response_stream=torch.tensor(streams),
            pair_stream=torch.zeros(0, dtype=torch.int64),
            stream_weight=torch.ones(3),
            annotations=Annotations(torch.zeros(0, 2, dtype=torch.int64)),
            streams=STREAMS,
        )

    metric = TokenMetrics(STREAMS)
    metric.update(batch_of([0, 1, 0], [2, 4, 1]), torch.tensor([3.0, 2.0, 6.0]))
    metric.update(batch_of([1], [1]), torch.tensor([8.0]))
    want = {"safety": 9 / 3, "helpfulness": 10 / 5, "all": 19 / 8}
    expected = {f"{s}/all/loss": v for s, v in want.items()} | {
        f"{s}/all/perplexity": math.exp(v) for s, v in want.items()
    }
    assert metric.compute() == pytest.approx(expected)
