"""Generation by vLLM, an optional package, behind the signature of :func:`~pocl.evaluation.generate.generate`.

vLLM loads a model from a directory, so the model is saved into a temporary one, in the format of the products. It is
worth its start of half a minute for thousands of answers. Sampled answers draw from vLLM's own generator: they follow
from seed and key too, but are others than the engine's.
"""

import gc
import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedModel

from pocl.callbacks import OnProgress, ShouldStop
from pocl.errors import FieldError, ModelUnsupported, RunStopped, SpecInvalid
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import questions_of
from pocl.evaluation.question import Question
from pocl.events import Sink
from pocl.models.precision import Precision

_CHUNK_ROUNDS = 8
"""Questions that vLLM is given at once, in multiples of the rows in flight: it cannot be stopped in between."""
_SHARE_OF_FREE_MEMORY = 0.9


def generate_with_vllm(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    keys: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
    sink: Sink = lambda _: None,
    vllm: Any = None,
) -> list[list[int]]:
    """Generate an answer to each prompt; arguments and result as :func:`~pocl.evaluation.generate.generate`.

    With graphs vLLM compiles the model and records CUDA graphs at its start. It has no ban of repeated n-grams.
    Answers are cut at a text that ends them once they are made: vLLM is given token ids and decodes none.

    Args:
        should_stop: Polled before each chunk of prompts.
        vllm: The module; imported unless given.

    Raises:
        SpecInvalid: vLLM is not installed, or repeated n-grams are to be banned.
        ModelUnsupported: vLLM does not know the model's architecture.
        RunStopped, ValueError: as :func:`~pocl.evaluation.generate.generate`.
    """
    del sink
    if decoding.no_repeat_ngram is not None:
        detail = "vLLM cannot ban repeated n-grams: leave resources.generator at engine"
        raise SpecInvalid([FieldError("/curriculum/ranking/no_repeat_ngram", "unsupported_by_vllm", detail)])
    questions = questions_of(model, prompts, decoding.max_new_tokens, keys)
    vllm = _import_vllm() if vllm is None else vllm
    architecture = type(model).__name__
    if architecture not in vllm.ModelRegistry.get_supported_archs():
        raise ModelUnsupported(f"vLLM does not know {architecture}: leave resources.generator at engine.")
    if not questions:
        return []
    answers: list[list[int]] = []
    precision = decoding.precision_on(model.device)
    with tempfile.TemporaryDirectory(prefix="pocl-vllm-") as directory:
        _export(model, precision, directory)
        llm = vllm.LLM(
            model=directory,
            dtype={torch.bfloat16: "bfloat16", torch.float32: "float32"}[precision.weights],
            # Prompts are token ids, and answers are decoded by the caller.
            skip_tokenizer_init=True,
            max_model_len=max(len(question.prompt) + question.limit for question in questions),
            max_num_seqs=decoding.rows_in_flight,
            enforce_eager=not decoding.graphs,
            **_memory_share(model.device),
        )
        try:
            chunk = _CHUNK_ROUNDS * decoding.rows_in_flight
            for start in range(0, len(questions), chunk):
                if should_stop():
                    raise RunStopped
                asked = questions[start : start + chunk]
                made = _answers(vllm, llm, asked, decoding)
                answers += made if decoding.stop_text is None else map(decoding.stop_text.cut, made)
                if on_progress is not None:
                    on_progress(len(answers), len(questions))
        finally:
            _shut_down(llm)
            del llm
            gc.collect()
            torch.cuda.empty_cache()
    return answers


def _answers(vllm: Any, llm: Any, questions: Sequence[Question], decoding: Decoding) -> list[list[int]]:
    sampler, eos_token_ids = decoding.sampler, decoding.eos_token_ids
    drawn = {} if sampler is None else {"top_p": sampler.top_p}
    parameters = [
        vllm.SamplingParams(
            temperature=0.0 if sampler is None else sampler.temperature,
            seed=None if sampler is None else sampler.seed_of(question.key),
            max_tokens=question.limit,
            # The tokens that end an answer are those given, and no others that the model's files may name.
            stop_token_ids=sorted(eos_token_ids),
            ignore_eos=True,
            detokenize=False,
            **drawn,
        )
        for question in questions
    ]
    prompts = [{"prompt_token_ids": list(question.prompt)} for question in questions]
    found = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, parameters, use_tqdm=False)]
    return [tokens[:-1] if tokens and tokens[-1] in eos_token_ids else tokens for tokens in found]


def vllm_missing() -> SpecInvalid:
    """The refusal of a job that asks for vLLM where it is not installed."""
    detail = "vLLM is not installed on this worker: `pip install '.[vllm]'` there, or leave the generator at engine"
    return SpecInvalid([FieldError("/resources/generator", "unavailable", detail)])


def _import_vllm() -> Any:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise vllm_missing() from error


def _export(model: PreTrainedModel, precision: Precision, directory: str) -> None:
    # Tied weights must stay one tensor, so that they are saved once.
    rounded: dict[int, torch.Tensor] = {}
    weights = {
        name: rounded.setdefault(tensor.data_ptr(), tensor.detach().to(precision.weights))
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(directory, state_dict=weights)


def _memory_share(device: torch.device) -> dict[str, float]:
    """The share of the whole card that vLLM may take; it counts what others hold in it as its own."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"gpu_memory_utilization": (total - free + _SHARE_OF_FREE_MEMORY * free) / total}


def _shut_down(llm: Any) -> None:
    """End vLLM's own process, which holds the memory; newer versions have a method for it."""
    shut_down = getattr(llm, "shutdown", None) or getattr(
        getattr(llm.llm_engine, "engine_core", None), "shutdown", None
    )
    if shut_down is not None:
        shut_down()
