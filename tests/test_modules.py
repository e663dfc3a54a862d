"""Models are modules of torch, with hooks, compile, pruning, parametrizations, pickle, casts, fake tensors and threads;
and states go on, or are refused, where they are handed."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_execution_device_hook
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._pytree import tree_leaves, tree_map

from recur import LanguageModel, Mixer, Part, Recipe, RecipeError, ShapeError, presets
from recur.blocks import Along, Dropout, Learned, LowerBounds, Project, Scale, Sum, in_series
from recur.blocks.language_model import Block, StreamNorm
from recur.shapes import readable
from recur.weights import Param, Weights, cut_normal, declared

IDS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))


def model(recipe: Recipe | None = None, **options: Any) -> LanguageModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": 11, "dim": 16, "depth": 2, "ffn": "swiglu", "tie": False, **options}
    return LanguageModel(presets.hgrn2(heads=2) if recipe is None else recipe, **settings)


def preset(name: str) -> Recipe:
    return getattr(presets, name)()


def grid_of(recipe: Recipe) -> dict[str, tuple[int, int]]:
    return {"grid": (2, 3)} if any(isinstance(part, Along) for part in recipe.parts) else {}


CAUSAL = [name for name in presets.names() if preset(name).causal]
LAYERS = ("embedding", "positions", "blocks.0", "blocks.0.mixer", "blocks.0.ffn", "blocks.0.mixer_norm", "final_norm")
LAYERS += ("blocks.1.ffn_norm", "blocks.0.mixer.parts.project", "head")


# ---------------------------------------------------------------------- hooks, compile()


def whole(lm: LanguageModel) -> Any:
    return lm(IDS)


def step(lm: LanguageModel) -> Any:
    return lm.step(IDS[:, 0], lm.init_state(2))


def generate(lm: LanguageModel) -> Any:
    return lm.generate(IDS, 2, temperature=0)


@pytest.mark.parametrize("run", [whole, step, generate])
def test_forward_hooks_fire_at_every_layer(run: Callable[[LanguageModel], Any]) -> None:
    lm, fired = model(positions=9), set()
    for name in LAYERS:
        layer = lm.get_submodule(name)
        layer.register_forward_pre_hook(lambda module, args, name=name: fired.add((name, "before")))
        layer.register_forward_hook(
            lambda module, args, kwargs, out, name=name: fired.add((name, "after")), with_kwargs=True
        )
    run(lm)
    assert fired == {(name, when) for name in LAYERS for when in ("before", "after")}


@pytest.mark.parametrize("name", CAUSAL)
def test_forward_hooks_fire_at_every_module_with_weights(name: str) -> None:
    lm = LanguageModel(preset(name), vocab_size=11, dim=32, depth=2, tie=False)
    fired: list[str] = []
    owners = [name for name, module in lm.named_modules() if isinstance(module, Weights)]
    for owner in owners:
        lm.get_submodule(owner).register_forward_hook(lambda module, args, out, owner=owner: fired.append(owner))
    lm(IDS)
    assert set(fired) == set(owners)
    fired.clear()
    lm.step(IDS[:, 0], lm.init_state(2))
    assert set(fired) == set(owners)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # ids have no gradient
@pytest.mark.parametrize("checkpoint", [False, True])
def test_backward_hooks_fire_at_every_layer(checkpoint: bool) -> None:
    lm, fired = model(positions=9, checkpoint=checkpoint), {}
    for name in LAYERS:
        lm.get_submodule(name).register_full_backward_hook(
            lambda module, into, out, name=name: fired.update({name: out[0].norm().item()})
        )
    lm.loss(IDS).backward()
    assert set(fired) == set(LAYERS)
    assert min(fired.values()) > 0


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", CAUSAL)
def test_backward_hooks_fire_at_every_module_with_weights(name: str) -> None:
    """And change no gradient. What reads nothing of the flow has no input whose gradient could fire the second kind."""
    torch.manual_seed(0)
    lm = LanguageModel(preset(name), vocab_size=11, dim=32, depth=2, tie=False).double()
    lm.loss(IDS).backward()
    want = {key: weight.grad for key, weight in lm.named_parameters()}
    lm.zero_grad(set_to_none=True)
    fired: set[str] = set()
    owners = [key for key, module in lm.named_modules() if isinstance(module, Weights) and list(module.parameters())]
    for owner in owners:
        module = lm.get_submodule(owner)
        module.register_full_backward_hook(lambda module, into, out, owner=owner: fired.add(owner))
        module.register_full_backward_pre_hook(lambda module, out, owner=owner: fired.add(owner + ", before"))
    lm.loss(IDS).backward()
    learning = {key for key in owners if any(want[f"{key}.{n}"] is not None for n in lm.get_submodule(key).declared)}
    parts = dict(zip(preset(name).body.keys(), preset(name).parts, strict=True))
    reading = {key for key in learning if not isinstance(parts.get(key.rpartition(".")[2]), (Learned, LowerBounds))}
    assert reading
    assert reading | {f"{key}, before" for key in learning} <= fired
    for key, weight in lm.named_parameters():
        if want[key] is not None:
            torch.testing.assert_close(weight.grad, want[key])


def test_a_backward_hook_at_a_part_sees_its_gradients() -> None:
    """Those of what it writes, and of what it reads through this part alone."""
    recipe = Recipe(Project("x", u="D"), Scale("u", "3"), Project("u", y="D"), Project("x u", w="D"), Sum("y w"))
    mixer, seen = Mixer(recipe, 4), {}

    def keep(module: nn.Module, into: Any, out: Any) -> None:
        seen["into"], seen["out"] = ([grad for grad in grads if grad is not None] for grads in (into, out))

    mixer.parts["scale"].register_full_backward_hook(keep)
    mixer.parts["scale"].register_full_backward_pre_hook(lambda module, out: (out[0] * 2, *out[1:]))
    y = mixer(torch.randn(1, 2, 4, requires_grad=True)).y
    y.sum().backward()
    _, second, third = (mixer.parts[name].weight for name in ("project", "project_2", "project_3"))
    slope = (second.sum(0) + third.sum(0)[4:]).detach().expand(1, 2, 4)
    torch.testing.assert_close(seen["out"], [2 * slope])
    torch.testing.assert_close(seen["into"], [torch.zeros_like(slope), 6 * slope])  # of x, and of u


def test_a_loss_is_of_the_logits_that_a_hook_at_the_head_returns() -> None:
    lm, targets = model(tie=False, head_bias=True), IDS.clone()
    targets[0, :3] = -100
    plain = lm(IDS, targets=targets)
    handle = lm.head.register_forward_hook(lambda module, args, out: 0.5 * out)
    want = nn.functional.cross_entropy(lm(IDS).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(lm(IDS, targets=targets), want)
    assert not torch.allclose(want, plain)
    handle.remove()
    torch.testing.assert_close(lm(IDS, targets=targets), plain)


def test_a_pruned_head_acts_pruned_in_the_loss() -> None:
    lm = model(tie=False)
    prune.random_unstructured(lm.head, "weight", amount=0.5)
    with torch.no_grad():
        lm.head.weight_orig.mul_(3)
    want = nn.functional.cross_entropy(lm(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
    lm.head.weight_orig.data.div_(3)
    lm(IDS)  # the mask applied to other numbers
    lm.head.weight_orig.data.mul_(3)
    torch.testing.assert_close(lm.loss(IDS), want)


def test_parts_that_one_kernel_may_compute_are_called_where_a_hook_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is taken for a mixer that nothing watches, and not for one with a hook at its gate."""
    mixer, x = Mixer(presets.gla(heads=2), 16), torch.randn(1, 3, 16)
    ((keys, fused),) = [stage for stage in mixer.recipe.body.stages if len(stage[0]) > 1]
    asked: list[bool] = []
    monkeypatch.setattr(type(fused), "_options", lambda *given: asked.append(True))
    monkeypatch.setattr("recur.blocks.leave.kernel.fused", lambda *given, **options: options == {"compiler": True})
    mixer(x)
    assert asked == [True]
    for key in keys:
        handle = mixer.parts[key].register_forward_hook(lambda module, args, out: None)
        mixer(x)
        handle.remove()
    assert asked == [True]


@pytest.mark.parametrize("name", ["embedding", "blocks.0.mixer", "blocks.0.ffn", "final_norm", "head"])
def test_what_a_hook_returns_takes_the_place_of_the_output(name: str) -> None:
    lm = model()
    before, stepped = lm(IDS), step(lm)

    def silence(module: nn.Module, args: Any, out: Any) -> Any:
        return out * 0 if isinstance(out, Tensor) else (out[0] * 0, out[1])

    handle = lm.get_submodule(name).register_forward_hook(silence)
    assert not torch.allclose(lm(IDS), before)
    assert not torch.allclose(step(lm), stepped)
    handle.remove()
    torch.testing.assert_close(lm(IDS), before)


def test_a_hook_at_a_mixer_alone_fires_in_its_steps() -> None:
    mixer, seen = Mixer(presets.gla(heads=2), 16), []
    mixer.register_forward_hook(lambda module, args, out: seen.append(out.y.shape))
    mixer.step(torch.randn(3, 16), mixer.init_state(3))
    assert seen == [(3, 1, 16)]


def ignore_dynamo(test: Any) -> Any:
    """What Dynamo itself is warned of while it traces."""
    for words in (
        ".*should not be instantiated",
        ".*torch.jit.script. is deprecated",
        "The .grad attribute of a Tensor",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{words}")(test)
    return test


@ignore_dynamo
@pytest.mark.parametrize("name", LAYERS)
def test_compile_in_place_takes_effect(name: str) -> None:
    lm, graphs = model(positions=9), []
    want, text = lm(IDS), generate(lm)
    torch.compiler.reset()
    lm.get_submodule(name).compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(lm(IDS), want)
    assert len(graphs) == 1
    assert torch.equal(generate(lm), text)
    assert len(graphs) > 1  # one for prompts without gradient, or for a step


@ignore_dynamo
@pytest.mark.parametrize("recipe", [preset("gated_rnn"), in_series(presets.hgrn2(heads=2))])
def test_a_layer_that_was_never_called_compiles_to_one_graph(recipe: Recipe) -> None:
    """Parts inside other parts as well: nothing is left to be found out in the first call."""
    mixer, x = Mixer(recipe, 16), torch.randn(1, 6, 16)
    torch.compiler.reset()
    y = torch.compile(mixer, backend="eager", fullgraph=True)(x, **grid_of(recipe)).y
    torch.testing.assert_close(y, mixer(x, **grid_of(recipe)).y)


@pytest.mark.parametrize("name", ["dense_retnet", "dense_mamba", "mamba", "rwkv"])
def test_hooks_that_move_arguments_change_nothing(name: str) -> None:
    """As accelerate places models: at every module, arguments in lists and dicts are copied to its device."""
    lm = LanguageModel(preset(name), vocab_size=11, dim=32, depth=3, tie=False)
    want, stepped = lm(IDS), step(lm)
    attach_execution_device_hook(lm, torch.device("cpu"))
    torch.testing.assert_close(lm(IDS), want)
    torch.testing.assert_close(step(lm), stepped)
    cpu_offload(lm, execution_device=torch.device("cpu"))
    torch.testing.assert_close(lm(IDS), want)


@ignore_dynamo
def test_a_model_with_hooks_compiles_to_one_graph() -> None:
    lm, calls = model(), []
    lm.blocks[0].mixer.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    want = lm(IDS)
    torch.compiler.reset()
    compiled = torch.compile(lm, backend=lambda graph, inputs: calls.append(1) or graph.forward, fullgraph=True)
    torch.testing.assert_close(compiled(IDS), want)
    assert calls == [1]


def test_noise_on_the_embedding_changes_the_loss_in_training_alone() -> None:
    """NEFTune, as transformers and trl do it: a hook at what get_input_embeddings returns."""
    lm = model()

    def noisy(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        bound = 5.0 / (out.shape[1] * out.shape[2]) ** 0.5
        return out + torch.zeros_like(out).uniform_(-bound, bound) if module.training else out

    plain = lm.loss(IDS)
    lm.embedding.register_forward_hook(noisy)
    assert lm.train().loss(IDS) != plain
    assert lm.eval().loss(IDS) == plain
    assert torch.equal(lm.embedding(IDS), lm.embedding.weight[IDS])


# ---------------------------------------------------------------------- weights that are computed


class Scaled(nn.Module):
    """0.5 w, as small a parametrization as has an effect."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class Adapted(nn.Module):
    """w + B A: LoRA as a parametrization."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(2, columns)), nn.Parameter(torch.zeros(rows, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def weights_of(lm: nn.Module) -> list[tuple[str, Weights, str]]:
    return [
        (f"{place}.{name}", module, name)
        for place, module in lm.named_modules()
        if isinstance(module, Weights)
        for name in module.declared
    ]


@pytest.mark.parametrize("name", CAUSAL)
def test_every_weight_can_be_parametrized(name: str) -> None:
    """Halved by a parametrization is the same as halved, whole and in a step; gradients reach the originals."""
    torch.manual_seed(0)
    lm = LanguageModel(preset(name), vocab_size=11, dim=32, depth=2, tie=False)
    halved = copy.deepcopy(lm)
    with torch.no_grad():
        for weight in halved.parameters():
            weight.mul_(0.5)
    for _, module, weight_name in weights_of(lm):
        parametrize.register_parametrization(module, weight_name, Scaled())
    torch.testing.assert_close(lm(IDS), halved(IDS))
    torch.testing.assert_close(step(lm), step(halved))
    lm.loss(IDS).backward()
    halved.loss(IDS).backward()
    grads = [[None if w.grad is None else w.grad for w in m.parameters()] for m in (lm, halved)]
    for own, other in zip(*grads, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            torch.testing.assert_close(own, 0.5 * other)


@pytest.mark.parametrize("place", ["embedding", "blocks.0.mixer.parts.project", "head"])
def test_a_pruned_weight_acts_pruned_in_training_and_inference(place: str) -> None:
    lm = model()
    masked, layer = copy.deepcopy(lm), lm.get_submodule(place)
    prune.random_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        masked.get_submodule(place).weight.mul_(layer.weight_mask)
    torch.testing.assert_close(lm(IDS), masked(IDS))
    lm.loss(IDS).backward()
    with torch.no_grad():
        for weight in (layer.weight_orig, masked.get_submodule(place).weight):
            weight.mul_(3)  # what an optimiser does to the original reaches the next call
    torch.testing.assert_close(step(lm), step(masked))
    assert bool((layer.weight_orig.grad[layer.weight_mask == 0] == 0).all())


def groups_by_name(lm: LanguageModel) -> list[set[str]]:
    names = {id(weight): name for name, weight in lm.named_parameters()}
    return [{names[id(weight)] for weight in group["params"]} for group in lm.decay_groups(0.1)]


def test_computed_weights_keep_their_decay_group() -> None:
    lm = model(presets.mamba(state=3))
    project, scan = (lm.blocks[0].mixer.parts[name] for name in ("project", "selective_scan"))
    parametrizations.weight_norm(project, "weight")
    parametrizations.spectral_norm(lm.head, "weight")
    parametrize.register_parametrization(scan, "A_log", Adapted(*scan.A_log.shape))
    prune.l1_unstructured(lm.blocks[1].mixer.parts["project"], "weight", amount=0.25)
    prune.l1_unstructured(lm.blocks[1].mixer.parts["selective_scan"], "dt_bias", amount=0.25)
    decayed, kept = groups_by_name(lm)
    at = "blocks.0.mixer.parts."
    assert {f"{at}project.parametrizations.weight.original{i}" for i in (0, 1)} <= decayed
    assert {"head.parametrizations.weight.original", "blocks.1.mixer.parts.project.weight_orig"} <= decayed
    assert {f"{at}selective_scan.parametrizations.A_log.{end}" for end in ("original", "0.A", "0.B")} <= kept
    assert "blocks.1.mixer.parts.selective_scan.dt_bias_orig" in kept
    assert decayed | kept == {name for name, _ in lm.named_parameters()}
    lm.loss(IDS).backward()
    torch.optim.AdamW(lm.decay_groups(0.1)).step()
    assert torch.isfinite(lm(IDS)).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_of_the_older_kind_keeps_the_decay_group() -> None:
    lm = model()
    nn.utils.weight_norm(lm.head, "weight")
    decayed, _ = groups_by_name(lm)
    assert {"head.weight_g", "head.weight_v"} <= decayed
    with torch.no_grad():
        lm.head.weight_g.mul_(2)
    torch.testing.assert_close(lm(IDS), 2 * model()(IDS))


def test_a_weight_that_nobody_declared_is_named() -> None:
    lm = model()
    lm.extra = nn.Linear(2, 3)
    with pytest.raises(TypeError, match=r"every weight must be declared by a Param, got extra\.weight, extra\.bias"):
        lm.decay_groups(0.1)
    lm.extra.requires_grad_(False)
    lm.decay_groups(0.1)


# ---------------------------------------------------------------------- pickle, copies


def drawn(mixer: Mixer) -> Mixer:
    """With numbers in place of matrices that begin as zeros, as the last one of RWKV-7 does."""
    for weight in mixer.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.1)
    return mixer


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_pickles_and_copies(name: str) -> None:
    mixer, x = drawn(Mixer(preset(name), 32)), torch.randn(2, 6, 32)
    grid = grid_of(mixer.recipe)
    file = io.BytesIO()
    torch.save(mixer, file)
    file.seek(0)
    want = mixer(x, **grid).y
    for again in (pickle.loads(pickle.dumps(mixer)), torch.load(file, weights_only=False), copy.deepcopy(mixer)):
        assert torch.equal(again(x, **grid).y, want)
        assert again.recipe == mixer.recipe
        assert [param.decay for _, param in declared(again)] == [param.decay for _, param in declared(mixer)]
        for module in again.modules():
            if isinstance(module, Weights):
                module.reset_parameters()  # the laws come along
        assert not torch.equal(again(x, **grid).y, want)
    assert pickle.loads(pickle.dumps(mixer.recipe)) == mixer.recipe


def test_a_model_pickles_with_what_its_layers_share() -> None:
    lm = model(padding=3, positions=9, dropout=0.1)
    file = io.BytesIO()
    torch.save(lm, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(lm)), torch.load(file, weights_only=False), copy.deepcopy(lm)):
        assert torch.equal(again.eval()(IDS), lm.eval()(IDS))
        assert list(again.state_dict()) == list(lm.state_dict())
        assert torch.equal(LanguageModel(**again.arguments)(IDS) * 0, lm(IDS) * 0)
        before = again(IDS)
        with torch.no_grad():
            again.shared["lower_bounds"].logits[0].add_(3)
        assert not torch.equal(again(IDS), before)


# ---------------------------------------------------------------------- casts


def test_casts_keep_weight_and_gradient_of_one_dtype() -> None:
    lm = model(presets.mamba(state=3))
    scan = lm.blocks[0].mixer.parts["selective_scan"]
    parametrize.register_parametrization(scan, "A_log", Scaled())
    parametrizations.spectral_norm(lm.blocks[1].mixer.parts["selective_scan"], "A_log")
    lm.loss(IDS).backward()
    pinned = {id(weight) for weight, param in declared(lm) if param.float32}
    for cast, wide in ((torch.bfloat16, 4), (torch.float16, 4), (torch.float64, 8), (torch.float32, 4)):
        lm.to(cast)
        for weight in lm.parameters():
            assert weight.grad.dtype == weight.dtype
            assert weight.dtype.itemsize == (wide if id(weight) in pinned else cast.itemsize)
        lm(IDS)


def test_a_cast_to_half_keeps_the_numbers_of_what_stays_float32() -> None:
    lm = model(presets.mamba(state=3))
    lm.loss(IDS).backward()
    want = [(weight.clone(), weight.grad.clone()) for weight, param in declared(lm) if param.float32]
    lm.to(device="cpu", dtype=torch.bfloat16)
    got = [(weight, weight.grad) for weight, param in declared(lm) if param.float32]
    assert all(torch.equal(a, b) for pair in zip(want, got, strict=True) for a, b in zip(*pair, strict=True))
    lm.to("meta", torch.float16)
    assert {weight.device.type for weight in lm.parameters()} == {"meta"}
    assert {weight.dtype for weight, param in declared(lm) if param.float32} == {torch.float32}


def test_a_fresh_state_has_the_dtype_of_the_model_whatever_stays_float32() -> None:
    """Longhorn's first weight is a matrix, that of an adapted one may be a bias in float32."""
    recipe = presets.gla(heads=2).insert_before("project", Pinned("x", out="p"))
    mixer = Mixer(recipe, 16).bfloat16()
    assert next(mixer.parameters()).dtype == torch.float32
    site = []
    mixer.recipe.body.parts[0].__dict__["seen"] = site
    mixer.init_state(2)
    assert site == [torch.bfloat16]


@dataclass(frozen=True)
class Pinned(Part):
    """A part with a weight in float32, which notes the dtype its state is asked in."""

    source: str
    out: str

    def shapes(self, axes: Any) -> Any:
        return {self.out: axes[self.source]}

    def params(self, site: Any) -> Any:
        return {"b": Param(site.of(self.source), cut_normal(1.0), float32=True)}

    def init_state(self, site: Any, batch: int, max_len: int | None) -> Any:
        self.__dict__.get("seen", []).append(site.dtype)

    def __call__(self, flow: Any, weights: Any, state: Any) -> Any:
        return flow.set(**{self.out: flow[self.source] + weights.b}), None


# ---------------------------------------------------------------------- shapes without numbers


@pytest.mark.parametrize("name", presets.names())
def test_models_run_where_there_are_no_numbers(name: str) -> None:
    recipe = preset(name)
    grid = grid_of(recipe)
    with torch.device("meta"):
        mixer = Mixer(recipe, 32)
        assert mixer(torch.randn(2, 6, 32), **grid).y.shape == (2, 6, 32)
        if recipe.causal:
            state = mixer.init_state(2)
            assert mixer.step(torch.randn(2, 32), state).shape == (2, 32)
            lm = LanguageModel(recipe, vocab_size=11, dim=32, depth=1, tie=False)
            assert lm(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 11)
    with FakeTensorMode():
        mixer = Mixer(recipe, 32)
        y = mixer(torch.randn(2, 6, 32), **grid).y
        assert y.shape == (2, 6, 32)
        y.sum().backward()
        assert all(weight.grad is None or weight.grad.shape == weight.shape for weight in mixer.parameters())
        if recipe.causal:
            mixer.step(torch.randn(2, 32), mixer.init_state(2))
            lm = LanguageModel(recipe, vocab_size=11, dim=32, depth=1, tie=False)
            assert lm.loss(torch.zeros(2, 5, dtype=torch.long)).shape == ()


@ignore_dynamo
def test_values_are_looked_at_only_where_there_are_any() -> None:
    x, seen = torch.ones(3), []

    def look(tensor: Tensor) -> Tensor:
        seen.append(readable(tensor))
        return tensor.sum()

    look(x)
    look(nn.Parameter(x))
    assert seen == [True, True]
    seen.clear()
    look(torch.ones(0))
    look(torch.ones(3, device="meta"))
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        look(mode.from_tensor(x))
        look(x)  # whatever is computed of it is fake
    assert seen == [False] * 7
    torch.compile(look, backend="eager")(x)
    assert seen[7:] == [False]


def test_a_cut_normal_law_has_its_deviation_and_its_edge() -> None:
    weight = torch.empty(200_000)
    torch.manual_seed(0)
    cut_normal(0.3)(weight)
    assert abs(weight.std() - 0.3) < 5 * 0.3 / 200_000**0.5
    assert weight.abs().max() <= 2 * 0.3 / 0.8796256


def test_ids_of_32_bits_are_ids() -> None:
    lm, narrow = model(padding=0, positions=9), IDS.int()
    assert torch.equal(lm(narrow), lm(IDS))
    assert torch.equal(lm.loss(narrow), lm.loss(IDS))
    assert torch.equal(lm.step(narrow[:, 0], lm.init_state(2)), lm.step(IDS[:, 0], lm.init_state(2)))
    lengths, borders = torch.tensor([3, 6], dtype=torch.int32), torch.tensor([0, 5, 12], dtype=torch.int32)
    assert torch.equal(lm.generate(narrow, 2, seed=0, lengths=lengths), lm.generate(IDS, 2, seed=0, lengths=lengths))
    torch.testing.assert_close(*(lm(IDS[:, :6].reshape(1, -1), cu_seqlens=c)[0, :5] for c in (borders, borders.long())))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm: lm([[1, 2]]), r"LanguageModel: ids must be a tensor \[B T\], got list"),
        (lambda lm: lm.loss([[1, 2]]), r"LanguageModel: ids must be a tensor \[B T\], got list"),
        (lambda lm: lm(IDS, targets=[[1]]), r"LanguageModel: targets must be a tensor \[B T\], got list"),
        (lambda lm: lm.generate([[1, 2]], 1), r"generate: ids must be a tensor \[B T\], got list"),
        (lambda lm: lm.step([1], lm.init_state(1)), r"LanguageModel.step: ids must be a tensor \[B\], got list"),
        (lambda lm: lm.prefill(IDS, [6, 6]), r"prefill: lengths must be an int32 or int64 tensor \[B\], got \[6, 6\]"),
        (lambda lm: lm.prefill([[1]], torch.tensor([1])), r"prefill: ids must be a tensor \[B T\], got list"),
        (
            lambda lm: lm(IDS[:1], cu_seqlens=[0, 6]),
            r"LanguageModel: cu_seqlens must be an int32 or int64 tensor \[n\+1\], got list",
        ),
        (
            lambda lm: lm.blocks[0].mixer(torch.ones(1, 6, 16), cu_seqlens=[0, 6]),
            r"Mixer: cu_seqlens must be an int32 or int64 tensor \[n\+1\], got list",
        ),
        (
            lambda lm: lm.blocks[0].mixer.step([1.0], lm.init_state(1)),
            r"Mixer.step: x must be a tensor \[B D\], got list",
        ),
    ],
)
def test_lists_are_refused_in_a_line(call: Callable[[LanguageModel], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call(model())


# ---------------------------------------------------------------------- states


def autocast(run: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return run()


PRECISIONS = ("float32", "autocast", "bfloat16", "float16", "float64")


def in_precision(mixer: Mixer, x: Tensor, precision: str) -> tuple[Mixer, Tensor, Callable[..., Any]]:
    if precision == "autocast":
        return mixer, x, autocast
    dtype = getattr(torch, precision)
    return copy.deepcopy(mixer).to(dtype), x.to(dtype), lambda run: run()


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_state_goes_on_in_any_precision(name: str) -> None:
    """To the rounding of the coarser one, float16 aside, whose range some gates leave."""
    torch.manual_seed(0)
    mixer, x = drawn(Mixer(preset(name), 32)), torch.randn(2, 9, 32)
    want = mixer(x).y
    for made in PRECISIONS:
        maker, head, around = in_precision(mixer, x[:, :6], made)
        for used in PRECISIONS:
            user, tail, within = in_precision(mixer, x[:, 6:], used)
            state = around(lambda maker=maker, head=head: maker(head).state)
            y = within(lambda user=user, tail=tail, state=state: user(tail, state).y)
            ys = within(lambda user=user, tail=tail, s=state: torch.stack([user.step(t, s) for t in tail.unbind(1)], 1))
            tolerance = 1e-5 if {made, used} <= {"float32", "float64"} else 0.06
            for got in (y, ys):
                assert torch.isfinite(got).all()
                error = (got.double() - want[:, 6:].double()).norm() / want[:, 6:].double().norm()
                assert error < tolerance, (made, used)


def test_a_step_in_float64_rounds_nothing_of_a_state_in_float32() -> None:
    """The convolution's and the scan's entries widen; a float64 model sees no rounding after its first token."""
    torch.manual_seed(0)
    mixer, x = Mixer(presets.mamba(state=3), 16).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    state = mixer.init_state(1)
    low = {"position": state["position"].clone(), "parts": {k: v.float() for k, v in state["parts"].items()}}
    for token in x.unbind(1):
        assert torch.equal(mixer.step(token, low), mixer.step(token, state))
    assert {leaf.dtype for leaf in tree_leaves(low["parts"])} == {torch.float64}


def test_a_bfloat16_memory_stays_one_in_steps() -> None:
    mixer = Mixer(presets.gla(heads=2), 16)
    state = mixer.init_state(2)
    state["parts"]["outer_scan"] = memory = state["parts"]["outer_scan"].bfloat16()
    mixer.step(torch.randn(2, 16), state)
    assert state["parts"]["outer_scan"] is memory


ATTENTION = presets.llama(heads=2)


@pytest.mark.parametrize("recipe", [presets.mamba(state=3), presets.gated_rnn(), ATTENTION])
def test_a_state_of_inference_mode_goes_on_outside(recipe: Recipe) -> None:
    lm, whole = model(recipe), model(recipe)(IDS)
    with torch.inference_mode():
        fresh = lm.init_state(2)
        first = lm.step(IDS[:, 0], fresh)
        read = lm(IDS[:, :3], return_state=True)[1]
    torch.testing.assert_close(first, whole[:, 0])
    torch.testing.assert_close(lm.step(IDS[:, 1], fresh), whole[:, 1])
    rest = lm(IDS[:, 3:], read)
    torch.testing.assert_close(rest, whole[:, 3:])
    rest.sum().backward()
    torch.testing.assert_close(lm.step(IDS[:, 3], read), whole[:, 3])
    outside = lm.init_state(2)
    with torch.inference_mode():
        torch.testing.assert_close(lm.step(IDS[:, 0], outside), whole[:, 0])
        assert torch.equal(lm.generate(IDS, 2, seed=1), lm.generate(IDS.clone(), 2, seed=1))
    torch.testing.assert_close(lm.step(IDS[:, 1], outside), whole[:, 1])


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def changed(state: Any, path: tuple[Any, ...], new: Callable[[Any], Any]) -> Any:
    """A copy of a state with one entry replaced."""
    if not path:
        return new(state)
    made = dict(state) if isinstance(state, dict) else list(state)
    made[path[0]] = changed(state[path[0]], path[1:], new)
    return made


SCAN = ("layers", 1, "mixer", "parts", "outer_scan")
MISFITS: list[tuple[Callable[[LanguageModel], Any], type[Exception], str]] = [
    (lambda lm: None, TypeError, "state must be a dict with the keys position, layers, got NoneType"),
    (lambda lm: lm.init_state(3), ShapeError, r"state\['position'\] must be \[B\] = \(2,\), got shape \(3,\)"),
    (lambda lm: without(lm.init_state(2), "layers"), ValueError, "must have the keys position, layers, got position;"),
    (
        lambda lm: changed(lm.init_state(2), ("layers",), lambda layers: layers[:1]),
        ValueError,
        r"state\['layers'\] must be a list of 2 entries, got 1",
    ),
    (
        lambda lm: changed(lm.init_state(2), ("layers",), lambda layers: {}),
        ValueError,
        r"state\['layers'\] must be a list of 2 entries, got dict",
    ),
    (lambda lm: model(depth=3).init_state(2), ValueError, r"state\['layers'\] must be a list of 2 entries, got 3"),
    (
        lambda lm: model(ffn=None).init_state(2),
        ValueError,
        r"state\['layers'\]\[0\] must have the keys mixer, ffn, got mixer",
    ),
    (
        lambda lm: model(presets.mamba()).init_state(2),
        ValueError,
        r"state\['layers'\]\[0\]\['mixer'\]\['parts'\] must have the keys outer_scan, got short_conv, selective_scan; "
        r"init_state\(batch\) makes one that fits",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN[:-1], lambda parts: {"outer_skan": parts["outer_scan"]}),
        ValueError,
        r"state\['layers'\]\[1\]\['mixer'\]\['parts'\] must have the keys outer_scan, got outer_skan",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN[:-1], lambda parts: parts | {"more": torch.ones(2)}),
        ValueError,
        "must have the keys outer_scan, got outer_scan, more",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN, lambda scan: scan[:1]),
        ShapeError,
        r"state\['layers'\]\[1\]\['mixer'\]\['parts'\]\['outer_scan'\] must be \[B \.\.\.\] = \(2, 2, 8, 8\), "
        r"got shape \(1, 2, 8, 8\)",
    ),
    (
        lambda lm: model(dim=32).init_state(2),
        ShapeError,
        r"\['outer_scan'\] must be \[B \.\.\.\] = \(2, 2, 8, 8\), got shape \(2, 2, 16, 16\)",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN, lambda scan: scan.to(torch.complex64)),
        TypeError,
        r"\['outer_scan'\] must be torch.float32 or .*, got torch.complex64",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN, lambda scan: scan.tolist()),
        TypeError,
        r"\['outer_scan'\] must be a tensor, got list",
    ),
    (
        lambda lm: changed(lm.init_state(2), ("position",), torch.Tensor.float),
        TypeError,
        r"state\['position'\] must be torch.int64 or torch.int32, got torch.float32",
    ),
    (
        lambda lm: changed(lm.init_state(2), SCAN, lambda scan: scan.to("meta")),
        ValueError,
        r"\['outer_scan'\] must be on cpu, got one on meta",
    ),
    (
        lambda lm: tree_map(lambda leaf: leaf.to("meta"), lm.init_state(2)),
        ValueError,
        r"state\['position'\] must be on cpu, got one on meta",
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), MISFITS)
def test_a_state_that_does_not_belong_is_refused_by_name(
    make: Callable[[LanguageModel], Any], error: type[Exception], words: str
) -> None:
    lm = model()
    state = make(lm)
    before = copy.deepcopy(state)
    with pytest.raises(error, match=words):
        lm.step(IDS[:, 0], state)
    if state is not None:
        with pytest.raises(error, match=words):
            lm(IDS, state)
    kept = zip(tree_leaves(before), tree_leaves(state), strict=True)
    assert all(a.device.type == "meta" or torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in kept)


def test_a_mixer_refuses_a_state_of_another() -> None:
    gla, x = Mixer(presets.gla(heads=2), 16), torch.randn(2, 3, 16)
    words = r"must have the keys outer_scan, got short_conv, selective_scan"
    other = Mixer(presets.mamba(state=3), 16)
    with pytest.raises(ValueError, match=r"Mixer: state\['parts'\] " + words):
        gla(x, other(x).state)
    with pytest.raises(ValueError, match=r"Mixer.step: state\['parts'\] " + words):
        gla.step(x[:, 0], other.init_state(2))
    with pytest.raises(TypeError, match="Mixer: state must be a dict with the keys position, parts, got Tensor"):
        gla(x, torch.ones(2))
    packed = gla(x[:1], cu_seqlens=torch.tensor([0, 1, 2, 3])).state
    with pytest.raises(ShapeError, match=r"state\['position'\] must be \[B\] = \(2,\), got shape \(3,\)"):
        gla(x, packed)
    with pytest.raises(ShapeError, match=r"state\['position'\] must be \[n\] = \(2,\), got shape \(3,\)"):
        gla(x[:1], packed, cu_seqlens=torch.tensor([0, 1, 3]))
    gla(torch.randn(3, 2, 16), packed)  # three documents go on as three rows


def test_a_cache_may_be_of_any_length_but_is_a_cache() -> None:
    mixer, x = Mixer(ATTENTION, 16), torch.randn(2, 3, 16)
    for state in (mixer(x).state, mixer.init_state(2), mixer.init_state(2, 9)):
        mixer(x, state)
    wrong = changed(mixer(x).state, ("parts", "attention", "grows"), lambda grows: "yes")
    with pytest.raises(TypeError, match=r"\['attention'\]\['grows'\] must be of type bool, got str"):
        mixer(x, wrong)
    wrong = changed(mixer(x).state, ("parts", "attention", "k"), lambda k: k[..., :-1])
    with pytest.raises(ShapeError, match=r"\['k'\] must be \[B \.\.\.\] = \(2, \*, 2, 8\), got shape \(2, 3, 2, 7\)"):
        mixer(x, wrong)


def test_inputs_of_a_recipe_are_not_called_as_arguments_of_a_layer() -> None:
    recipe = Recipe(Project("x past", y="D"), inputs={"past": "D"})
    with pytest.raises(RecipeError, match="inputs of a recipe must not be called as its own arguments, got past"):
        Mixer(recipe, 4)


# ---------------------------------------------------------------------- threads, other default devices


def test_threads_generate_what_one_generates_and_leave_no_trace() -> None:
    lm = model(presets.hgrn2(heads=2).insert_before("outer_scan", Dropout("q", p=0.5)), dropout=0.5, embed_std=2.0)
    want = lm.eval().generate(IDS, 20, temperature=0)
    lm.train()
    interval, found = sys.getswitchinterval(), []
    threads = [threading.Thread(target=lambda: found.append(lm.generate(IDS, 20, temperature=0))) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        modes = [all(part.training for part in lm.modules()) for _ in range(200)]
        losses = {lm.loss(IDS).item() for _ in range(5)}  # training goes on beside it, with its dropout
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 4
    assert all(torch.equal(text, want) for text in found)
    assert all(modes)
    assert all(part.training for part in lm.modules())
    assert len(losses) == 5


def test_a_step_drops_nothing() -> None:
    lm = model(dropout=0.5).train()
    torch.testing.assert_close(step(lm), step(copy.deepcopy(lm).eval()))
    mixer = Mixer(presets.gla(heads=2).insert_before("outer_scan", Dropout("q", p=0.5)), 16).train()
    x = torch.randn(2, 16)
    assert torch.equal(mixer.step(x, mixer.init_state(2)), mixer.step(x, mixer.init_state(2)))
    assert not torch.equal(mixer(x[:, None]).y, mixer(x[:, None]).y)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_tensor_is_made_on_the_default_device_by_accident(name: str) -> None:
    lm = LanguageModel(preset(name), vocab_size=11, dim=32, depth=2, tie=False, positions=20)
    lm.requires_grad_(False)
    lengths, borders = torch.tensor([3, 6]), torch.tensor([0, 2, 6])

    def everything() -> list[Tensor]:
        torch.manual_seed(1)
        state = lm.init_state(2, 4)
        return [
            lm(IDS),
            lm.loss(IDS),
            lm(IDS[:1], cu_seqlens=borders),
            lm.step(IDS[:, 0], state),
            lm.generate(IDS, 3, lengths=lengths),
            lm.generate(IDS, 3, window=4, top_k=3, top_p=0.9, min_p=0.1, seed=1),
        ]

    want = everything()
    torch.set_default_device("meta")
    try:
        got = everything()
        for module in lm.modules():
            if isinstance(module, Weights):
                module.reset_parameters()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_block_alone_takes_a_state_by_its_names() -> None:
    block, x = Block(presets.gla(heads=2), 16, norm=None), torch.randn(1, 3, 16)
    assert isinstance(block.mixer_norm, StreamNorm)
    y, state, _ = block(x)
    torch.testing.assert_close(block(x, block.init_state(1))[0], y)
    with pytest.raises(KeyError, match="mixer"):
        block(x, {"mixr": state["mixer"]})
