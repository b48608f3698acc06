"""A module's graph is found once and kept; its arrays never are."""

import gc
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

import moe_jax
from moe_jax import graph

PROMPT = [5, 9, 3]


@pytest.fixture
def model(directory):
    """One of its own for each test, which may change it."""
    return moe_jax.load(directory, dtype="float32")


def tokens(model):
    return moe_jax.generate(model, [PROMPT], max_new_tokens=8, stop_token_ids=()).tokens.tolist()


def fresh(module):
    """The same module, split for the first time."""
    return nnx.merge(*nnx.split(module))


def test_the_leaves_are_those_of_nnx(model):
    for _ in range(2):
        leaves, module = graph.split(model.module)
        graphdef, state = nnx.split(model.module)
        assert module.graphdef == graphdef
        assert all(ours is theirs for ours, theirs in zip(leaves, jax.tree.leaves(state), strict=True))


def test_an_unchanged_module_keeps_its_graph(model):
    assert graph.split(model.module)[1] is graph.split(model.module)[1]


def set_a_value(module):
    weight = module.layers[1].attention.v_KHD
    weight[...] = -weight[...]


def replace_a_parameter(module):
    weight = module.layers[1].attention.v_KHD
    module.layers[1].attention.v_KHD = nnx.Param(-weight[...], **weight.get_metadata())


def replace_a_part(module):
    module.layers[0].feed_forward, module.layers[1].feed_forward = (
        module.layers[1].feed_forward,
        module.layers[0].feed_forward,
    )


def share_a_part(module):
    module.layers[1].feed_forward = module.layers[0].feed_forward


def change_a_setting(module):
    module.layers[1].attention.window = 2


@pytest.mark.parametrize("change", [set_a_value, replace_a_parameter, replace_a_part, share_a_part, change_a_setting])
def test_a_changed_module_computes_with_what_it_has_now(model, change):
    prompts = np.array([[*PROMPT, 1, 2, 3, 4]])
    before = np.asarray(moe_jax.logits(model, prompts))
    change(model.module)
    after = np.asarray(moe_jax.logits(model, prompts))
    assert (before != after).any()
    lengths = np.full((1,), prompts.shape[1])
    np.testing.assert_allclose(after, fresh(model.module).logits(prompts, lengths)[0], rtol=1e-4, atol=1e-4)


def test_replaced_arrays_are_not_kept(model):
    tokens(model)
    weight = model.module.layers[0].attention.v_KHD
    old = weakref.ref(weight[...])
    replace_a_parameter(model.module)
    model.module.layers[0].attention.v_KHD = nnx.Param(np.zeros(weight.shape, np.float32), **weight.get_metadata())
    del weight
    gc.collect()
    assert old() is None


def test_compile_leaves_nothing_to_compile(model):
    compiled = moe_jax.compile(model, prompt_length=len(PROMPT), max_new_tokens=8)
    assert compiled.seconds > 0 and (compiled.prompt_bucket, compiled.new_bucket) == (16, 16)
    leaves = graph.split(model.module)[0]
    assert compiled.argument_bytes >= sum(leaf.nbytes for leaf in leaves)
    events = []
    listen = lambda name, seconds, **_: events.append(name)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    tokens(model)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not [name for name in events if "backend_compile" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch=0, prompt_length=3), "expected batch to be a whole number of at least 1, got 0"),
        (dict(prompt_length=2.0), r"expected prompt_length to be a whole number of at least 1, got 2\.0"),
        (dict(prompt_length=3, max_new_tokens=0), "expected max_new_tokens"),
        (dict(prompt_length=300), "within the context of 256 positions"),
    ],
)
def test_compile_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        moe_jax.compile(model, **options)
