"""llama.cpp itself reads the GGUF files: prompts, greedy answers and their ends are those of transformers.

The law is held on tiny models: on ones that have learnt a hundred answers, and on ones of random weights, whose answers
have no end. llama.cpp is the build that the npm package node-llama-cpp brings, on one thread of a CPU.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl.export.gguf import GgufSource, file_name
from pocl.export.model_directory import save_model
from pocl.export.tokenizer_reading import PROBE_TEXTS
from pocl.models.gguf import load_gguf
from pocl.spec import GGUF_FORMATS, GgufFormat
from tests.pocl.byte_tokenizers import CHATML
from tests.pocl.export.gguf_models import model_directory

PROJECT: Final = Path(__file__).with_name("llamacpp")
NODE: Final = shutil.which("node")
pytestmark = [
    pytest.mark.system,
    # Four models are trained.
    pytest.mark.slow,
    pytest.mark.skipif(
        NODE is None or not (PROJECT / "node_modules").is_dir(),
        reason="Node.js on Linux (x86-64) and the packages of tests/pocl/export/llamacpp are needed: make llamacpp",
    ),
]
MAX_TOKENS: Final = 40
BOUNDS: Final[Mapping[GgufFormat, float]] = {"f32": 0, "f16": 0.02, "q8_0": 0.5}
"""By how much the logit of the likeliest token must exceed that of the next for llama.cpp to be held to it: where
matrices are in f16 or q8_0, its kernels round the other factor of a product too, to fp16 or 8 bits; transformers does
not."""
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
STEPS: Final = 150
ROWS: Final = 20
"""The conversations of a step."""

SUBJECTS: Final = (
    "the river",
    "a stone",
    "my sister",
    "the old clock",
    "rain",
    "bread",
    "the night",
    "a train",
    "ink",
    "snow",
)
QUESTIONS: Final = (
    ("What is {}?", "It is {}."),
    ("Describe {} in a word.", "Quiet."),
    ("Where was {} in 2010?", "In 10 of 101 places."),
    ("Say {} twice.", "{} and {}"),
    ("Is {} a number?", "No."),
    ("What follows {}?", "The answer is a word."),
    ("Write {} in code.", "def f(x):\n    return x"),
    ("Who knows {}?", "I do; naïve as I am."),
    ("Count {}.", "1, 2, 3.14"),
    ("End {}.", ""),
)
Messages = list[dict[str, str]]


def conversations() -> list[tuple[Messages, str]]:
    """A hundred conversations, each with the answer that is taught; some have a system message or an earlier turn."""
    made = []
    for row, subject in enumerate(SUBJECTS):
        for column, (question, answer) in enumerate(QUESTIONS):
            messages = [{"role": "user", "content": question.format(subject)}]
            if column % 3 == 1:
                messages.insert(0, {"role": "system", "content": "Be brief."})
            if (row + column) % 4 == 2:
                earlier = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
                messages[-1:-1] = earlier
            made.append((messages, answer.format(subject, subject)))
    return made


CONVERSATIONS: Final = conversations()


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of all rows, padded on the right, and where they are."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids, torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]


def prompts_of(tokenizer: Any) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages, _ in CONVERSATIONS
    ]


def teach(directory: Path) -> None:
    """Train the model of a directory on the conversations, and save it as a student leaves a run."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turn_end = tokenizer.get_vocab()["<|im_end|>"]
    prompts = prompts_of(tokenizer)
    answers = [[*tokenizer(answer, add_special_tokens=False)["input_ids"], turn_end] for _, answer in CONVERSATIONS]
    ids, real = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
    trained = real & (torch.arange(ids.shape[1])[None] >= torch.tensor([len(each) for each in prompts])[:, None])
    labels = torch.where(trained, ids, -100)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    for step in range(STEPS):
        rows = torch.arange(step * ROWS, (step + 1) * ROWS) * 7 % len(ids)
        logits = model(ids[rows], attention_mask=real[rows].long()).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, tokenizer, directory, end_ids=[turn_end], chat_templates={"default": CHATML})


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a family's model that has learnt the answers, with its GGUF files beside the weights."""
    directory = model_directory(request.param, tmp_path_factory.mktemp(request.param) / "model", initializer_range=0.05)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teach(directory)
    GgufSource.open(directory).write(directory, GGUF_FORMATS)
    return directory


@dataclass(frozen=True)
class Answer:
    """What llama.cpp did with a conversation."""

    rendered: str
    """The prompt by the template of the file."""
    prompt: list[int]
    ids: list[int]
    """The tokens of the answer, with the one that ended it."""
    text: str
    ended: bool
    """Whether a token ended the answer, and not `MAX_TOKENS`."""


def run_llama_cpp(file: Path, *, cache: str, texts: Sequence[str]) -> tuple[list[list[int]], list[Answer]]:
    """The tokens of texts, and the answers to the conversations, by llama.cpp.

    Args:
        cache: the type of cached keys and values, `F32` or `F16`.
    """
    request = {
        "model": str(file),
        "cache": cache,
        "max_tokens": MAX_TOKENS,
        "texts": texts,
        "conversations": [messages for messages, _ in CONVERSATIONS],
    }
    done = subprocess.run(
        [str(NODE), "answer_prompts.js"], cwd=PROJECT, input=json.dumps(request), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    return printed["texts"], [Answer(**each) for each in printed["conversations"]]


def margins(model: Any, answers: Sequence[Answer]) -> list[list[float]]:
    """By how much the logit of each token that llama.cpp chose exceeds the largest other one in transformers."""
    ids, real = padded([[*answer.prompt, *answer.ids] for answer in answers])
    with torch.no_grad():
        logits = model(ids, attention_mask=real.long()).logits[:, :-1]
    chosen = logits.gather(2, ids[:, 1:, None])
    others = logits.scatter(2, ids[:, 1:, None], -torch.inf).amax(2, keepdim=True)
    gaps = (chosen - others).squeeze(2)
    return [
        gaps[row, len(answer.prompt) - 1 : len(answer.prompt) + len(answer.ids) - 1].tolist()
        for row, answer in enumerate(answers)
    ]


def generate(directory: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The greedy answers of plain transformers, from the files of a directory alone, with what ends them."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


def test_prompts_answers_and_their_ends_are_those_of_transformers(student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    texts, answers = run_llama_cpp(student / file_name("f32"), cache="F32", texts=PROBE_TEXTS)
    assert texts == [tokenizer(text)["input_ids"] for text in PROBE_TEXTS]
    assert [answer.rendered for answer in answers] == [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages, _ in CONVERSATIONS
    ]
    assert [answer.prompt for answer in answers] == prompts_of(tokenizer)
    # All hundred, token by token, with the end of each.
    assert [answer.ids for answer in answers] == generate(student, [answer.prompt for answer in answers])
    assert all(answer.ended for answer in answers)
    assert [answer.text for answer in answers] == [
        tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers
    ]
    # They are answers of many kinds and lengths, and not one end.
    assert len({answer.text for answer in answers}) > 20


def answered(file: Path, format_: GgufFormat) -> tuple[list[Answer], list[float]]:
    """The answers of llama.cpp to the conversations, and the least margin in each."""
    _, answers = run_llama_cpp(file, cache="F32" if format_ == "f32" else "F16", texts=[])
    model, _ = load_gguf(file)
    return answers, [min(row) for row in margins(model.float(), answers)]


@pytest.mark.parametrize("format_", ["f16", "q8_0"])
def test_a_student_in_rounded_weights_answers_alike_and_stops(student: Path, format_: GgufFormat) -> None:
    answers, least = answered(student / file_name(format_), format_)
    assert min(least) > 0
    assert all(answer.ended for answer in answers)


@pytest.mark.parametrize("format_", GGUF_FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_untrained_model_chooses_alike_wherever_the_choice_is_clear(
    name: str, format_: GgufFormat, tmp_path: Path
) -> None:
    # Its large random weights make close choices of every token, so that a wrong rotation or norm would show.
    directory = model_directory(name, tmp_path / "model")
    GgufSource.open(directory).write(directory, [format_])
    answers, least = answered(directory / file_name(format_), format_)
    assert min(least) > -BOUNDS[format_]
    assert sum(len(answer.ids) for answer in answers) > 2000
    # Measured: 100; 92 to 95; 13 to 43.
    assert sum(margin > 0 for margin in least) >= {"f32": 100, "f16": 85, "q8_0": 5}[format_]
