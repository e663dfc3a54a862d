"""Hugging Face: configuration, saving, generating, training and adapting; a padded batch is what its rows are alone."""

from __future__ import annotations

import copy
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import recur.hf
from recur import LanguageModel, Part, Recipe, RecipeError, cli, convert, presets, train
from recur.blocks import Act, Attention, Norm, Project, Reverse, Rotary
from recur.hf import RecurConfig, RecurForCausalLM, StateCache, projections
from recur.hf.__main__ import main
from recur.train.tokenize import Bytes, HubTokenizer

# What packages warn of themselves: transformers renames gradient_checkpointing, and its Trainer uses it; it pins memory
# without a GPU; PEFT before 0.19 does not know the owners of parameters, nor models that came from no folder.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        ".*gradient_checkpointing:FutureWarning",
        "'pin_memory' argument:UserWarning",
        "Unsupported layer type:UserWarning",
        "Could not find a config file:UserWarning",
    )
]

ATTENTION = Recipe(
    Project("x", q="H K", k="G K", v="G K"),
    Rotary("q k"),
    Attention(),
    Project("y", y="D"),
    axes={"H": 4, "G": 2, "K": "D/H"},
)
VARIANTS = {
    "preset": {"recipe": {"preset": "hgrn2", "heads": 2}},
    "hybrid": {"recipe": [{"preset": "longhorn", "state": 4}, ATTENTION], "depth": 3, "ffn": "swiglu"},
    "every setting": {
        "recipe": presets.gla(heads=2).to_dict(), "block": "post", "norm": Norm("x", kind="l2", eps=1e-12, to="y"),
        "final_norm": "layer", "ffn": ATTENTION, "positions": 40, "tie_word_embeddings": False,
        "dropout": (0.1, 0.2, 0.3), "padding": 2, "embed_scale": 2.0, "head_bias": True,
    },
    "sinusoidal": {"recipe": "gateloop", "norm": None, "final_norm": None, "positions": "sinusoidal"},
    "dense": {"recipe": presets.dense_retnet(heads=2, layers=2), "dim": 32},
}  # fmt: skip
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


def model(name: str = "preset", **options) -> RecurForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "dim": 16, "depth": 2, **VARIANTS[name], **options}
    return RecurForCausalLM(RecurConfig(**settings)).double().eval()


def load(folder: Path) -> RecurForCausalLM:
    """In the dtype it was saved in, which the fourth version of transformers does not do by itself."""
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Both say the same about some tokens; where weights lie in memory may change the rounding of products."""
    logits = [lm(some_ids(2, 7)) for lm in (one, other)]
    torch.testing.assert_close(*(getattr(out, "logits", out) for out in logits))


def some_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------- configuration, saving, loading


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_is_the_same_model(name, tmp_path):
    lm = model(name)
    lm.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    again = load(tmp_path)
    assert type(again) is RecurForCausalLM
    assert again.dtype == torch.float64
    assert not again.training
    same(again, lm)
    assert AutoConfig.from_pretrained(tmp_path).recipe == lm.config.recipe
    assert [block.mixer.recipe for block in again.model.blocks] == [block.mixer.recipe for block in lm.model.blocks]


def test_a_config_is_json_and_holds_the_recipe_itself():
    by_name = RecurConfig(recipe={"preset": "hgrn2", "heads": 2}, dim=16)
    assert by_name.recipe == json.loads(json.dumps(presets.hgrn2(heads=2).to_dict()))
    assert by_name.to_dict() == RecurConfig(recipe=presets.hgrn2(heads=2), dim=16).to_dict()
    assert json.loads(by_name.to_json_string())["recipe"] == by_name.recipe
    assert (by_name.hidden_size, by_name.num_hidden_layers) == (16, 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_language_model_is_wrapped_as_it_is(name, tmp_path):
    lm = model(name).model
    wrapped = RecurForCausalLM.wrap(lm)
    assert wrapped.model is lm
    wrapped.save_pretrained(tmp_path)
    same(load(tmp_path), lm)


def test_official_checkpoints_get_there_by_wrapping():
    lm = LanguageModel(presets.mamba(state=4), vocab_size=16, dim=16, depth=2).eval()
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 16, "ssm_cfg": {"d_state": 4}}
    official = convert.from_official("mamba_lm", convert.to_official("mamba_lm", lm), config)
    same(RecurForCausalLM.wrap(official), lm)


def test_loading_in_half_precision_leaves_time_constants_alone(tmp_path):
    lm = model(recipe={"preset": "mamba", "state": 4}).float()
    lm.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kinds = {name.rsplit(".", 1)[1]: weight.dtype for name, weight in half.named_parameters()}
    assert kinds["A_log"] == kinds["dt_bias"] == kinds["D"] == torch.float32
    assert half.model.embedding.weight.dtype == torch.bfloat16
    for name, weight in lm.named_parameters():
        if name.endswith("A_log"):
            assert torch.equal(half.get_parameter(name), weight)
    assert half(some_ids(1, 3)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "place", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}], ids=str
)
def test_a_model_in_shards_is_the_same_model(place, tmp_path):
    lm = model("hybrid")
    lm.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto", **place)
    same(again, lm)
    assert torch.equal(again.generate(some_ids(2, 3), **GREEDY), lm.generate(some_ids(2, 3), **GREEDY))


def test_a_lost_weight_is_drawn_anew_and_the_others_are_kept(tmp_path):
    from safetensors.torch import load_file, save_file

    lm, lost = model(), "model.blocks.1.mixer_norm.weights.weight"
    torch.nn.init.constant_(lm.get_parameter(lost), 3.0)
    lm.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    again = load(tmp_path)
    assert (again.get_parameter(lost) == 1).all()
    for name, tensor in tensors.items():
        assert torch.equal(again.get_parameter(name), tensor)


@dataclass(frozen=True)
class Twice(Part):
    """y <- 2 y."""

    def shapes(self, axes):
        return {"y": axes["y"]}

    def __call__(self, flow, weights, state):
        return flow.set(y=2 * flow["y"]), None


def test_parts_of_ones_own_are_listed_before_loading(tmp_path, monkeypatch):
    recipe = Recipe(*presets.gla(heads=2).parts, Twice(), axes=presets.gla(heads=2).axes)
    with pytest.raises(RecipeError, match="'Twice' is not a part of recur"):
        RecurForCausalLM(RecurConfig(recipe=recipe, dim=16))
    monkeypatch.setattr(RecurConfig, "parts", (Twice,))
    lm = RecurForCausalLM(RecurConfig(recipe=recipe, dim=16)).eval()
    lm.save_pretrained(tmp_path)
    same(load(tmp_path), lm)


# ---------------------------------------------------------------------- forward and loss


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", [PADDED, PADDED.flip(1), torch.tensor([[1, 0, 1, 1, 0, 1]] * 3)], ids=["l", "r", "m"])
def test_what_is_masked_is_not_there(name, use_cache, mask):
    lm, ids = model(name), some_ids(3, 6).masked_fill(mask == 0, 99)  # no token at all
    out = lm(ids, attention_mask=mask, use_cache=use_cache)
    for row, there in enumerate(mask.bool()):
        alone = lm(ids[row : row + 1, there], use_cache=True)
        torch.testing.assert_close(out.logits[row, there], alone.logits[0])
        if use_cache:
            assert out.state.state["position"][row] == there.sum()


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    lm, ids = model(), some_ids(2, 6)
    labels = ids.masked_fill(torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6]).bool(), -100)
    out = lm(ids, labels=labels)
    logits = torch.cat([lm(ids).logits[0, :2], lm(ids).logits[1, :5]])
    targets = torch.cat([ids[0, 1:3], ids[1, 1:]])
    torch.testing.assert_close(out.loss.double(), torch.nn.functional.cross_entropy(logits, targets), rtol=1e-5, atol=0)
    by_count = lm(ids, labels=labels, num_items_in_batch=torch.tensor(14)).loss
    torch.testing.assert_close(by_count, out.loss / 2)  # 7 targets of 14
    assert lm(ids, labels=labels, return_dict=False)[0] == out.loss
    assert lm(ids.int(), labels=labels.int()).loss == out.loss
    assert out.state is None


def test_training_makes_no_logits_unless_they_are_asked_for():
    lm, ids = model(), some_ids(2, 6)
    want = lm(ids, labels=ids)
    assert want.logits is not None
    out = lm.train()(ids, labels=ids)
    torch.testing.assert_close(out.loss, want.loss)
    assert out.logits is None
    torch.testing.assert_close(lm(ids, labels=ids, logits_to_keep=2).logits, want.logits[:, -2:])
    lm.config.logits_in_training = True
    torch.testing.assert_close(lm(ids, labels=ids).logits, want.logits)
    assert not RecurConfig(recipe="gla").logits_in_training


def test_a_loss_function_of_ones_own_is_called_with_logits():
    lm, ids = model(), some_ids(2, 6)
    lm.loss_function = lambda logits, labels, vocab_size, num_items_in_batch: logits.sum() * 0 + vocab_size
    assert lm(ids, labels=ids).loss == lm.config.vocab_size


def test_a_configuration_may_ask_for_tuples():
    lm, ids = model(return_dict=False), some_ids(2, 6)
    (logits,) = lm(ids)
    assert torch.equal(lm(ids, return_dict=True).logits, logits)
    assert torch.equal(lm.generate(ids, **GREEDY), model().generate(ids, **GREEDY))


def test_some_columns_of_logits_are_enough():
    lm, ids = model(), some_ids(2, 6)
    whole = lm(ids).logits
    assert torch.equal(lm(ids, logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(lm(ids, num_logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(lm(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        lm = model("dense").train()
        if enable:
            lm.gradient_checkpointing_enable()
        assert lm.gradient_checkpointing == lm.model.checkpoint == enable
        lm(some_ids(2, 7), labels=some_ids(2, 7)).loss.backward()
        grads.append([weight.grad for weight in lm.parameters()])
    torch.testing.assert_close(*grads)
    lm.gradient_checkpointing_disable()
    assert not lm.model.checkpoint


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_left_padded_batch_generates_what_its_rows_do(name, options):
    lm, ids = model(name), some_ids(3, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    batch = lm.generate(ids, attention_mask=PADDED, **options)
    assert torch.equal(batch, lm.generate(ids, attention_mask=PADDED, use_cache=False, **options))
    for row, there in enumerate(PADDED.bool()):
        alone = lm.generate(ids[row : row + 1, there], attention_mask=PADDED[row : row + 1, there], **options)
        several = len(alone)
        assert torch.equal(batch[row * several : (row + 1) * several, int((~there).sum()) :], alone)
    if "num_beams" not in options:
        assert torch.equal(batch[1:2], lm.model.generate(ids[1:2], 6, temperature=0))


def test_sampling_draws_from_the_model():
    lm, ids = model(), torch.tensor([[1]])
    chance = lm(ids).logits[0, -1].div(0.5).softmax(-1)
    torch.manual_seed(0)
    drawn = lm.generate(ids.expand(4000, 1), max_new_tokens=1, do_sample=True, temperature=0.5, top_k=0, pad_token_id=0)
    found = drawn[:, 1].bincount(minlength=11) / 4000
    assert (found - chance).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations of a fair coin


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_is_the_whole(name):
    lm, ids = model(name), some_ids(2, 6)
    state, logits = None, []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            out = lm(token, state=state, use_cache=True)
            state, logits = out.state, [*logits, out.logits]
    torch.testing.assert_close(torch.cat(logits, 1), lm(ids).logits)
    assert state.length == 6


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def conversation() -> tuple[RecurForCausalLM, StateCache, torch.Tensor, torch.Tensor]:
    """A model, its state after a first answer, the longer conversation and its mask."""
    lm = model("hybrid")
    first = lm.generate(some_ids(3, 6), attention_mask=PADDED, return_dict_in_generate=True, **GREEDY)
    state = next(value for value in first.values() if isinstance(value, StateCache))
    assert state.get_seq_length() == 6 + 4 - 1  # the last token drawn was not read yet
    longer = torch.cat([first.sequences, some_ids(3, 2)], 1)
    return lm, state, longer, torch.cat([PADDED, torch.ones(3, 6, dtype=torch.long)], 1)


@pytest.mark.parametrize("name", ["state", "past_key_values", "cache"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2, "use_cache": False}],
    ids=str,
)
def test_a_conversation_goes_on_from_its_state_by_any_name(name, options):
    lm, state, longer, mask = conversation()
    want, new = lm.generate(longer, attention_mask=mask, **GREEDY, **options), longer[:, state.length :]
    got = lm.generate(longer, attention_mask=mask, **{name: copy.deepcopy(state)}, **GREEDY, **options)
    assert torch.equal(got, want)
    alone = lm.generate(new, attention_mask=mask, **{name: state}, **GREEDY, **options)  # ids that it has not read
    assert torch.equal(alone[:, new.shape[1] :], want[:, longer.shape[1] :])


@pytest.mark.parametrize("new", [1, 2, 9])
def test_ids_that_a_state_has_not_read_may_come_alone(new):
    """With a mask that has nothing to hide, which newer versions of transformers take away."""
    lm, ids, mask = model("hybrid"), some_ids(2, 4 + new), torch.ones(2, 4 + new)
    want = lm.generate(ids, attention_mask=mask, **GREEDY)
    for options in ({}, {"use_cache": False}):
        state = lm(ids[:, :4], use_cache=True).state
        got = lm.generate(input_ids=ids[:, 4:], attention_mask=mask, state=state, **GREEDY, **options)
        assert torch.equal(got[:, new:], want[:, 4 + new :])


def test_a_single_new_column_is_read_where_the_mask_has_it():
    lm, state, longer, mask = conversation()
    longer, mask = longer[:, : state.length + 1], mask[:, : state.length + 1].clone()
    mask[1, -1] = 0
    got = lm.generate(longer, attention_mask=mask, state=state, **GREEDY)
    assert torch.equal(got, lm.generate(longer, attention_mask=mask, **GREEDY))
    assert not torch.equal(got, lm.generate(longer, **GREEDY))


@pytest.mark.parametrize("name", ["state", "past_key_values", "cache"])
def test_forward_takes_and_gives_the_state_by_any_name(name):
    lm, ids = model("hybrid"), some_ids(2, 6)
    first = lm(ids[:, :4], use_cache=True)
    state = getattr(first, name)
    assert isinstance(state, StateCache)
    second = lm(ids[:, 4:], **{name: state})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), lm(ids).logits)


@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_a_state_follow_the_rows_of_a_prompt(sampled):
    lm, state, longer, mask = conversation()
    options = {**GREEDY, "do_sample": sampled} | ({"num_return_sequences": 2} if sampled else {"num_beams": 2})
    texts = []
    for given in ({}, {"state": state}):
        torch.manual_seed(0)
        texts.append(lm.generate(longer, attention_mask=mask, **given, **options))
    assert torch.equal(*texts)


# ---------------------------------------------------------------------- training and adapting


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_trains_saves_and_resumes(checkpointing, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in (torch.arange(40)[:, None] + torch.arange(12)) % 11]
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 3e-2, "report_to": [],
        "gradient_checkpointing": checkpointing, "max_steps": 30, "save_steps": 20, "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    losses = {}
    for run in ("whole", "resumed"):
        lm = model().float()
        optimizer = torch.optim.AdamW(lm.model.decay_groups(0.1), lr=3e-2)
        arguments = TrainingArguments(str(tmp_path), **settings)
        trainer = Trainer(lm, arguments, train_dataset=data, eval_dataset=data[:5], optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20") if run == "resumed" else None)
        losses[run] = trainer.evaluate()["eval_loss"]
    assert losses["whole"] < 0.5  # log 11 = 2.4 before
    assert losses["resumed"] == losses["whole"]


@pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"
)  # and of a model that came from no folder
def test_lora_learns_beside_frozen_projections(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    options = {"recipe": presets.longhorn(state=4), "ffn": "swiglu", "embed_std": 1.0}
    lm, ids = model(**options), some_ids(2, 8)
    names = projections(lm)
    assert sum("rate_up" in name for name in names) == 2
    assert sum("mixer" in name for name in names) == 3 * 2 + 2  # three a layer, and the low rank's second matrix
    before, frozen = lm(ids).logits, {name: weight.clone() for name, weight in lm.named_parameters()}
    adapted = get_peft_model(lm, LoraConfig(r=2, target_parameters=names, task_type="CAUSAL_LM"))
    torch.testing.assert_close(adapted(ids).logits, before)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    after = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    text = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    again = PeftModel.from_pretrained(model(**options), tmp_path)
    torch.testing.assert_close(again(ids).logits, after)
    merged = again.merge_and_unload()
    assert type(merged) is RecurForCausalLM
    torch.testing.assert_close(merged(ids).logits, after)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), text)
    unloaded = adapted.unload()
    assert all(torch.equal(weight, frozen[name]) for name, weight in unloaded.named_parameters())


# ---------------------------------------------------------------------- runs of `recur train`


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    source = folder / "text.txt"
    source.write_text(text)
    choices = {"recipe": "gla", "text": str(source), "dim": 16, "depth": 1, "steps": 3, "length": 16, "batch": 2}
    train.fit(train.start("lm", folder / "out", choices))
    return folder / "out"


def test_a_run_becomes_a_folder_for_transformers(run, tmp_path, capsys):
    from transformers import AutoTokenizer, pipeline

    assert main(str(run), str(tmp_path)) == 0
    assert f"wrote {tmp_path}" in capsys.readouterr().out
    lm, tokenizer = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    trained, ours = train.load_model(run)
    ids = torch.from_numpy(ours.encode("the quick\n"))
    assert tokenizer("the quick\n").input_ids == ids.tolist()
    assert tokenizer.decode(ids) == "the quick\n"
    torch.testing.assert_close(lm(ids[None]).logits, trained(ids[None]))
    assert len(tokenizer) == ours.size + 1  # padding
    prompts = tokenizer(["the quick", "a"], padding=True, return_tensors="pt")
    assert prompts.attention_mask.tolist() == [[1] * 9, [0] * 8 + [1]]
    texts = tokenizer.batch_decode(lm.generate(**prompts, max_new_tokens=5, do_sample=False), skip_special_tokens=True)
    assert [len(text) for text in texts] == [14, 6]
    written = pipeline("text-generation", model=lm, tokenizer=tokenizer)("a", max_new_tokens=5, do_sample=False)
    assert written == [{"generated_text": texts[1]}]


def test_bytes_are_the_same_bytes(tmp_path):
    from transformers import AutoTokenizer

    recur.hf.tokenizer_for(Bytes()).save_pretrained(tmp_path)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path), " a\n\tbé\x00日 本🙂  <end"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
    assert recur.hf.tokenizer_for(HubTokenizer(str(tmp_path)))(text).input_ids == list(text.encode())


TASK = """
task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": "the quick", "choices": [" brown", " nworb"], "answer": 0},
    {"question": "line 1", "choices": ["0", " of many", "9 of"], "answer": 1},
    {"question": "f", "choices": ["fff", "ox"], "answer": 1},
]


def test_the_evaluation_harness_runs_a_local_task(run, tmp_path, monkeypatch):
    """It chooses by the summed log probability of the answer, as a loop over the answers does."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    kinds = {"multiple_choice": "acc", "generate_until": "exact_match"}
    for kind, metric in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, metric=metric, data=data))
    lm, tokenizer = recur.hf.from_run(run)
    harness = HFLM(lm, backend="causal", tokenizer=tokenizer, batch_size=4, max_length=64)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"log_samples": True, "bootstrap_iters": 0, "task_manager": tasks}
    out = lm_eval.simple_evaluate(harness, tasks=list(kinds), **options)
    right = []
    for question, sample in zip(QUESTIONS, out["samples"]["multiple_choice"], strict=True):
        found = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(question["question"] + choice).input_ids])
            chance = lm(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            found.append(chance[-len(choice) :].sum().item())
        assert found == pytest.approx([resp[0][0] for resp in sample["resps"]], rel=1e-5)
        right.append(found.index(max(found)) == question["answer"])
    assert out["results"]["multiple_choice"]["acc,none"] == sum(right) / len(right)
    for question, sample in zip(QUESTIONS, out["samples"]["generate_until"], strict=True):
        ids = tokenizer(question["question"], return_tensors="pt").input_ids
        text = lm.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert sample["resps"] == [[tokenizer.decode(text).partition("\n")[0]]]


def test_a_folder_without_a_run_is_said_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(str(tmp_path), str(tmp_path))
    assert f"error: no checkpoint in {tmp_path}" in capsys.readouterr().err


# ---------------------------------------------------------------------- docs/huggingface.md


def test_the_page_runs_from_top_to_bottom(text, tmp_path, monkeypatch):
    """Its commands at toy size; its code as it stands, in a folder with a text and a task."""
    page = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    Path("book.txt").write_text(text)
    Path("tasks").mkdir()
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = TASK.format(kind="multiple_choice", metric="acc", data=tmp_path / "questions.jsonl")
    Path("tasks/choose.yaml").write_text(task.replace("task: multiple_choice", "task: choose"))
    tiny = ["--dim", "16", "--depth", "1", "--steps", "2", "--length", "16", "--batch", "2"]
    commands = {"recur": lambda *words: cli.main([*words, *tiny]), "python -m recur.hf": main}
    names: dict[str, object] = {}
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(code, names)
            continue
        for line in code.splitlines():
            name = next(name for name in commands if line.startswith(name))
            assert not commands[name](*shlex.split(line.removeprefix(name)))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RecurConfig(recipe="hgrn3"), ValueError, "preset must be one of .*hgrn2.*, got 'hgrn3'"),
        (lambda: RecurForCausalLM(RecurConfig()), ValueError, "recipe must be a preset's name, .* got None"),
        (lambda: RecurConfig(recipe={"preset": "hgrn2", "head": 2}), TypeError, "head"),
        (
            lambda: RecurForCausalLM(
                RecurConfig(recipe=Recipe(Project("x", x2="D"), Reverse((Act("x2"),)), Project("x2", y="D")))
            ),
            ValueError,
            "recipe must be causal",
        ),
        (
            lambda: model().generate(some_ids(1, 3), max_new_tokens=1, cache_implementation="static"),
            NotImplementedError,
            "cache_implementation must be None, as recipes have their own, got 'static'",
        ),
        (
            lambda: model()(some_ids(1, 3), output_attentions=True),
            NotImplementedError,
            "output_attentions must be left out",
        ),
        (
            lambda: model().generate(some_ids(1, 3), output_hidden_states=True, return_dict_in_generate=True, **GREEDY),
            NotImplementedError,
            "output_hidden_states must be left out",
        ),
        (
            lambda: model(output_hidden_states=True)(some_ids(1, 3)),
            NotImplementedError,
            "output_hidden_states must be left out",
        ),
        (
            lambda: model().generate(some_ids(1, 3), past_key_values=DynamicCache(), **GREEDY),
            TypeError,
            "past_key_values must be a StateCache, as use_cache=True returns it, got DynamicCache",
        ),
        (
            lambda: model()(some_ids(1, 3), state=StateCache(None, 0), cache=StateCache(None, 0)),
            TypeError,
            "the state must come under one name, got two as state and cache",
        ),
        (
            lambda: model().generate(some_ids(1, 3), state=model()(some_ids(1, 3), use_cache=True).state, **GREEDY),
            ValueError,
            "must have the 3 columns that state has read, and new ones, got 3 and 3",
        ),
        (
            lambda: model().generate(
                some_ids(1, 1),
                attention_mask=torch.ones(1, 6),
                state=model()(some_ids(1, 3), use_cache=True).state,
                **GREEDY,
            ),
            ValueError,
            "must have the 3 columns that state has read, and new ones, got 1 and 6",
        ),
        (lambda: model().generate(some_ids(1, 3), prompt_lookup_num_tokens=2), ValueError, "stateful"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
