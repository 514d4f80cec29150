"""Chats about documents, built from the texts: what gates learn from that facts must be kept until they are asked for.

    python examples/smollm2/chats.py TEXTS OUT.jsonl [--count 1500] [--seed 0]

TEXTS is the folder `train` of texts.py. A line is {"messages": […]}: the user shows a passage and asks, the assistant
answers. The questions are of four kinds: a fact that was put into the passage, in many wordings, several of them asked
in turn; a sentence of the passage, by how it begins; what comes before the question and is needed after it ("remember
this"); and whether something is said, with its words.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHARACTERS = (1500, 6500)  # of a passage: 400 to 1,900 tokens

NAMES = """
    Alice Benjamin Clara Daniel Elena Frank Grace Henry Irene Jacob Karen Leonard Maria Nathan Olivia Peter Quentin Rosa
    Samuel Teresa Ulrich Victoria Walter Xenia Yusuf Zoe Amina Boris Chen Dolores Emil Fatima Goran Hanna Igor Julia
    Kofi Lena Mateo Nadia Oscar Priya Rashid Sofia Tomas Ursula Vikram Wanda
""".split()
SURNAMES = """
    Abbott Baker Carver Dalton Ellis Foster Garner Hughes Ingram Jarvis Keller Lambert Mercer Norton Osborne Palmer
    Quinn Ramsey Sutton Thorne Upton Vance Weber Xu Young Zimmer Almeida Bianchi Castro Dubois Eriksen Fischer Gupta
    Horvat Ivanov Jensen Kowalski Larsen Moreau Novak Okafor Petrov Rossi Schmidt Tanaka Vargas
""".split()
PLACES = """
    Amsterdam Bergen Cairo Dresden Edinburgh Florence Geneva Hamburg Istanbul Jakarta Krakow Lisbon Madrid Naples Oslo
    Prague Quito Riga Seville Toronto Utrecht Valencia Warsaw Yokohama Zagreb Boston Chicago Denver Glasgow Havana
    Kyoto Lima Montreal Nairobi Portland Reykjavik Salzburg Tunis Vienna Wellington
""".split()
THINGS = """
    bicycle camera candle chair clock compass drum easel flute globe guitar hammer hat helmet jacket kettle key kite
    ladder lamp lantern map mirror mug notebook paddle painting piano pillow puzzle radio ring rope scarf shovel stamp
    suitcase sword telescope ticket umbrella vase violin wallet whistle
""".split()
COLOURS = "amber black blue bronze brown crimson golden gray green orange pink purple red silver white yellow".split()
MONTHS = "January February March April May June July August September October November December".split()
TEAMS = "harbor, archive, kitchen, library, garden, museum, laboratory, theatre, workshop, station".split(", ")
DISHES = "lentil soup, apple pie, fish stew, rice pudding, onion tart, pea soup, plum cake, bean salad".split(", ")
JOBS = """
    baker carpenter dentist engineer florist geologist lawyer nurse pilot plumber tailor teacher
""".split()

Draw = random.Random


@dataclass(frozen=True)
class Fact:
    """A sentence, and what is asked and answered about it."""

    sentence: str
    question: str
    answer: str


def _person(draw: Draw) -> str:
    return f"{draw.choice(NAMES)} {draw.choice(SURNAMES)}"


def _code(draw: Draw) -> str:
    letters = "".join(draw.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(draw.randint(0, 3)))
    return letters + "".join(str(draw.randrange(10)) for _ in range(draw.randint(3, 6)))


def _number_of_thing(draw: Draw) -> Fact:
    thing, code = f"{draw.choice(COLOURS)} {draw.choice(THINGS)}", _code(draw)
    word = draw.choice(["code", "number", "access code", "serial number", "secret number", "combination"])
    return Fact(
        draw.choice([f"The {word} of the {thing} is {code}.", f"Note that {code} is the {word} of the {thing}."]),
        draw.choice([f"What is the {word} of the {thing}?", f"Which {word} does the {thing} have?"]),
        f"The {word} of the {thing} is {code}.",
    )


def _magic_number(draw: Draw) -> Fact:
    place, code = draw.choice(PLACES), str(draw.randrange(1000, 10_000_000))
    word = draw.choice(["magic number", "special number", "secret number", "lucky number"])
    return Fact(
        draw.choice([f"The {word} for {place} is {code}.", f"One of the {word}s for {place} is: {code}."]),
        draw.choice([f"What is the {word} for {place}?", f"What {word} for {place} is mentioned in the text?"]),
        f"The {word} for {place} is {code}.",
    )


def _password(draw: Draw) -> Fact:
    team, word = draw.choice(TEAMS), f"{draw.choice(COLOURS)}-{draw.choice(THINGS)}-{draw.randrange(100)}"
    return Fact(
        draw.choice([f"The password of the {team} is {word}.", f"To enter the {team}, say the password {word}."]),
        draw.choice([f"What is the password of the {team}?", f"Which password opens the {team}?"]),
        f"The password of the {team} is {word}.",
    )


def _home(draw: Draw) -> Fact:
    person, place = _person(draw), draw.choice(PLACES)
    verb, ask = draw.choice([("lives in", "live"), ("was born in", "come from"), ("works in", "work")])
    question = f"Where was {person} born?" if ask == "come from" else f"Where does {person} {ask}?"
    return Fact(f"{person} {verb} {place}.", question, f"{person} {verb} {place}.")


def _job(draw: Draw) -> Fact:
    person, job = _person(draw), draw.choice(JOBS)
    article = "an" if job[0] in "aeiou" else "a"
    return Fact(
        draw.choice([f"{person} is {article} {job}.", f"{person} has worked as {article} {job} for years."]),
        draw.choice([f"What is the profession of {person}?", f"What does {person} do for a living?"]),
        f"{person} is {article} {job}.",
    )


def _date(draw: Draw) -> Fact:
    what = f"{draw.choice(['meeting', 'concert', 'exam', 'wedding', 'journey', 'delivery'])} in {draw.choice(PLACES)}"
    day = f"{draw.choice(MONTHS)} {draw.randint(1, 28)}"
    return Fact(
        draw.choice([f"The {what} is on {day}.", f"They agreed on {day} for the {what}."]),
        draw.choice([f"When is the {what}?", f"On which day is the {what}?"]),
        f"The {what} is on {day}.",
    )


def _favourite(draw: Draw) -> Fact:
    person, dish = _person(draw), draw.choice(DISHES)
    return Fact(
        draw.choice([f"The favorite dish of {person} is {dish}.", f"{person} likes {dish} best of all."]),
        draw.choice([f"What is the favorite dish of {person}?", f"Which dish does {person} like best?"]),
        f"The favorite dish of {person} is {dish}.",
    )


def _telephone(draw: Draw) -> Fact:
    person = _person(draw)
    number = f"{draw.randrange(100, 1000)}-{draw.randrange(100, 1000)}-{draw.randrange(1000, 10000)}"
    return Fact(
        draw.choice([f"The telephone number of {person} is {number}.", f"{person} can be reached at {number}."]),
        draw.choice([f"What is the telephone number of {person}?", f"At which number can {person} be reached?"]),
        f"The telephone number of {person} is {number}.",
    )


def _belongings(draw: Draw) -> Fact:
    person, thing = _person(draw), f"{draw.choice(COLOURS)} {draw.choice(THINGS)}"
    where = draw.choice(["under the stairs", "behind the door", "in the attic", "on the roof", "in the cellar"])
    return Fact(
        draw.choice([f"{person} keeps the {thing} {where}.", f"The {thing} of {person} is {where}."]),
        f"Where is the {thing} of {person}?",
        f"The {thing} of {person} is {where}.",
    )


FACTS: tuple[Callable[[Draw], Fact], ...] = (
    _number_of_thing, _magic_number, _password, _home, _job, _date, _favourite, _telephone, _belongings,
)  # fmt: skip
ASK_FIRST = (
    "Read this text. I will ask about it.\n\n{}\n\n{}",
    "Here is a document:\n\n{}\n\nQuestion: {}",
    "{}\n\nAnswer this question about the text above: {}",
    "Use the following text to answer a question.\n\n{}\n\n{}",
    "{}\n\n{}",
)


class Passages:
    """Passages of the texts, at paragraph and sentence borders."""

    def __init__(self, files: list[Path]) -> None:
        self._texts = [file.read_text(encoding="utf-8") for file in files]
        self._weights = [len(text) ** 0.5 for text in self._texts]

    def draw(self, draw: Draw, length: int) -> list[str]:
        """Sentences of a passage of about that many characters, each with the space before it."""
        (text,) = draw.choices(self._texts, self._weights)
        start = draw.randrange(max(1, len(text) - length - 1000))
        start = max(text.find("\n", start), start) + 1
        return re.findall(r"\S.*?(?:[.!?:](?=\s)|\n\s*\n|\Z)\s*", text[start : start + length], re.DOTALL)


def _facts_chat(draw: Draw, passages: Passages, length: int) -> list[tuple[str, str]]:
    sentences = passages.draw(draw, length)
    facts = {fact.question: fact for fact in (draw.choice(FACTS)(draw) for _ in range(draw.randint(1, 6)))}
    for fact in facts.values():
        sentences.insert(draw.randrange(len(sentences) + 1), fact.sentence + " ")
    asked = draw.sample(list(facts.values()), draw.randint(1, min(3, len(facts))))
    text = "".join(sentences).strip()
    first = draw.choice(ASK_FIRST).format(text, asked[0].question)
    return [(first, asked[0].answer), *((fact.question, fact.answer) for fact in asked[1:])]


def _quote_chat(draw: Draw, passages: Passages, length: int) -> list[tuple[str, str]] | None:
    sentences = passages.draw(draw, length)
    stripped = [sentence.strip() for sentence in sentences]
    longer = [sentence for sentence in stripped if 60 <= len(sentence) <= 300 and "\n" not in sentence]
    if len(longer) < 3:
        return None
    text, turns = "".join(sentences).strip(), list[tuple[str, str]]()
    for sentence in draw.sample(longer, draw.randint(1, 2)):
        words = sentence.split(" ")
        begin = " ".join(words[: max(3, len(words) // 3)])
        question = draw.choice(
            [f'How does the sentence go on that begins with "{begin}"?', f'Quote the sentence that begins "{begin}".']
        )
        turns.append((question if turns else draw.choice(ASK_FIRST).format(text, question), sentence))
    return turns


def _remember_chat(draw: Draw, passages: Passages, length: int) -> list[tuple[str, str]]:
    facts = [draw.choice(FACTS)(draw) for _ in range(draw.randint(1, 3))]
    told = "Remember this: " + " ".join(fact.sentence for fact in facts)
    text = "".join(passages.draw(draw, length)).strip()
    asked = draw.choice(facts)
    return [
        (told, draw.choice(["I will remember it.", "Understood.", "Noted. What is next?"])),
        (f"Now read this:\n\n{text}\n\n{asked.question}", asked.answer),
    ]


def _said_chat(draw: Draw, passages: Passages, length: int) -> list[tuple[str, str]]:
    sentences = passages.draw(draw, length)
    fact = draw.choice(FACTS)(draw)
    if said := draw.random() < 0.6:
        sentences.insert(draw.randrange(len(sentences) + 1), fact.sentence + " ")
    question = f"Does the text answer this: {fact.question} If so, quote it."
    answer = f'Yes: "{fact.sentence}"' if said else "No, the text does not say it."
    return [(draw.choice(ASK_FIRST).format("".join(sentences).strip(), question), answer)]


Turns = list[tuple[str, str]]
KINDS: dict[Callable[[Draw, Passages, int], Turns | None], int] = {
    _facts_chat: 10, _quote_chat: 4, _remember_chat: 4, _said_chat: 2
}  # fmt: skip


def make_chats(files: list[Path], count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Chats, each {"messages": …}."""
    draw, passages = random.Random(seed), Passages(files)
    out: list[dict[str, list[dict[str, str]]]] = []
    while len(out) < count:
        (maker,) = draw.choices(list(KINDS), list(KINDS.values()))
        turns = maker(draw, passages, draw.randint(*CHARACTERS))
        if turns:
            said = [part for turn in turns for part in zip(("user", "assistant"), turn, strict=True)]
            out.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return out


def main() -> None:
    """Write the chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="the folder of texts to train on")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chats = make_chats(sorted(arguments.texts.glob("*.txt")), arguments.count, arguments.seed)
    lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    arguments.out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
