"""Questions about facts in the middle of real documents, asked in chat: a task file for `trimkv-export eval`.

    python examples/smollm2/retrieval.py TOKENIZER_FOLDER TEXT… --output questions.jsonl [--length 2048 --documents 20]

Each document is a piece of a text, in whole paragraphs, with four facts at a tenth, a third, six tenths and nine tenths
of it. A conversation reads it, then each question is asked on its own.
"""

import argparse
import json
import random
from pathlib import Path

from trimkv_export.text.tokenizer import Tokenizer

DEPTHS = (0.1, 0.35, 0.6, 0.9)
PLACES = """
Amsterdam Athens Bangkok Barcelona Berlin Boston Brussels Cairo Chicago Copenhagen Dublin Edinburgh Florence
Geneva Hamburg Helsinki Istanbul Jakarta Kyoto Lima Lisbon London Madrid Manila Melbourne Milan Montreal
Munich Nairobi Oslo Paris Prague Rome Santiago Seattle Seoul Stockholm Sydney Tokyo Toronto Venice Vienna
Warsaw Zurich
""".split()
FACT = "The access code for the {place} office is {code}."
QUESTION = (
    "\n\nWhat is the access code for the {place} office?<|im_end|>\n<|im_start|>assistant\n"
    "The access code for the {place} office is"
)
BEGIN = "<|im_start|>user\nRead this text.\n\n"


def main() -> None:
    """Write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, tokenizer = random.Random(arguments.seed), Tokenizer.open(arguments.tokenizer)
    texts = [file.read_text().split("\n\n") for file in arguments.text]
    with arguments.output.open("w") as file:
        for number in range(arguments.documents):
            text = texts[number % len(texts)]
            places = draw.sample(PLACES, len(DEPTHS))
            facts = [(place, str(draw.randrange(1000, 10000))) for place in places]
            context = BEGIN + _document(text, facts, arguments.length, tokenizer, draw)
            for at, (place, code) in enumerate(facts):
                row = {"context": context, "prompt": QUESTION.format(place=place), "answer": f" {code}"}
                file.write(json.dumps(row | {"id": f"{number}:{DEPTHS[at]}"}) + "\n")


def _document(
    paragraphs: list[str], facts: list[tuple[str, str]], length: int, tokenizer: Tokenizer, draw: random.Random
) -> str:
    """Paragraphs from a random place on, of about `length` tokens, with the facts as paragraphs of their own."""
    at = draw.randrange(len(paragraphs) // 2)
    chosen: list[str] = []
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(len(tokenizer.encode(paragraphs[at], add_special_tokens=False)) + 1)
        chosen.append(paragraphs[at])
        at += 1
    parts, read, due = [], 0, list(zip(DEPTHS, facts, strict=True))
    for paragraph, size in zip(chosen, sizes, strict=True):
        if due and read >= due[0][0] * length:
            place, code = due.pop(0)[1]
            parts.append(FACT.format(place=place, code=code))
        parts.append(paragraph)
        read += size
    parts += [FACT.format(place=place, code=code) for _, (place, code) in due]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
