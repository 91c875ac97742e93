"""Templates in their child process: what they take too much of is the fault of whoever gave them."""

from collections.abc import Iterator
from functools import partial

import pytest

from pocl.errors import SpecInvalid
from pocl.limited_process import LimitedProcess
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_renderer import template_process
from pocl.spec import Data, DataRef
from tests.pocl.prompting.chat_templates import CHATML
from tests.pocl.prompting.encoders import encoder_of, talk
from tests.pocl.prompting.tokenizers import text_tokenizer

pytestmark = pytest.mark.system
DATA = Data(train=DataRef(path="x"), template="chat")


@pytest.fixture(scope="module")
def process() -> Iterator[LimitedProcess]:
    with template_process() as process:
        yield process


def test_the_child_renders_what_this_process_renders(process: LimitedProcess) -> None:
    samples = [talk("Why?", f"Because {index}.") for index in range(600)]
    encoder = make_encoder(DATA, text_tokenizer(CHATML), partial(process.call, seconds=60))
    assert encoder.encode(samples).samples == encoder_of(text_tokenizer(CHATML)).encode(samples).samples


@pytest.mark.parametrize(
    "attack",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_templates_that_take_too_much_are_refused(process: LimitedProcess, attack: str) -> None:
    with pytest.raises(SpecInvalid) as refused:
        make_encoder(DATA, text_tokenizer(attack + CHATML), partial(process.call, seconds=0.5))
    assert refused.value.field_errors[0].code == "template_unusable"
    # The next template finds a process that works.
    make_encoder(DATA, text_tokenizer(CHATML), partial(process.call, seconds=60))
