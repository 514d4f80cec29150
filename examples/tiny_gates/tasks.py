"""Write the task files of `trimkv-export eval`, from sentences that were kept from training.

python examples/tiny_gates/tasks.py OUT [--length 2048] [--documents 50] [--questions 4] [--texts 10] [--seed 0]

OUT/recall.jsonl    documents with 12 facts in them, and questions about some: {"context", "prompt", "answer"}
OUT/text.jsonl      pieces of text: {"text"}
OUT/question.txt    the first document, and its first question
OUT/answer.txt      the right answer, which is also printed
"""

import argparse
import json
import random
from pathlib import Path

from documents import draw_facts, plant
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
FACTS = 12


class HeldOut:
    """The held-out sentences, and runs of them."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(HERE / "checkpoint/base/tokenizer.json"))
        self._sentences = [" " + line for line in (HERE / "held_out.txt").read_text().splitlines()]
        self._sizes = [len(line.ids) for line in self.tokenizer.encode_batch(self._sentences)]

    def run(self, rng: random.Random, length: int) -> list[str]:
        """Sentences from a random place on, each with a space before it, of at most `length` tokens."""
        out: list[str] = []
        start = rng.randrange(len(self._sentences))
        while True:
            index = (start + len(out)) % len(self._sentences)
            length -= self._sizes[index]
            if length < 0:
                return out
            out.append(self._sentences[index])

    def questions(self, rng: random.Random, length: int, count: int) -> list[dict[str, str]]:
        """Questions about one new document; document, question and answer have at most `length` tokens."""
        facts = draw_facts(rng, FACTS)
        planted = "".join(" " + fact.sentence for fact in facts) + facts[0].question + facts[0].answer
        sentences = self.run(rng, length - len(self.tokenizer.encode(planted).ids))
        context = "".join(text for text, _ in plant(rng, sentences, facts, asked=0))
        return [
            {"context": context, "prompt": fact.question, "answer": fact.answer} for fact in rng.sample(facts, count)
        ]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a document or text")
    parser.add_argument("--documents", type=int, default=50, help="at least 1")
    parser.add_argument("--questions", type=int, default=4, help=f"asked about each document, 1 to {FACTS}")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 1 <= arguments.questions <= FACTS:
        parser.error(f"--questions must be from 1 to {FACTS}, got {arguments.questions}")
    if arguments.documents < 1:
        parser.error(f"--documents must be at least 1, got {arguments.documents}")
    if arguments.length < 512:
        parser.error(f"--length must be at least 512, got {arguments.length}: the facts need room")
    held_out, rng = HeldOut(), random.Random(arguments.seed)
    length = arguments.length
    recall = [row for _ in range(arguments.documents) for row in held_out.questions(rng, length, arguments.questions)]
    text = [{"text": "".join(held_out.run(rng, length))} for _ in range(arguments.texts)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("recall", recall), ("text", text)):
        (arguments.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = recall[0]
    (arguments.out / "question.txt").write_text(first["context"] + first["prompt"])
    (arguments.out / "answer.txt").write_text(first["answer"].strip() + "\n")
    print(f"{arguments.out / 'question.txt'} ends with: {first['prompt'].split('?')[0].split(': ')[1]}?")
    print(f"the right answer, also in {arguments.out / 'answer.txt'}: {first['answer'].strip()}")


if __name__ == "__main__":
    main()
