"""What `generate` and `stream` promise, on a tiny model whose tokens are characters."""

import dataclasses

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import Sampling
from moe_jax.testing import random_model

PROMPTS = ["a", "To be, ", "What light through yonder window"]
SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7)


def alone(model, **options):
    return [moe_jax.generate(model, prompt, **options).tokens[0].tolist() for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_does_not_depend_on_its_batch(model, sampling):
    options = dict(max_new_tokens=20, sampling=sampling, stop_token_ids=())
    together = moe_jax.generate(model, PROMPTS, **options)
    assert together.tokens.tolist() == alone(model, **options)
    reordered = moe_jax.generate(model, PROMPTS[::-1], **options)
    assert reordered.tokens.tolist() == together.tokens.tolist()[::-1]


def test_bfloat16_generates_in_batches(directory):
    half = moe_jax.load(directory, dtype="bfloat16")
    out = moe_jax.generate(half, PROMPTS, max_new_tokens=6, sampling=SAMPLED, stop_token_ids=())
    assert out.lengths.tolist() == [6, 6, 6]


def test_greedy_follows_the_argmax_of_teacher_forcing(model):
    prompt = model.tokenizer.encode(PROMPTS[1])
    new = moe_jax.generate(model, [prompt], max_new_tokens=12, stop_token_ids=()).tokens[0].tolist()
    logits = np.asarray(moe_jax.logits(model, np.array([prompt + new])))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new


def test_samplings_of_one_batch_differ_by_request(model):
    seeds = [Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    out = moe_jax.generate(model, ["same"] * 3, max_new_tokens=16, sampling=seeds, stop_token_ids=())
    assert out.tokens[0].tolist() == out.tokens[2].tolist() != out.tokens[1].tolist()


def test_logprobs_are_the_models_own(model):
    prompt = model.tokenizer.encode(PROMPTS[2])
    sampling = Sampling(temperature=0.5, top_k=3, seed=3)
    out = moe_jax.generate(model, [prompt], max_new_tokens=8, sampling=sampling, stop_token_ids=(), logprobs=True)
    new = out.tokens[0].tolist()
    scores = jax.nn.log_softmax(moe_jax.logits(model, np.array([prompt + new]))[0, len(prompt) - 1 : -1])
    # float32, summed in another order by prefill than by decoding.
    np.testing.assert_allclose(out.logprobs[0], np.asarray(scores)[np.arange(8), new], atol=1e-4)


def test_routing_is_that_of_teacher_forcing(model):
    prompt = model.tokenizer.encode(PROMPTS[1])
    out = moe_jax.generate(model, [prompt], max_new_tokens=6, stop_token_ids=(), routed_experts=True)
    tokens = np.array([prompt + out.tokens[0].tolist()])
    _, routings = model.module.logits(tokens, np.array([tokens.shape[1]]))
    for layer, routing in enumerate(routings):
        want_TA = np.asarray(routing.experts_TA)
        n = len(prompt)
        np.testing.assert_array_equal(out.routing.prompt_experts_BLTA[0, layer, :n], want_TA[:n])
        np.testing.assert_array_equal(out.routing.experts_BLUA[0, layer], want_TA[n - 1 : -1])
        np.testing.assert_allclose(
            out.routing.weights_BLUA[0, layer], np.asarray(routing.weights_TA)[n - 1 : -1], atol=1e-5
        )


def test_stop_token_ends_a_request_and_not_its_batch(model):
    free = moe_jax.generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=())
    stop = int(free.tokens[0, 5])
    out = moe_jax.generate(model, PROMPTS, max_new_tokens=20, stop_token_ids=[stop])
    for tokens, length, reason, row in zip(out.tokens, out.lengths, out.stop_reasons, free.tokens, strict=True):
        want = row.tolist()[: row.tolist().index(stop) + 1] if stop in row else row.tolist()
        assert tokens[:length].tolist() == want
        assert (tokens[length:] == -1).all()
        assert reason == ("stop_token" if stop in row else "length")
    assert "stop_token" in out.stop_reasons


def test_stop_string_cuts_the_text_before_it(model):
    options = dict(max_new_tokens=60, stop_token_ids=())
    free = moe_jax.generate(model, PROMPTS, **options)
    stop = free.texts[1][20:22]
    out = moe_jax.generate(model, PROMPTS, stop=["never there", stop], **options)
    for text, reason, whole in zip(out.texts, out.stop_reasons, free.texts, strict=True):
        assert text == whole.split(stop)[0]
        assert reason == ("stop_string" if stop in whole else "length")
    assert "stop_string" in out.stop_reasons
    assert model.tokenizer.decode(out.tokens[1][: out.lengths[1]].tolist()).endswith(stop)


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "stop string"])
def test_stream_gives_the_tokens_of_generate(model, sampling, stops):
    options = dict(max_new_tokens=40, sampling=sampling, stop_token_ids=(), logprobs=True, routed_experts=True)
    if stops:
        options["stop"] = moe_jax.generate(model, PROMPTS, **options).texts[0][11:13]
    out = moe_jax.generate(model, PROMPTS, **options)
    pieces = list(moe_jax.stream(model, PROMPTS, **options))
    for request in range(len(PROMPTS)):
        mine = [piece for piece in pieces if piece.request == request]
        length = out.lengths[request]
        assert [piece.token for piece in mine] == out.tokens[request, :length].tolist()
        assert "".join(map(str, mine)) == out.texts[request]
        assert mine[-1].stop_reason == out.stop_reasons[request]
        np.testing.assert_array_equal(
            [piece.experts_LA for piece in mine], out.routing.experts_BLUA[request].swapaxes(0, 1)[:length]
        )


def test_a_second_call_in_the_same_bucket_compiles_nothing(model):
    def run(prompt, **options):
        return moe_jax.generate(model, prompt, **options)

    run("x" * 20, max_new_tokens=17, sampling=Sampling(temperature=1.0, top_k=5))
    with compilations() as count:
        run("y" * 30, max_new_tokens=30, sampling=Sampling(temperature=0.3, top_p=0.5, seed=9), stop_token_ids=[3, 4])
    assert count == []
    with compilations() as count:
        run("y" * 33, max_new_tokens=30, sampling=Sampling(temperature=0.3, top_p=0.5))
    assert len(count) >= 1  # another bucket: the counter does count


class compilations:
    """Counts XLA compilations inside a `with`."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __enter__(self):
        self.seen: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self.seen

    def _listen(self, event: str, duration_s: float, **_):
        if event == self.EVENT:
            self.seen.append(event)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def test_repetition_penalty_by_hand(model):
    """A penalty of 1e6 leaves no token of the prompt or of the text so far a chance while others are left."""
    sampling = Sampling(repetition_penalty=1e6)
    out = moe_jax.generate(model, "abc", max_new_tokens=16, sampling=sampling, stop_token_ids=())
    seen = model.tokenizer.encode("abc") + out.tokens[0].tolist()
    assert len(set(seen)) == len(seen)


def test_switch_generates_from_its_encoder():
    switch = random_model(
        dict(model_type="switch_transformers", vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2,
             num_decoder_layers=2, num_heads=2, num_experts=4, num_sparse_encoder_layers=1,
             num_sparse_decoder_layers=1, eos_token_id=1), scale=0.5)  # fmt: skip
    prompts = [[5], [7, 8, 9], list(range(2, 35))]
    options = dict(max_new_tokens=10, stop_token_ids=(), routed_experts=True)
    out = moe_jax.generate(switch, prompts, **options)
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        decoder = np.array([[0, *tokens.tolist()]])
        logits = moe_jax.logits(switch, np.array([prompt]), decoder_tokens_BU=decoder)
        assert np.asarray(logits)[0, :-1].argmax(-1).tolist() == tokens.tolist()
    pieces = list(moe_jax.stream(switch, prompts[1], **options))
    assert [piece.token for piece in pieces] == out.tokens[1].tolist()
    assert out.texts is None


def test_a_sharded_model_gives_the_same_tokens(directory, model):
    want = moe_jax.generate(model, PROMPTS, max_new_tokens=12, stop_token_ids=()).tokens
    for mesh, strategy in (("ep=2,tp=2", "eptp_psum"), ("tp=2", "tp")):
        sharded = moe_jax.load(directory, dtype="float32", mesh=mesh, strategy=strategy)
        up_EGFD = sharded.module.layers[0].feed_forward.up_EGFD[...]
        assert len(up_EGFD.sharding.device_set) == (4 if mesh == "ep=2,tp=2" else 2)
        out = moe_jax.generate(sharded, PROMPTS, max_new_tokens=12, stop_token_ids=())
        np.testing.assert_array_equal(out.tokens, want)


def test_a_model_without_tokenizer_takes_ids_only(model):
    bare = dataclasses.replace(model, tokenizer=None)
    ids = model.tokenizer.encode("hello")
    out = moe_jax.generate(bare, ids, max_new_tokens=5)
    assert out.texts is None
    assert out.tokens.tolist() == moe_jax.generate(model, "hello", max_new_tokens=5).tokens.tolist()
