"""Load a checkpoint as anybody would, and let it answer: `python examples/answer.py DIRECTORY QUESTION...`.

Nothing of this project is imported: what was distilled is an ordinary model.
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, logging


def main(directory: str, *questions: str) -> None:
    logging.disable_progress_bar()
    # Their annotations are of every kind of tokenizer and model at once.
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{question}\n  " + text.replace("\n", "\n  "))


if __name__ == "__main__":
    main(*sys.argv[1:])
