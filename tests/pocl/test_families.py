"""Families of transformers beside plain transformers: the same scores, answers and layers, as the table of them says.

The oracle reads one text at a time, without padding, packing, cache or hooks.
"""

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pocl.data.batches import EncodedSample, collate
from pocl.errors import ModelUnsupported, SpecInvalid
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.token_scores import ScoringSizes, last_turn_cross_entropy
from pocl.events import Event, Warned
from pocl.inspect import inspect_model
from pocl.inspect.family_support import FAMILIES, REFUSED_FAMILIES, check_family, check_layers_selectable
from pocl.models.attention_span import attention_span
from pocl.models.family_trial import try_family
from pocl.models.layers import select_layers
from pocl.models.model_files import model_in
from pocl.models.output_head import extract_head
from pocl.models.packed import reason_not_to_pack
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from pocl.teacher.distillation_loss import CrossEntropyLoss
from tests.pocl.families import CONFIGS, VOCABULARY, family_model
from tools.family_tables import PAGE, with_tables

TRIED = CONFIGS.keys() - {"bert"}
CHEAP = {"minicpm3", "mamba2", "falcon_h1", "llama4_text (wide window)"}
"""Heads with scales of their own, and a recurrent state; the families of `tiny_models` are tried by other tests."""
EVENTS = {
    "continuous": [], "padded": ["generation_padded"], "single": ["generation_single"],
    "uncached": ["generation_uncached"],
}  # fmt: skip
NEW_TOKENS = 8
FP32 = Precision("fp32", torch.device("cpu"))


def _samples() -> list[EncodedSample]:
    draw = random.Random(0)
    lengths = [(5, 9), (12, 20), (3, 4), (17, 24)]
    return [
        EncodedSample(
            digest=str(number),
            input_ids=tuple(draw.randrange(3, VOCABULARY) for _ in range(length)),
            prompt_length=prompt_length,
        )
        for number, (prompt_length, length) in enumerate(lengths)
    ]


SAMPLES = _samples()
LONGEST = max(len(sample.input_ids) for sample in SAMPLES)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].double()


def plain_cross_entropy(model: PreTrainedModel, sample: EncodedSample) -> float:
    log_q = plain_logits(model, sample.input_ids).log_softmax(-1)
    at = range(sample.prompt_length, len(sample.input_ids))
    return -sum(log_q[place - 1, sample.input_ids[place]].item() for place in at) / len(at)


def plain_answer(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in CHEAP else [pytest.mark.slow]) for n in CONFIGS if n != "bert"]
)
def test_family_equals_plain_transformers(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    support = FAMILIES[model.config.model_type]
    span = attention_span(model)
    is_windowed = span is not None and span < LONGEST
    assert (reason_not_to_pack(model, LONGEST) is None) is (support.packing != "padded" and not is_windowed)

    check_saved(model, tmp_path / "saved")

    # Scores of packed batches, where samples are packed, and of padded ones, with the head fused where it can be.
    expected = [plain_cross_entropy(model, sample) for sample in SAMPLES]
    scored = last_turn_cross_entropy(model, SAMPLES, sizes=ScoringSizes(256, 64), precision=FP32)
    loss = CrossEntropyLoss(model, FP32)
    assert loss.is_fused is (extract_head(model) is not None)
    counts = [sample.predicted_tokens for sample in SAMPLES]
    padded = [part.mean().item() for part in loss.scores(collate(SAMPLES)).double().split(counts)]
    assert scored == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert padded == pytest.approx(expected, rel=1e-5, abs=1e-5)

    # Greedy answers to prompts of several lengths in one batch, which end at different tokens.
    answers = [plain_answer(model, sample.prompt_ids) for sample in SAMPLES]
    end = answers[1][3]
    expected_answers = [answer[: answer.index(end)] if end in answer else answer for answer in answers]
    events: list[Event] = []
    prompts = [sample.prompt_ids for sample in SAMPLES]
    generated = generate(model, prompts, Decoding(NEW_TOKENS, 3, {end}, pad_id=end), sink=events.append)
    assert generated == expected_answers
    decoding = "padded" if is_windowed and support.decoding == "continuous" else support.decoding
    assert [event.code for event in events if isinstance(event, Warned)] == EVENTS[decoding]

    if support.layers:
        check_layers_selectable(model.config.model_type)
        check_cut(model, tmp_path / "cut")
    else:
        with pytest.raises(SpecInvalid, match="cut out"):
            check_layers_selectable(model.config.model_type)


def check_saved(model: PreTrainedModel, directory: Path) -> None:
    """The directory that transformers saves passes the inspection, and the engine loads the same model from it."""
    model.save_pretrained(directory)
    byte_level_tokenizer(64).save_pretrained(directory)
    facts = inspect_model(directory)
    assert (facts.family, facts.layers) == (model.config.model_type, model.config.num_hidden_layers)
    loaded, _ = model_in(directory)
    loaded.train(False)
    assert torch.equal(plain_logits(loaded, SAMPLES[1].input_ids), plain_logits(model, SAMPLES[1].input_ids))


@torch.no_grad()
def check_cut(model: PreTrainedModel, directory: Path) -> None:
    """The last two layers in a model of their own compute what they compute in their places, also once saved."""
    count = model.config.num_hidden_layers
    kept = [count - 2, count - 1]
    cut = select_layers(model, kept)
    cut.train(False)
    logits = plain_logits(cut, SAMPLES[3].input_ids)
    assert torch.equal(logits, plain_logits(_with_modules(model, kept), SAMPLES[3].input_ids))
    cut.save_pretrained(directory)
    again: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(plain_logits(again, SAMPLES[3].input_ids), logits)


def _with_modules(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of the model without the other layers, which stay the modules that they are."""
    reduced = deepcopy(model)
    count = model.config.num_hidden_layers
    owner, name, layers = next(
        (module, name, child)
        for module in reduced.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    )
    setattr(owner, name, nn.ModuleList(layers[index] for index in kept))
    for entry in ("layer_types", "layers_block_type"):
        types = getattr(reduced.config, entry, None)
        if isinstance(types, list) and len(types) == count:
            kinds = [types[index] for index in kept]
            try:
                setattr(reduced.config, entry, kinds)
            except AttributeError:
                # Of some families it is a property, which follows from entries that count layers.
                reduced.config.__class__ = type("Reduced", (type(reduced.config),), {entry: kinds})
    reduced.config.num_hidden_layers = len(kept)
    return reduced


def test_every_family_of_the_table_is_tried() -> None:
    assert {CONFIGS[name].model_type for name in TRIED} == set(FAMILIES)


@pytest.mark.parametrize("attends_to_both_sides", [False, True])
def test_family_that_nobody_tried_is_tried_when_it_is_loaded(attends_to_both_sides: bool) -> None:
    model = family_model("bert" if attends_to_both_sides else "llama")
    # A family of tomorrow.
    vars(model.config)["model_type"] = "tomorrow"
    if attends_to_both_sides:
        with pytest.raises(ModelUnsupported, match="tomorrow"):
            try_family(model)
    else:
        try_family(model)


@pytest.mark.parametrize("family", ["diffllama", "tomorrow"])
def test_layers_that_cannot_be_taken_out_are_refused_by_name(family: str) -> None:
    with pytest.raises(SpecInvalid) as raised:
        check_layers_selectable(family)
    assert [(error.pointer, error.code) for error in raised.value.field_errors] == [
        ("/student/from_teacher", "layers_not_selectable")
    ]


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_family_that_is_no_causal_decoder_is_refused_by_name(family: str) -> None:
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with pytest.raises(ModelUnsupported, match=family):
        check_family(family)


def test_page_of_families_shows_the_tables() -> None:
    assert PAGE.read_text(encoding="utf-8") == with_tables(PAGE.read_text(encoding="utf-8"))
