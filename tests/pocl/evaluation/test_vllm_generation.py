"""vLLM is given what the engine would be given, and what it answers comes back in order; a fake stands for it."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pocl.errors import ModelUnsupported, RunStopped, SpecInvalid
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.vllm_generation import generate_with_vllm
from pocl.models.precision import Precision
from tests.pocl.evaluation.test_generate import Prompts, common_tokens, prompts_of
from tests.pocl.tiny_models import PAD, tiny

CPU = torch.device("cpu")


class FakeVllm:
    """The part of vLLM that is used: a model is loaded from its directory, and transformers answers."""

    def __init__(self, architectures: Sequence[str] = ("LlamaForCausalLM",)) -> None:
        self.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: architectures)
        self.loaded: list[dict[str, Any]] = []
        self.asked: list[Mapping[str, Any]] = []
        self.shut_down = 0

    def SamplingParams(self, **options: Any) -> dict[str, Any]:  # The name is vLLM's.
        return options

    def LLM(self, **options: Any) -> SimpleNamespace:  # The name is vLLM's.
        self.loaded.append({**options, "files": sorted(path.name for path in Path(options["model"]).iterdir())})
        model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"]))

        def answer(prompts: Sequence[Mapping[str, Any]], parameters: Sequence[Any], use_tqdm: bool) -> list[Any]:
            assert not use_tqdm
            self.asked += parameters
            outputs = []
            for prompt, options in zip(prompts, parameters, strict=True):
                ids = prompt["prompt_token_ids"]
                (tokens,) = generate(model, [ids], Decoding(options["max_tokens"], 1, set(), PAD))
                ends = [at for at, token in enumerate(tokens) if token in options["stop_token_ids"]]
                # Where a stop token ends an answer it is the last of its tokens.
                tokens = tokens[: ends[0] + 1] if ends else tokens
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]))
            return outputs

        def shutdown() -> None:
            self.shut_down += 1

        return SimpleNamespace(generate=answer, shutdown=shutdown)


def answered(
    vllm: FakeVllm, prompts: Prompts, *, eos: set[int], sampler: Sampler | None = None,
    should_stop: Callable[[], bool] = lambda: False, family: str = "llama",
) -> Prompts:  # fmt: skip
    decoding = Decoding(12, 1, eos, PAD, Precision("fp32", CPU), sampler)
    return generate_with_vllm(tiny(family), prompts, decoding, should_stop=should_stop, vllm=vllm)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_answers_are_those_of_the_engine_in_order(family: str) -> None:
    # The embedding of the second one is tied to its head.
    vllm, prompts = FakeVllm(["LlamaForCausalLM", "Qwen2ForCausalLM"]), prompts_of([5, 60, 9, 2, 12, 5, 3, 8, 4, 7])
    eos = common_tokens(tiny(family), prompts[2:])
    expected = generate(tiny(family), prompts, Decoding(12, 4, eos, PAD))
    assert answered(vllm, prompts, eos=eos, family=family) == expected
    (options,) = vllm.loaded
    assert (options["dtype"], options["max_model_len"], options["max_num_seqs"]) == ("float32", 64, 1)
    assert "model.safetensors" in options["files"]
    assert vllm.shut_down == 1
    assert not Path(options["model"]).exists()
    assert all(asked["temperature"] == 0.0 and asked["ignore_eos"] for asked in vllm.asked)


def test_each_key_has_a_seed_of_its_own_that_follows_from_the_samplers() -> None:
    def seeds(seed: int) -> list[int]:
        vllm = FakeVllm()
        answered(vllm, prompts_of([5, 9]), eos=set(), sampler=Sampler(0.7, 0.9, seed))
        assert [(asked["temperature"], asked["top_p"]) for asked in vllm.asked] == [(0.7, 0.9)] * 2
        return [asked["seed"] for asked in vllm.asked]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 4


def test_a_stop_ends_between_chunks_and_gives_the_memory_back() -> None:
    vllm, polls = FakeVllm(), iter([False, True])
    with pytest.raises(RunStopped):
        answered(vllm, prompts_of([3] * 20), eos=set(), should_stop=lambda: next(polls))
    assert (len(vllm.asked), vllm.shut_down) == (8, 1)


def test_an_architecture_that_vllm_does_not_know_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="vLLM does not know LlamaForCausalLM"):
        answered(FakeVllm(["OPTForCausalLM"]), prompts_of([3]), eos=set())


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_said() -> None:
    with pytest.raises(SpecInvalid, match="/resources/generator: vLLM is not installed"):
        generate_with_vllm(tiny("llama"), [[4]], Decoding(1, 1, set(), PAD))
