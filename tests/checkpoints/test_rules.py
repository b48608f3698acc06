"""Rules against arithmetic by hand, and tables that contradict themselves."""

import numpy as np
import pytest

from moe_jax.checkpoints import Rule
from moe_jax.checkpoints.rules import Copy, Ignored, copies, spellings


@pytest.mark.parametrize(
    ("rearrange", "tensor_shape", "shape", "expected"),
    [
        (None, (6, 4), (6, 4), lambda x: x),
        ("(n h) d -> n h d", (6, 4), (2, 3, 4), lambda x: x.reshape(2, 3, 4)),
        ("d (n h) -> n h d", (4, 6), (2, 3, 4), lambda x: np.moveaxis(x.reshape(4, 2, 3), 0, 2)),
        ("e d (f g) -> e g f d", (2, 4, 6), (2, 2, 3, 4), lambda x: x.reshape(2, 4, 3, 2).transpose(0, 3, 2, 1)),
        ("(n h) -> n h", (6,), (2, 3), lambda x: x.reshape(2, 3)),
    ],
)
def test_rearranges_and_back(rearrange, tensor_shape, shape, expected):
    rule = Rule("hf", "ours", rearrange)
    tensor = np.arange(np.prod(tensor_shape)).reshape(tensor_shape)
    assert rule.tensor_shape(shape) == tensor_shape
    ours = rule.to_ours(tensor, shape)
    np.testing.assert_array_equal(ours, expected(tensor), strict=True)
    assert np.shares_memory(ours, tensor)
    np.testing.assert_array_equal(rule.to_hf(ours), tensor, strict=True)


def test_rearranges_the_slice():
    rule = Rule("experts.{expert}.w", "up_EFD", "(f d) -> f d", at=("{expert}",))
    assert rule.tensor_shape((7, 2, 3)) == (6,)
    np.testing.assert_array_equal(rule.to_ours(np.arange(6), (7, 2, 3)), [[0, 1, 2], [3, 4, 5]])


def test_spellings_list_every_tensor(toy):
    one_by_one, fused = spellings("layers.1.moe.up_EGFD", (4, 2, 5, 8), toy.rules)
    assert [part.name for part in fused] == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert {(part.name, part.at) for part in one_by_one} == {
        (f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight", (expert, half))
        for expert in range(4)
        for half, name in enumerate(("gate", "up"))
    }


def test_same_slices_again_are_another_spelling():
    rules = [Rule(f"{name}.{{expert}}", "up_ED", at=("{expert}",)) for name in ("new", "old")]
    assert [[part.name for part in parts] for parts in spellings("up_ED", (2, 3), rules)] == [
        ["new.0", "new.1"],
        ["old.0", "old.1"],
    ]


def test_numbers_are_whole_and_dots_are_dots():
    rules = [Rule("h.{layer}.w", "layers.{layer}.w")]
    assert spellings("layers.12.w", (1,), rules)[0][0].name == "h.12.w"
    for path in ("layers.1x.w", "layersX1.w", "layers.1.w2", "a.layers.1.w"):
        with pytest.raises(ValueError, match=f"no rule fills the parameter {path}"):
            spellings(path, (1,), rules)
    assert copies("a", [Copy("b", "a")]) == ["b"]
    assert Ignored("h.{layer}.buffer", "why").matches("h.3.buffer")
    assert not Ignored("h.{layer}.buffer", "why").matches("h.3.buffer.more")


@pytest.mark.parametrize(
    "rearrange", ["(n h) d -> n h", "n n -> n", "n h d -> n h (d e)", "(n h) d", "(n (h d)) -> n h d"]
)
def test_unbalanced_rearrangements_are_refused(rearrange):
    with pytest.raises(ValueError, match=r"expected the same names on both sides.*got"):
        Rule("hf", "ours", rearrange)


def test_rank_is_checked():
    with pytest.raises(ValueError, match=r"'\(n h\) d -> n h d' makes 3 dimensions, got shape \[6, 4\]"):
        Rule("hf", "ours", "(n h) d -> n h d").tensor_shape((6, 4))


def test_undetermined_numbers_are_refused():
    with pytest.raises(ValueError, match=r"expected \['expert'\] to occur"):
        Rule("layers.{layer}.experts.{expert}.w", "layers.{layer}.w")


def test_slices_left_over_are_refused():
    rules = [Rule("gate.{expert}", "up_EGFD", at=("{expert}", 0))]
    with pytest.raises(ValueError, match=r"up_EGFD \[4, 2, 5, 8\]: expected 8 slices to be filled once, got 4"):
        spellings("up_EGFD", (4, 2, 5, 8), rules)
