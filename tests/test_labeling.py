"""Labeling functions against tables worked out by hand."""

import pytest
import torch

from bfpo_pl.batch import Annotations, Label
from bfpo_pl.labeling import BFPO, HelpfulnessOnly, LabelingFunction, Linear, SafetyFirst, SafetyOnly

pytestmark = pytest.mark.usefixtures("float64")

# The four quadrants, in the order of the tables: (chosen, rejected) safe-safe, safe-unsafe, unsafe-unsafe, unsafe-safe.
CHOSEN, REJECTED = (1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 1.0)


def flags(chosen=CHOSEN, rejected=REJECTED):
    return Annotations.of_pairs(chosen_safe=torch.tensor(chosen), rejected_safe=torch.tensor(rejected))


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize(
    ("labeling", "targets"),
    [
        (BFPO(), [0.5, 1.0, -0.5, -1.0]),  # the paper's values: b1 = 3, b3 = 1/2, alpha = 1/2
        (BFPO(b1=3.0, alpha=0.0), [1.0, 1.5, 0.0, -0.5]),
        (BFPO(b1=3.0, alpha=1.0), [0.0, 0.5, -1.0, -1.5]),
        (BFPO(b1=3.0, alpha=0.25), [0.75, 1.25, -0.25, -0.75]),
        (BFPO(b1=2.0, alpha=0.5), [0.5, 1.5, -0.5, -1.5]),
        (BFPO(b1=5.0, alpha=0.5), [0.5, 0.75, -0.5, -0.75]),
        (BFPO(b1=3.0, alpha=1.0, b3=1.0), [1.0, 2.0, -1.0, -2.0]),  # twice the paper's
        (BFPO(b1=3.0, alpha=0.2, b3=0.1), [0.0, 0.1, -0.2, -0.3]),
        (HelpfulnessOnly(), [0.5, 0.5, 0.5, 0.5]),
        (SafetyOnly(), [0.0, 0.5, 0.0, -0.5]),
        (SafetyFirst(), [0.5, 0.5, 0.5, -0.5]),
        (Linear(), [0.25, 0.5, 0.25, 0.0]),
        (Linear(w=0.0), [0.5, 0.5, 0.5, 0.5]),
        (Linear(w=1.0), [0.0, 0.5, 0.0, -0.5]),
        (Linear(w=0.75), [0.125, 0.5, 0.125, -0.25]),
    ],
    ids=repr,
)
def test_targets_of_the_four_quadrants(labeling, targets):
    label = labeling(flags())
    close(label.target, targets)
    assert label.target.shape == label.weights.shape == label.offsets.shape == label.probabilities.shape == (4,)
    assert not label.offsets.any()


@pytest.mark.parametrize("labeling", [BFPO(), HelpfulnessOnly(), SafetyFirst(), Linear()], ids=repr)
def test_every_pair_counts_fully_by_default(labeling):
    close(labeling(flags()).weights, [1.0, 1.0, 1.0, 1.0])


def test_safety_only_drops_ties():
    close(SafetyOnly()(flags()).weights, [0.0, 1.0, 0.0, 1.0])
    soft = SafetyOnly()(flags([0.5, 0.6, 0.3], [0.5, 0.5, 0.9]))
    close(soft.target, [0.0, 0.5, -0.5])
    close(soft.weights, [0.0, 1.0, 1.0])  # how much safer does not matter


def test_soft_flags():
    soft = flags([0.5, 0.9, 0.2], [0.5, 0.1, 0.8])
    close(BFPO()(soft).target, [0.0, 0.8, -0.6])  # 3/2 s_c - s_r/2 - 1/2
    close(Linear(w=0.5)(soft).target, [0.25, 0.45, 0.1])
    close(SafetyFirst()(soft).target, [0.5, 0.5, -0.5])


def test_a_soft_flag_gives_the_expected_label_of_sampled_flags():
    labeling, (p, q) = BFPO(b1=2.5, alpha=0.3), (0.7, 0.2)
    probability = torch.tensor([p * q, p * (1 - q), (1 - p) * (1 - q), (1 - p) * q])
    expected = (probability * labeling(flags()).target).sum()
    close(labeling(flags([p], [q])).target, [expected.item()])


def antisymmetric(labeling):
    """Whether swapping the responses of a pair negates its target when exactly one of them is safe."""
    _, safe_unsafe, _, unsafe_safe = labeling(flags()).target.tolist()
    safe_safe, _, unsafe_unsafe, _ = labeling(flags()).target.tolist()
    return safe_unsafe == pytest.approx(-unsafe_safe) and safe_safe == pytest.approx(-unsafe_unsafe)


@pytest.mark.parametrize(("b1", "b3"), [(3.0, None), (2.0, None), (5.0, None), (4.0, 0.2)])
def test_only_the_middle_alpha_makes_labels_antisymmetric(b1, b3):
    top = 1.0 if b3 is None else b3 * (b1 - 1)
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    assert [antisymmetric(BFPO(b1=b1, alpha=share * top, b3=b3)) for share in shares] == [
        share == 0.5 for share in shares
    ]


def test_probability_defaults_to_the_sign_of_the_target():
    close(Label(target=torch.tensor([2.0, 0.0, -0.1])).probabilities, [1.0, 0.5, 0.0])
    close(Label(target=torch.tensor([2.0]), probability=torch.tensor([0.3])).probabilities, [0.3])


# ---- Argument ranges


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BFPO(b1=1.0), ["BFPO", "b1", "1.0"]),
        (lambda: BFPO(b1=0.5), ["BFPO", "b1", "0.5"]),
        (lambda: BFPO(b1=-3.0), ["BFPO", "b1"]),
        (lambda: BFPO(b1=float("nan")), ["BFPO", "b1", "nan"]),
        (lambda: BFPO(b1=float("inf")), ["BFPO", "b1", "inf"]),
        (lambda: BFPO(b3=0.0), ["BFPO", "b3"]),
        (lambda: BFPO(b3=-0.5), ["BFPO", "b3", "-0.5"]),
        (lambda: BFPO(alpha=-0.01), ["BFPO", "alpha", "-0.01", "[0, 1]"]),
        (lambda: BFPO(alpha=1.01), ["BFPO", "alpha", "1.01", "[0, 1]"]),
        (lambda: BFPO(b1=2.0, alpha=1.01), ["BFPO", "alpha", "[0, 1]"]),
        (lambda: BFPO(b1=3.0, b3=0.25, alpha=0.51), ["BFPO", "alpha", "0.51", "[0, 0.5]"]),  # the top is b3 (b1 - 1)
        (lambda: BFPO(alpha=float("nan")), ["BFPO", "alpha", "nan"]),
        (lambda: Linear(w=1.01), ["Linear: w must", "1.01", "[0, 1]"]),
        (lambda: Linear(w=-0.01), ["Linear: w must", "-0.01"]),
    ],
)
def test_arguments_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match="must lie in") as error:
        make()
    assert [word for word in words if word not in str(error.value)] == []


def test_the_ends_of_alphas_range_are_allowed():
    assert BFPO(alpha=0).alpha == 0
    assert BFPO(alpha=1).alpha == 1
    assert BFPO(b1=3.0, b3=0.25, alpha=0.5).alpha == 0.5


@pytest.mark.parametrize("b1", [2.9, 4.7, 50.0])
def test_alpha_of_one_is_allowed_with_the_default_b3_written_out(b1):
    # In floating point (1/(b1 - 1)) * (b1 - 1) is 1 - 1e-16 for these.
    assert BFPO(b1=b1, b3=1 / (b1 - 1), alpha=1.0).alpha == 1.0


# ---- Columns


def test_columns_of_responses_are_looked_up_through_the_pair_table():
    # Three responses to one prompt, and all their pairs: best to worst is 2, 0, 1.
    annotations = Annotations(
        pairs=torch.tensor([[2, 0], [2, 1], [0, 1]]),
        response={"safe": torch.tensor([1.0, 0.25, 0.0])},
        pair={"gap": torch.tensor([1.0, 2.0, 1.0])},
    )
    close(annotations["chosen_safe"], [0.0, 0.0, 1.0])
    close(annotations["rejected_safe"], [1.0, 0.25, 0.25])
    close(annotations["safe"], [1.0, 0.25, 0.0])
    close(annotations["gap"], [1.0, 2.0, 1.0])
    close(BFPO()(annotations).target, [-1.0, -0.625, 0.875])
    assert len(HelpfulnessOnly()(annotations).target) == 3
    for name in ("gap", "safe", "chosen_safe", "rejected_safe"):
        assert name in annotations
    for name in ("chosen_gap", "chosen_", "other_safe", "chosen", "score"):
        assert name not in annotations


def test_a_pair_column_comes_before_the_look_up():
    annotations = Annotations(
        pairs=torch.tensor([[1, 0]]),
        response={"safe": torch.tensor([0.0, 1.0])},
        pair={"chosen_safe": torch.tensor([0.5])},
    )
    close(annotations["chosen_safe"], [0.5])
    close(annotations["rejected_safe"], [0.0])


@pytest.mark.parametrize("labeling", [BFPO(), SafetyOnly(), SafetyFirst(), Linear()], ids=repr)
def test_a_missing_column_is_named_with_those_there_are(labeling):
    annotations = Annotations(
        pairs=torch.tensor([[0, 1]]), response={"score": torch.ones(2)}, pair={"gap": torch.ones(1)}
    )
    with pytest.raises(KeyError, match=r"no column 'chosen_safe'.*gap, score"):
        labeling(annotations)


def test_a_missing_column_of_an_empty_batch():
    with pytest.raises(KeyError, match="Its columns: none"):
        Annotations(pairs=torch.zeros(0, 2, dtype=torch.long))["chosen_safe"]


def test_requirements_are_what_is_read():
    for labeling in (BFPO(), SafetyOnly(), SafetyFirst(), Linear()):
        assert set(labeling.requires.columns) == {"chosen_safe", "rejected_safe"}
    assert HelpfulnessOnly().requires.columns == ()
    HelpfulnessOnly()(Annotations(pairs=torch.tensor([[0, 1]])))  # needs no column indeed


@pytest.mark.parametrize("labeling", [BFPO(), HelpfulnessOnly(), SafetyOnly(), SafetyFirst(), Linear()], ids=repr)
def test_a_batch_without_pairs(labeling):
    label = labeling(flags([], []))
    assert label.target.shape == label.weights.shape == (0,)
    assert isinstance(labeling, LabelingFunction)
    assert labeling.unit == "pair"


def test_repr_shows_the_resolved_arguments():
    assert repr(BFPO()) == "BFPO(b1=3.0, b3=0.5, alpha=0.5)"
    assert repr(Linear(w=1)) == "Linear(w=1.0)"
    assert repr(SafetyOnly()) == "SafetyOnly()"
