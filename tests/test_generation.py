"""Sampling and the loop of `generate` and `stream`, with and without a graph."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recur
from recur import LanguageModel, presets
from recur.blocks import generation
from recur.blocks.generation import Loop
from recur.blocks.sampling import Sampling, sample_token, uniforms
from recur.train.tokenize import Bytes, pieces

IDS = torch.ones(1, 2, dtype=torch.long)
LETTERS = "abcdefghijk"


def model(recipe=None, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(recipe or presets.gla(heads=2), **{"vocab_size": 11, "dim": 16, "depth": 2, **options})


def decode(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


def draw(logits, rows: int, **options) -> torch.Tensor:
    """A token for each of `rows` seeds."""
    sampling = Sampling(**options)
    uniform = uniforms(torch.arange(rows), torch.tensor([0]))[0]
    return sample_token(sampling.kind, logits.expand(rows, -1), uniform, sampling.numbers(logits.device))


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"temperature": 0}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 0.3, "top_k": 1}, {0}),
        ({"top_p": 0.85, "top_k": 3}, {0, 1}),  # of 0.9, so that 0.5 and 0.3 are 0.89 of it
    ],
)
def test_sampling_keeps_what_it_promises(options, kept):
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert set(draw(logits, 400, **options).tolist()) == kept


@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
@pytest.mark.parametrize("temperature", [1e-308, 1e308])
def test_sampling_bears_any_temperature(temperature, options):
    logits = torch.tensor([3.0, 2.0, -torch.inf, 3.5])
    kept = {3} if temperature < 1 else {0, 1, 3}
    assert set(draw(logits, 400, temperature=temperature, **options).tolist()) == kept


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"min_p": 0.1}])
def test_sampling_follows_the_distribution(options):
    chance = torch.tensor([0.2, 0.5, 0.3])
    found = draw(chance.log(), 4000, **options).bincount(minlength=3) / 4000
    assert (found - chance).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations of a fair coin


@pytest.mark.parametrize("options", [{}, {"top_k": 3}])
def test_the_largest_uniform_number_takes_a_token_that_can_be_drawn(options):
    logits = torch.tensor([[0.1, 0.7, 0.2, 0.0]]).log()
    sampling = Sampling(**options)
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    last = {"plain": 2, "sorted": 0}[sampling.kind]  # of three, in their order or by what is likelier
    assert sample_token(sampling.kind, logits, largest, sampling.numbers(logits.device)).item() == last


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_uniform_numbers_are_those_of_splitmix64(seed, count):
    def mixed(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    wanted = mixed((mixed((seed + golden) % 2**64) + (count + 1) * golden) % 2**64) >> 11
    assert uniforms(torch.tensor([seed]), torch.tensor([count])).item() == wanted * 2.0**-53


# ---------------------------------------------------------------------- one loop, several ways through it


@pytest.fixture
def graphs(monkeypatch):
    """A GPU's graphs on a CPU: what is captured is called again. The list of captures."""
    captured = []

    class Graph:
        def __init__(self, call):
            self.replay = call

    def graph_of(call, device):
        captured.append(call)
        for _ in range(3):
            call()
        return Graph(call)

    monkeypatch.setattr(generation, "has_graphs", lambda device: True)
    monkeypatch.setattr(generation, "graph_of", graph_of)
    return captured


RECIPES = {
    "gla": lambda: presets.gla(heads=2),
    "mamba": presets.mamba,
    "rwkv": lambda: presets.rwkv(heads=2),
    "mlstm": lambda: presets.mlstm(heads=2),
    "llama": lambda: presets.llama(heads=2),
    "hybrid": lambda: [presets.hgrn2(heads=2), presets.llama(heads=2)],
}
SAMPLINGS = [{"temperature": 0}, {"min_p": 0.05}, {"top_k": 7, "top_p": 0.9}]


@pytest.mark.parametrize("name", RECIPES)
def test_graph_stream_and_rows_give_the_same_tokens(name, graphs, monkeypatch):
    lm, lengths = model(RECIPES[name]()), torch.tensor([9, 2, 5])
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(3))
    for options in SAMPLINGS:
        options = {**options, "seed": 5, "eos": 3}
        first = lm.generate(ids, 18, lengths=lengths, **options)
        streamed = torch.stack(list(lm.stream(ids, 18, lengths=lengths, **options)), 1)  # by the graph of the first
        with monkeypatch.context() as plain:
            plain.setattr(generation, "has_graphs", lambda device: False)
            for row, length in enumerate(lengths.tolist()):
                seed = 5 + (row << 32)
                alone = lm.generate(ids[row : row + 1, :length], 18, **{**options, "seed": seed})
                assert torch.equal(first[row, : length + 18], alone[0])
                assert torch.equal(streamed[row], alone[0, length : length + streamed.shape[1]])
    assert len(graphs) == 3  # one for each kind of sampling


def test_settings_seeds_and_weights_that_change_in_place_need_no_new_graph(graphs):
    lm = model()
    a = lm.generate(IDS, 20, temperature=0.5, seed=1)
    b = lm.generate(IDS, 20, temperature=5.0, seed=1)
    assert not torch.equal(a, b)
    with torch.no_grad():
        lm.embedding.weight.copy_(lm.embedding.weight.roll(1, 0))
    c = lm.generate(IDS, 20, temperature=0.5, seed=1)
    assert not torch.equal(a, c)
    assert len(graphs) == 1


def test_weights_that_were_replaced_are_captured_anew_and_old_graphs_are_freed(graphs, monkeypatch):
    lm = model()
    lm.generate(IDS, 3)
    lm.embedding.weight = torch.nn.Parameter(lm.embedding.weight.detach().clone())
    lm.generate(IDS, 3)
    assert len(graphs) == 2
    assert len(Loop._kept[lm]) == 1
    for batch in range(2, 9):
        lm.generate(IDS.expand(batch, -1), 3)
    assert len(Loop._kept[lm]) == generation.KEPT
    monkeypatch.setattr(generation, "graph_of", lambda call, device: SimpleNamespace(replay=lambda: None))
    lm = model()  # whose graphs hold no reference to it, as those of a GPU
    lm.generate(IDS, 3)
    models, alive = len(Loop._kept), weakref.ref(lm)
    del lm
    gc.collect()
    assert alive() is None
    assert len(Loop._kept) == models - 1


def test_calls_side_by_side_do_not_share_a_loop(graphs):
    lm = model()
    alone = [list(lm.stream(IDS, 6, seed=seed)) for seed in (1, 2)]
    both = [lm.stream(IDS, 6, seed=seed) for seed in (1, 2)]
    together = [[next(one) for one in both] for _ in range(6)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert len(graphs) == 2


def test_what_is_not_captured_runs_step_by_step_and_says_why(graphs, monkeypatch):
    lm = model()
    wanted = lm.generate(IDS, 5, temperature=0)
    seen = []
    hook = lm.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(recur.SlowPath, match=r"without a CUDA graph, because blocks\.0 has a forward hook"):
        assert torch.equal(lm.generate(IDS, 5, temperature=0), wanted)
    assert len(seen) == 5  # the prompt and four tokens
    hook.remove()
    with pytest.warns(recur.SlowPath, match="because its window is shorter than the text"):
        lm.generate(IDS, 5, window=3)

    def fails(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(generation, "graph_of", fails)
    with pytest.warns(recur.SlowPath, match="because its step cannot be captured: operation not permitted"):
        assert torch.equal(lm.eval().generate(IDS.expand(2, -1), 5, temperature=0)[:1], wanted)


def test_a_step_that_makes_a_new_state_is_not_replayed(graphs, monkeypatch):
    lm = model()
    wanted, step = lm.generate(IDS, 5, temperature=0), lm.step

    def anew(ids, state):
        logits = step(ids, state)
        state["position"] = state["position"].clone()
        return logits

    monkeypatch.setattr(lm, "step", anew)
    with pytest.warns(recur.SlowPath, match="because one of its parts returns a new state"):
        assert torch.equal(lm.generate(IDS.expand(2, -1), 5, temperature=0)[:1], wanted)


def test_a_cpu_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().generate(IDS, 5, window=3)


# ---------------------------------------------------------------------- where a row ends


def test_a_row_ends_with_the_token_that_completes_a_stop_string():
    lm = model()
    ids = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(0))
    whole = lm.generate(ids, 40, seed=2)
    stop = [decode(whole[0, 10:12].tolist()), decode(whole[1, 37:40].tolist()), "zz"]
    ended = lm.generate(ids, 40, seed=2, stop=stop, decode=decode, eos=10)
    streamed = torch.stack(list(lm.stream(ids, 40, seed=2, stop=stop, decode=decode, eos=10)), 1)
    for row in range(4):
        text = decode(whole[row, 3:].tolist())
        found = [text.index(word) + len(word) for word in [*stop, "k"] if word in text]
        end = min([*found, 40])
        wanted = torch.cat([whole[row, : 3 + end], torch.full((40 - end,), 10)])
        assert torch.equal(ended[row], wanted)
        assert torch.equal(streamed[row], wanted[3 : 3 + streamed.shape[1]])


def test_a_stream_ends_when_all_rows_have():
    lm = model()
    whole = lm.generate(IDS, 40, temperature=0)[0, 2:].tolist()
    stop = decode(whole[:3])
    assert len(list(lm.stream(IDS, 40, temperature=0, stop=[stop], decode=decode))) == 3
    eos = whole[0]
    assert len(list(lm.stream(IDS, 40, temperature=0, eos=eos))) == generation.BLOCK  # looked at once per block
    assert list(lm.stream(IDS[:0], 40)) == []
    assert list(lm.stream(IDS, 0)) == []


@given(st.text(), st.integers(0, 3))
def test_pieces_are_the_text_and_no_piece_ends_inside_a_character(text, broken):
    content = [*text.encode(errors="replace"), *[0xF0, 0x9F, 0x8D][:broken]]
    whole = Bytes().decode(content)
    found = list(pieces(content, Bytes().decode))
    assert "".join(found) == whole
    assert all(found)
    if not broken and "\ufffd" not in whole:
        assert len(found) == len(whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "generate: temperature must be >= 0, got -1"),
        ({"temperature": float("nan")}, "generate: temperature must be >= 0, got nan"),
        ({"top_k": 0}, "generate: top_k must be >= 1, got 0"),
        ({"top_p": 1.5}, r"generate: top_p must lie in \(0, 1\], got 1.5"),
        ({"min_p": 0.0}, r"generate: min_p must lie in \(0, 1\], got 0.0"),
        ({"stop": "ab", "decode": decode}, "generate: stop must be a list of strings, none of them empty, got 'ab'"),
        ({"stop": [""], "decode": decode}, r"generate: stop must be a list of strings, none of them empty, got \[''\]"),
        ({"stop": ["a"]}, "generate: stop needs decode, a function from a list of ids to a string"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_settings_out_of_range_are_refused_at_the_call(call, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(model(), call)(IDS, 3, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(value):
    lm = model(tie=False)
    with torch.no_grad():
        lm.head.weight[3] = value
    with pytest.raises(ValueError, match="generate: logits must be numbers, the largest of a row finite"):
        lm.generate(IDS, 3)


def test_a_wrong_option_of_stream_is_named():
    with pytest.raises(TypeError, match="generate: no option is called 'temprature'; did you mean temperature"):
        model().stream(IDS, 3, temprature=1)


@given(st.sampled_from(list(presets.names())), st.integers(0, 2**31 - 1), st.data())
def test_every_causal_preset_streams_what_it_generates(name, seed, data):
    recipe = getattr(presets, name)()
    if not recipe.causal:
        return
    torch.manual_seed(seed)
    lm = recur.LanguageModel(recipe, vocab_size=7, dim=64, depth=2)
    B, T, new = (data.draw(st.integers(1, n), label=label) for label, n in (("B", 3), ("T", 5), ("new", 4)))
    ids = torch.randint(0, 7, (B, T))
    wanted = lm.generate(ids, new, temperature=0)
    streamed = torch.stack(list(lm.stream(ids, new, temperature=0)), 1)
    assert torch.equal(streamed, wanted[:, T:])
    logits = lm.eval()(wanted[:, :-1])[:, T - 1 :]
    best = logits.topk(2).values  # the whole reading may round otherwise where two logits are one
    clear = (best[..., 0] - best[..., 1]) > 1e-4
    assert ((logits.argmax(-1) == streamed) | ~clear).all()
