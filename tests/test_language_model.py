"""The language model: read whole, in pieces, token by token, packed; continued in batches that equal their rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

import recur
from recur import LanguageModel, Recipe, RecipeError, presets
from recur.blocks import Attention, Block, GatedAttention, Norm, Project, Rotary
from recur.blocks.feedforward import gelu
from recur.presets.gateloop import relative

ATTENTION = Recipe(
    Project("x", q="H K", k="G K", v="G K"),
    Rotary("q k"),
    Attention(),
    Project("y", y="D"),
    axes={"H": 4, "G": 2, "K": "D/H"},
)
RELATIVE = presets.gateloop_attention(heads=2, positions=relative(), read=GatedAttention())


def model(**options) -> LanguageModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "dim": 16, "depth": 2, **options}
    return LanguageModel(settings.pop("recipe", presets.gla(heads=2)), **settings).double()


VARIANTS = {
    "plain": {},
    "hybrid": {"recipe": [presets.longhorn(state=4), ATTENTION], "depth": 3, "ffn": "swiglu"},
    "post norm": {"block": "post", "norm": "layer", "ffn": "gelu", "tie": False},
    "learned positions": {"positions": 40, "ffn": "gated"},
    "sinusoidal": {"positions": "sinusoidal", "ffn": gelu(hidden="3*D", bias=False)},
    "dense": {"recipe": presets.dense_retnet(heads=2, layers=2), "depth": 3, "dim": 32},
    "shared bounds": {"recipe": presets.hgrn2(heads=2), "depth": 3},
    "own norm": {"recipe": presets.gss(state=3), "norm": None, "final_norm": "layer"},
    "taps": {"recipe": presets.gated_tap_conv(heads=2), "norm": None, "frozen": True},
    "nonlinear": {"recipe": presets.gated_rnn(), "tie": False, "head_bias": True, "final_norm": None, "drop": "sum"},
    "relative": {"recipe": RELATIVE, "outputs": 7, "tie": False},
    "l2": {"recipe": presets.gateloop(), "norm": Norm("x", kind="l2", eps=1e-12, to="y")},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_equals_pieces_equals_steps_equals_packed(name):
    lm, ids = model(**VARIANTS[name]), torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = lm(ids)
    head, state = lm(ids[:, :5], return_state=True)
    tail, _ = lm(ids[:, 5:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole)
    for max_len in (None, 12):
        state = lm.init_state(2, max_len)
        torch.testing.assert_close(torch.stack([lm.step(token, state) for token in ids.T], 1), whole)
    packed, states = lm(ids.reshape(1, -1), cu_seqlens=torch.tensor([0, 12, 12, 24]), return_state=True)
    torch.testing.assert_close(packed.reshape(whole.shape), whole)
    assert states["position"].tolist() == [12, 0, 12]


@pytest.mark.parametrize("name", ["plain", "hybrid", "own norm"])
def test_a_step_writes_into_the_memory_it_is_given(name):
    lm = model(**VARIANTS[name])
    state = lm.init_state(2, 12)
    places = [leaf.data_ptr() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    for token in torch.randint(0, 11, (3, 2)):
        lm.step(token, state)
    assert places == [leaf.data_ptr() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    assert state["position"].tolist() == [3, 3]


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_changes_no_gradient(name):
    ids = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(2))
    grads = []
    for checkpoint in (False, True):
        lm = model(**VARIANTS[name], checkpoint=checkpoint)
        lm(ids).square().sum().backward()
        grads.append([weight.grad for weight in lm.parameters() if weight.grad is not None])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["plain", "hybrid", "learned positions"])
def test_a_batch_of_prompts_equals_its_rows(name):
    lm, lengths = model(**VARIANTS[name]), torch.tensor([9, 2, 5])
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(3))
    options = {"max_new_tokens": 8, "temperature": 0.9, "top_k": 7, "top_p": 0.95}
    batch = lm.generate(ids, seed=5, lengths=lengths, **options)
    assert batch.shape == (3, 17)
    for row, length in enumerate(lengths.tolist()):
        alone = lm.generate(ids[row : row + 1, :length], seed=5 + (row << 32), **options)
        assert torch.equal(batch[row, : length + 8], alone[0])
        assert (batch[row, length + 8 :] == 0).all()
    first = lm.generate(ids[:1], seed=5, **options)
    assert torch.equal(first[0], lm.generate(ids, seed=5, **options)[0])
    assert not torch.equal(first, lm.generate(ids[:1], seed=6, **options))


def test_greedy_generation_follows_the_whole_pass():
    lm, ids = model(), torch.tensor([[1, 2, 3]])
    text = lm.generate(ids, 6, temperature=0)
    for end in range(3, 9):
        assert text[0, end] == lm(text[:, :end])[0, -1].argmax()


@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 5, 4])])
@pytest.mark.parametrize("window", [1, 4, 7, 99])
def test_a_window_forgets_what_lies_before_it(window, lengths):
    lm, ids = model(recipe=presets.longhorn(state=3)), torch.randint(0, 11, (3, 5))
    text = lm.generate(ids, 6, temperature=0, lengths=lengths, window=window)
    for row, length in zip(text, [5, 5, 5] if lengths is None else lengths.tolist(), strict=True):
        for end in range(length, length + 6):
            assert lm(row[None, max(0, end - window) : end])[0, -1].argmax() == row[end]


def test_the_loss_is_that_of_the_next_token():
    lm, ids = model(), torch.randint(0, 11, (2, 6))
    chance = lm(ids).log_softmax(-1)
    each = [-chance[row, t, ids[row, t + 1]] for row in range(2) for t in range(5)]
    torch.testing.assert_close(lm.loss(ids), sum(each) / 10)


def test_a_frozen_embedding_stays_and_its_model_trains():
    lm = model(tie=False, head_bias=True, frozen=True)
    lm.loss(torch.randint(0, 11, (2, 6))).backward()
    still = [name for name, weight in lm.named_parameters() if weight.grad is None]
    assert still == ["embedding.weight", "head.weight", "head.bias"]
    trained = {id(weight) for group in lm.decay_groups(0.1) for weight in group["params"]}
    assert trained == {id(weight) for weight in lm.parameters() if weight.requires_grad}


@pytest.mark.parametrize(("drop", "left"), [("branch", 1.0), ("sum", 0.0)])
def test_dropout_takes_the_branch_or_the_whole_stream(drop, left):
    """Everything is dropped, so that of the embedding all is left, or nothing."""
    lm = model(drop=drop, dropout=(0.0, 1.0, 1.0), ffn="gelu", final_norm=None).train()
    ids = torch.randint(0, 11, (2, 6))
    table = lm.embedding.weight
    torch.testing.assert_close(lm(ids), left * table[ids] @ table.T)


def test_a_row_that_has_ended_repeats_its_end_and_modes_come_back():
    lm, ids = model(dropout=0.5), torch.randint(0, 11, (4, 3))
    greedy = lm.eval().generate(ids, 12, temperature=0)
    lm.train()
    lm.blocks[0].eval()
    ended = lm.generate(ids, 12, temperature=0, eos=int(greedy[0, 5]))
    assert torch.equal(ended[0, :6], greedy[0, :6])
    assert (ended[0, 5:] == greedy[0, 5]).all()
    assert lm.training
    assert not lm.blocks[0].training


def test_no_rows_give_no_rows():
    assert model().generate(torch.empty(0, 3, dtype=torch.long), 4).shape == (0, 7)


def test_a_text_of_no_tokens_keeps_its_graph():
    x = torch.randn(1, 0, 16, requires_grad=True)
    recur.Mixer(presets.hgrn2(heads=2), 16)(x).y.sum().backward()
    assert x.grad is not None


def test_what_pads_a_prompt_is_not_read():
    lm, ids = model(), torch.tensor([[1, 2, -100], [3, 4, 5]])
    text = lm.generate(ids, 4, lengths=torch.tensor([2, 3]), seed=1)
    assert torch.equal(text[:1, :6], lm.generate(ids[:1, :2], 4, seed=1))


def test_generation_draws_anew_without_a_seed_and_as_torch_is_seeded():
    lm, ids = model(), torch.tensor([[1]])
    torch.manual_seed(3)
    first, after = lm.generate(ids, 12), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(lm.generate(ids, 12), first)
    assert torch.equal(torch.rand(1), after)
    assert len({tuple(lm.generate(ids, 12)[0].tolist()) for _ in range(4)}) > 1


IDS = torch.ones(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda lm: lm(torch.ones(2, 3)), TypeError, "ids must be int32 or int64, got torch.float32"),
        (lambda lm: lm(torch.tensor([1])), recur.ShapeError, r"ids must be \[B T\], got shape \(1,\)"),
        (lambda lm: lm(torch.tensor([[3, 11]])), ValueError, r"ids must lie in 0 .. 10, got 11"),
        (lambda lm: lm(torch.tensor([[-1, 3]])), ValueError, r"ids must lie in 0 .. 10, got -1"),
        (lambda lm: lm.generate(torch.empty(1, 0, dtype=torch.long), 3), ValueError, "needs a prompt"),
        (lambda lm: lm.generate(IDS, -1), ValueError, "needs a prompt"),
        (
            lambda lm: lm.generate(IDS, 1, eos=11),
            ValueError,
            r"eos must be one id in 0 .. 10, got 11",
        ),
        (
            lambda lm: lm.generate(IDS, 1, lengths=[1]),
            TypeError,
            r"lengths must be an int32 or int64 tensor \[B\], got \[1\]",
        ),
        (
            lambda lm: lm.generate(IDS, 3, lengths=torch.tensor([3])),
            ValueError,
            r"lengths must be \[B\] within 1 .. T=2, got \[3\]",
        ),
        (lambda lm: model(depth=0), ValueError, "depth must be at least 1, got 0"),
        (lambda lm: model(recipe=[]), ValueError, "recipes must be at least 1, got 0"),
        (lambda lm: lm.generate(IDS, 1, window=0), ValueError, "window must be at least 1, got 0"),
        (lambda lm: model(head_bias=True), ValueError, "outputs and head_bias need a head of its own: tie=False"),
        (lambda lm: model(drop="all"), RecipeError, 'drop must be "branch" or "sum", got \'all\''),
        (
            lambda lm: Block(presets.gated_linear_rnn(width=5), 4),
            RecipeError,
            r"mixer must write y \[D\] to be added to x, got \[5\] for D=4",
        ),
        (
            lambda lm: model(**VARIANTS["taps"]).step(IDS[:, 0], model(**VARIANTS["taps"]).init_state(1, 0)),
            ValueError,
            r"TapConv: init_state\(max_len=0\) is too short for 1 tokens",
        ),
        (lambda lm: model(block="both"), RecipeError, 'order must be "pre" or "post", got \'both\''),
        (
            lambda lm: model(ffn="moe"),
            RecipeError,
            "ffn must be None, a Recipe or one of gelu, swiglu, gated, channel_mix, key_mix, got 'moe'",
        ),
        (lambda lm: model(positions="rotary"), ValueError, "positions must be None"),
        (
            lambda lm: model(positions=3)(torch.ones(1, 4, dtype=torch.long)),
            ValueError,
            "has 3 learned positions, got a sequence",
        ),
        (
            lambda lm: model(recipe=ATTENTION)(
                torch.ones(1, 4, dtype=torch.long), model(recipe=ATTENTION).init_state(1, 3)
            ),
            ValueError,
            r"init_state\(max_len=3\) is too short for 4 tokens",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(model())


@pytest.mark.parametrize("name", presets.names())
def test_gates_norms_and_biases_never_decay(name):
    lm = LanguageModel(getattr(presets, name)(), vocab_size=5, dim=32, depth=2)
    decayed, kept = (group["params"] for group in lm.decay_groups(0.1))
    assert {id(weight) for weight in lm.parameters()} == {id(weight) for weight in (*decayed, *kept)}
    special = ("A_log", "bias", "logits", "rho", "eta", "C_real", "C_imag", ".D", "norm", "fusion")
    names = {id(weight): key for key, weight in lm.named_parameters()}
    assert not [names[id(weight)] for weight in decayed if any(word in names[id(weight)] for word in special)]
    assert all(weight.ndim == 2 for weight in decayed)


def test_time_constants_stay_float32_in_a_half_model():
    lm = LanguageModel(presets.mamba(state=4), vocab_size=5, dim=16, depth=1).to(torch.bfloat16)
    kinds = {name.rsplit(".", 1)[1]: weight.dtype for name, weight in lm.named_parameters()}
    assert kinds["A_log"] == kinds["dt_bias"] == kinds["D"] == torch.float32
    assert lm.embedding.weight.dtype == torch.bfloat16
    logits, state = lm(torch.ones(1, 3, dtype=torch.long), return_state=True)
    assert logits.dtype == torch.bfloat16
    assert state["layers"][0]["mixer"]["parts"]["selective_scan"].dtype == torch.float32


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_trains_under_autocast(name):
    lm = LanguageModel(getattr(presets, name)(), vocab_size=5, dim=32, depth=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lm(torch.randint(0, 5, (2, 9))).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in lm.parameters() if weight.grad is not None)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so itself
@pytest.mark.parametrize("name", ["plain", "hybrid", "shared bounds", "dense", "taps", "relative"])
def test_a_whole_model_compiles_to_one_graph(name):
    lm, ids = model(**VARIANTS[name]), torch.randint(0, 11, (2, 6))
    torch.compiler.reset()
    compiled = torch.compile(lm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), lm(ids))


def test_second_gradients_exist():
    lm, ids = model(), torch.randint(0, 11, (1, 5))
    weights = list(lm.parameters())
    grads = torch.autograd.grad(lm(ids).logsumexp(-1).sum(), weights, create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in weights)
