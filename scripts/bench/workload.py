"""The rows that training speed is measured on.

    python workload.py FILE.jsonl [COUNT]

64 synthetic multiple-choice questions as chat rows with a common instruction of 24 tokens. In ChatML, with the tokenizer of
SmolLM2, they have 69 to 222 tokens, 122.7 in the mean. Row i depends on i alone. What is asked means nothing: it is the shape
of a first user's file that counts, and the figures of reference measurements were taken on these very rows.
"""

import json
import random
import sys

INSTRUCTION = "Answer the multiple-choice question with the letter of the one correct option only: A, B, C or D."
NAMES = "Amara Bilal Chen Dora Emeka Farid Grace Hana Ivan Jomo Kofi Lena Musa Nadia Omar Priya Quinn Rosa Sami Tariq".split()
JOBS = "farmer nurse teacher baker fisher carpenter driver engineer tailor librarian gardener welder".split()
THINGS = "water rice copper salt paper cotton timber steel glass honey coffee maize".split()
PLACES = "village market river school clinic harbour workshop forest valley station island factory".split()
DEEDS = [
    "heats the {t} slowly over a small fire and writes down the temperature every few minutes",
    "carries the {t} from the {p} to the storehouse and weighs each load before closing the door",
    "mixes the {t} with a little sand, lets it stand for a night, and then pours off the clear part",
    "divides the {t} into equal shares, sells most of them at the {p}, and keeps the rest for the family",
    "stores the {t} in a sealed jar, leaves it in the shade, and checks its colour at the end of the week",
]
QUESTIONS = [
    "What most likely happens to the {t} by the end of the day?",
    "What is the best reason for doing this?",
    "What must be known to work out the total cost of the {t}?",
    "Which conclusion is supported?",
]
OPTIONS = [
    "it stays the same",
    "it loses mass",
    "price goes up",
    "price falls",
    "it saves time",
    "it saves fuel",
    "the {p}",
    "more workers",
    "one load",
    "the distance",
    "it gets warmer",
    "none of these",
]


def question(i, sentences):
    """The text and the right letter of question i; -1 sentences is without the introduction."""
    draw = random.Random(9 * 1000003 + i)
    name, job, thing, place = (draw.choice(words) for words in (NAMES, JOBS, THINGS, PLACES))
    words = {"t": thing, "p": place}
    deeds = draw.sample(DEEDS, max(sentences, 0))
    text = ""
    if sentences >= 0:
        text = f"{name}, a {job}, has {draw.randint(3, 98)} kilos of {thing} near the {place}. "
    for k, deed in enumerate(deeds):
        text += ("Then " if k else "Every day ") + f"{name} {deed.format(**words)}. "
    text += draw.choice(QUESTIONS).format(**words)
    for letter, option in zip("ABCD", draw.sample(OPTIONS, 4)):
        text += f"\n{letter}. {option.format(**words)}"
    return text, "ABCD"[draw.randrange(4)]


def row(i):
    """Row i, as a chat."""
    sentences = random.Random(77 + i).choices([-1, 0, 1, 2, 3, 4, 5], [10, 26, 28, 18, 8, 6, 4])[0]
    text, answer = question(i, sentences)
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]


def write(path, count=64):
    with open(path, "w") as f:
        for i in range(count):
            f.write(json.dumps({"messages": row(i)}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    write(sys.argv[1], *map(int, sys.argv[2:]))
