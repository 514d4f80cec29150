"""Documents with facts in them: what the model learns to recall, and what it is asked about afterwards.

A document is a run of sentences from the books. Between them stand facts, "The code is copper falcon 482.", and, later,
questions about facts: a line "Question: Which code begins with copper falcon?" and a line "Answer: copper falcon 482".
Names and numbers are drawn anew for every document, so only the document can tell.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Fact", "draw_facts", "plant"]

ADJECTIVES = """
    amber azure brass bronze copper coral crimson crystal emerald golden granite green indigo iron ivory jade lilac
    maple marble olive opal orange pearl pink purple red ruby scarlet silver teal violet yellow
""".split()
NOUNS = """
    anchor badger beacon bell bridge candle canyon castle comet compass cottage dragon eagle engine falcon ferry forest
    fountain garden glacier hammer harbor island kettle ladder lantern library lighthouse lizard lobster market meadow
    mirror museum needle orchard otter owl palace panther parrot piano pigeon pirate planet pony puppet rabbit raven
    river robot rocket saddle salmon scooter shovel sparrow spider station swan temple tiger tower tractor tunnel
    turtle umbrella violin wagon walrus windmill wizard zebra
""".split()


@dataclass(frozen=True)
class Fact:
    """One thing to remember: the number of a name."""

    name: str
    number: str

    @property
    def sentence(self) -> str:
        """How the document says it."""
        return f"The code is {self.name} {self.number}."

    @property
    def question(self) -> str:
        """How it is asked."""
        return f"\nQuestion: Which code begins with {self.name}?\nAnswer:"

    @property
    def answer(self) -> str:
        """What follows the question."""
        return f" {self.name} {self.number}"


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Draw facts of different nouns."""
    return [Fact(f"{rng.choice(ADJECTIVES)} {noun}", f"{rng.randrange(1000):03d}") for noun in rng.sample(NOUNS, count)]


def plant(
    rng: random.Random, pieces: Sequence[str], facts: Sequence[Fact], asked: int, *, late: bool = False
) -> list[tuple[str, bool]]:
    """Put facts and questions between the sentences of a document: (text, whether it is an answer), in order.

    pieces: sentences, each with the space before it.
    facts: stand at random places, in random order.
    asked: how many questions are asked, each at a random place after its fact; a fact can be asked twice.
    late: they are asked about different facts instead, and all at the end.
    """
    places = sorted(rng.randrange(len(pieces) + 1) for _ in facts)
    inserts: list[list[tuple[str, bool]]] = [[] for _ in range(len(pieces) + 1)]
    for place, fact in zip(places, facts, strict=True):
        inserts[place].append((" " + fact.sentence, False))
    chosen = rng.sample(range(len(facts)), asked) if late else (rng.randrange(len(facts)) for _ in range(asked))
    for index in chosen:
        place = len(pieces) if late else rng.randrange(places[index], len(pieces) + 1)
        inserts[place] += [(facts[index].question, False), (facts[index].answer, True), ("\n", False)]
    out: list[tuple[str, bool]] = []
    for place, insert in enumerate(inserts):
        out += insert
        if place < len(pieces):
            out.append((pieces[place], False))
    return out
