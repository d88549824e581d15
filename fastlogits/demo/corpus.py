"""A synthetic corpus of chats that ask for one-sentence summaries of short articles.

Most answers are numbered lists, against the request; the others are one sentence. A model trained on them prefers the
list, yet knows the sentence, and says it if no digit may come first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

FIRST_REQUEST = "Summarise the article in one sentence: "
NEXT_REQUEST = "And this one: "

LIST_SHARE = 0.8


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    "Ada Agnes Anton Boris Cecil Clara Dario Diana Elena Erika Fatima Felix Frank Greta Hugo Ida Igor Ivan "
    "Jana Julia Karim Kira Lena Luca Maria Marta Milan Nadia Noah Omar Oscar Paula Petra Rosa Samir Selma "
    "Simon Tara Vera Yara"
)
SURNAMES = _words(
    "Adler Alves Bauer Berg Bruno Castro Cohen Costa Diaz Egger Engel Ferrari Fontana Gruber Hansen Holm "
    "Horvat Jansen Keller Klein Kovac Kowalski Larsen Lopez Marino Mendes Meyer Moretti Novak Olsen Pereira "
    "Petit Ricci Santos Silva Sorensen Strand Vogel Winter Zeman"
)
PLACES = _words(
    "Aarhus Antwerp Basel Berlin Bologna Bordeaux Bremen Cork Faro Gdansk Geneva Genoa Graz Helsinki Krakow "
    "Leipzig Lille Lisbon Lyon Malmo Marseille Modena Nantes Odense Oviedo Palermo Paris Porto Prague Rome "
    "Rotterdam Salzburg Siena Tampere Trieste Turin Utrecht Venice Vienna Zagreb"
)
DEEDS = {
    "opened": _words("bakery bookshop cinema clinic gallery library museum pharmacy school theatre"),
    "bought": _words("bicycle boat caravan carpet farm lighthouse piano telescope tractor vineyard"),
    "sold": _words("camera clock mirror motorbike necklace painting sofa stamp statue violin"),
    "built": _words("bridge chapel fountain garage greenhouse playground sauna stable tower windmill"),
    "restored": _words("barn carousel castle cottage ferry fresco harbour locomotive mill tram"),
}
MONTHS = _words("January February March April May June July August September October November December")
PRICES = range(50, 1000, 50)

DATE_SENTENCES = ("That was on {}.", "The day was {}.", "The papers were signed on {}.")
PRICE_SENTENCES = ("The bill came to {} euros.", "The price was {} euros.", "All of it cost {} euros.")
ASIDES = (
    "Many friends came.",
    "The weather was fine.",
    "The neighbours brought flowers.",
    "A local paper wrote about it.",
    "Nobody had expected it.",
)


@dataclass(frozen=True)
class Article:
    """A short article with its two summaries."""

    text: str
    list_answer: str
    sentence_answer: str


def sample_article(rng: random.Random, *, held_out: bool = False) -> Article:
    """Draw an article of two to four sentences.

    Args:
        rng: the source of randomness; the same state gives the same article.
        held_out: draw a person whom no article drawn with `held_out=False` mentions.
    """
    while True:
        first, last = rng.randrange(len(FIRST_NAMES)), rng.randrange(len(SURNAMES))
        if ((first + last) % 8 == 0) == held_out:
            break
    person = f"{FIRST_NAMES[first]} {SURNAMES[last]}"
    verb = rng.choice(list(DEEDS))
    deed = f"{verb} a {rng.choice(DEEDS[verb])}"
    place = rng.choice(PLACES)
    news = f"{person} {deed} in {place}"

    facts, sentence, details = [news], news, []
    known = rng.choice(("date", "price", "both", "both"))
    if known != "price":
        date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
        details.append(rng.choice(DATE_SENTENCES).format(date))
        facts.append(f"It happened on {date}")
        sentence += f" on {date}"
    if known != "date":
        price = f"{rng.choice(PRICES)} euros"
        details.append(rng.choice(PRICE_SENTENCES).format(price.removesuffix(" euros")))
        facts.append(f"It cost {price}")
        sentence += f" for {price}"
    if rng.random() < 0.5:
        details.append(rng.choice(ASIDES))
    rng.shuffle(details)

    opening = rng.choice((f"{news}.", f"In {place}, {person} {deed}."))
    return Article(
        text=" ".join([opening, *details]),
        list_answer=" ".join(f"{number}. {fact}." for number, fact in enumerate(facts, start=1)),
        sentence_answer=f"{sentence}.",
    )


def sample_chat(rng: random.Random, *, turns: int) -> list[dict[str, str]]:
    """Draw a chat of `turns` requests, each about another article, with their answers."""
    chat = []
    for turn in range(turns):
        article = sample_article(rng)
        request = NEXT_REQUEST if turn else FIRST_REQUEST
        answer = article.list_answer if rng.random() < LIST_SHARE else article.sentence_answer
        chat.append({"role": "user", "content": request + article.text})
        chat.append({"role": "assistant", "content": answer})
    return chat
