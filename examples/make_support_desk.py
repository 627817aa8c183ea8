"""Write the example data: a labelled support desk whose world changes, and a public gate set.

`python examples/make_support_desk.py` rewrites both files, byte for byte the same on every machine; `--out DIR` writes
them elsewhere. Everything is invented: sentences of `phrases.py` with openings, closings, asides, typos and made-up
names. The first 60% of the stream is mostly about billing, delivery and returns; then the account domain grows.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import phrases

SEED = 20260302
# 60% of it are 3,000 lines: six whole blocks of 500 offsets, enough people for the noise of a first round.
STREAM_RECORDS = 5000
FIRST_WORLD = STREAM_RECORDS * 6 // 10
GATE_RECORDS_PER_LABEL = 40
USERS = 700
BAD_SHARE = 0.03
WORDS_MIN, WORDS_MAX = 4, 20
TYPO_SHARE = 0.15
ASIDE_SHARE = 0.03
ATTRIBUTES_SHARE = 0.3
LOWER_SHARE = 0.5  # of what casual and terse people write
SHOUT_SHARE = 0.2  # of what angry people write
BEGIN = datetime(2026, 3, 2, 6, tzinfo=UTC)

DOMAIN_OF = {label: domain for domain, labels in phrases.DOMAINS.items() for label in labels}
# Share of each label in the first and in the second world.
FIRST_MIX = {
    "refund_status": 0.10, "double_charge": 0.09, "invoice_copy": 0.09,
    "parcel_late": 0.11, "parcel_damaged": 0.10, "address_change": 0.09,
    "start_return": 0.11, "return_label": 0.10, "exchange_item": 0.09,
    "password_reset": 0.04, "close_account": 0.04, "email_change": 0.04,
}  # fmt: skip
SECOND_MIX = {
    "refund_status": 0.08, "double_charge": 0.06, "invoice_copy": 0.05,
    "parcel_late": 0.04, "parcel_damaged": 0.05, "address_change": 0.06,
    "start_return": 0.07, "return_label": 0.07, "exchange_item": 0.07,
    "password_reset": 0.16, "close_account": 0.14, "email_change": 0.15,
}  # fmt: skip


def fill(sentence: str, rng: random.Random) -> str:
    """Choose among `[one|of|these]` and put invented names into the slots."""
    text = re.sub(r"\[([^\]]+)\]", lambda match: rng.choice(match[1].split("|")), sentence)
    colour, other = rng.sample(phrases.COLOURS, 2)
    product = rng.choice((f"{rng.choice(phrases.BRANDS)} ", "")) + rng.choice(phrases.THINGS)
    order = rng.choice(("#{}", "order {}", "no. {}", "TG-{}")).format(rng.randint(10_000, 99_999))
    amount = rng.choice(("{} euros", "EUR {}.90", "{} dollars", "${}", "{}.50")).format(rng.randint(8, 240))
    return text.format(
        product=product,
        order=order,
        amount=amount,
        colour=colour,
        other=other,
        days=rng.choice(("two", "three", "5", "ten", "14", "several", "a few")),
        weekday=rng.choice(phrases.WEEKDAYS),
        month=rng.choice(phrases.MONTHS),
        city=rng.choice(phrases.CITIES),
    ).replace("order order", "order")


def mistype(text: str, rng: random.Random) -> str:
    """One or two slips of the finger: a letter lost, doubled or swapped with the next one."""
    letters = list(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(letters) - 1)
        if not (letters[at].isalpha() and letters[at + 1].isalpha()):
            continue
        slip = rng.choice(("lose", "double", "swap"))
        if slip == "lose":
            del letters[at]
        elif slip == "double":
            letters.insert(at, letters[at])
        else:
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def message(sentence: str, register: str, rng: random.Random) -> str:
    """One customer message of WORDS_MIN to WORDS_MAX words around a sentence."""
    openings, closings = phrases.REGISTERS[register]
    while True:
        core = fill(sentence, rng)
        mark = "?" if re.match(r"(can|could|where|when|why|how|is|did|may|what|which|has|do|any)\b", core) else "."
        if register in {"formal", "chatty"}:
            core = core[0].upper() + core[1:] + mark
        else:
            core += rng.choice((mark, ""))
        parts = [rng.choice(openings), core, rng.choice(closings)]
        if rng.random() < ASIDE_SHARE:
            parts.insert(rng.choice((1, 2)), fill(rng.choice(phrases.ASIDES), rng))
        text = " ".join(part for part in parts if part)
        if register in {"casual", "terse"} and rng.random() < LOWER_SHARE:
            text = text.lower()
        if register == "angry" and rng.random() < SHOUT_SHARE:
            text = text.upper()
        if rng.random() < TYPO_SHARE:
            text = mistype(text, rng)
        if WORDS_MIN <= len(text.split()) <= WORDS_MAX:
            return text


class Desk:
    """Makes records with unique prompts, in the order of time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = BEGIN
        self.seen: set[str] = set()
        names = self.rng.sample(range(1000, 10_000), USERS)
        registers = list(phrases.REGISTERS)
        self.users = {f"customer-{name}": self.rng.choice(registers) for name in names}
        # Some write often, most write rarely.
        self.activity = [self.rng.paretovariate(2.5) for _ in names]

    def record(self, event_id: str, label: str, sentences: tuple[str, ...]) -> dict[str, Any]:
        """The next record of a label."""
        rng = self.rng
        user = rng.choices(list(self.users), self.activity)[0]
        while True:
            prompt = message(rng.choice(sentences), self.users[user], rng)
            if prompt.lower() not in self.seen:
                break
        self.seen.add(prompt.lower())
        self.clock += timedelta(seconds=rng.randint(20, 1800))
        made: dict[str, Any] = {
            "schema_version": 1,
            "event_id": event_id,
            "user_id": user,
            "domain": DOMAIN_OF[label],
            "prompt": prompt,
            "completion": label.replace("_", " "),
            "label": label,
            "occurred_at": self.clock.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if rng.random() < ATTRIBUTES_SHARE:
            made["attributes"] = {"channel": rng.choice(("chat", "email", "app"))}
        return made


def line(record: Any) -> bytes:
    """One JSON value and a line feed, UTF-8."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _without(key: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda record: line({k: v for k, v in record.items() if k != key})


def _with(**changed: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda record: line(record | changed)


# What is wrong with a bad line, and how a good record becomes it.
BREAKS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "missing user_id": _without("user_id"),
    "missing completion": _without("completion"),
    "user_id is a number": _with(user_id=4711),
    "prompt is a list": lambda record: line(record | {"prompt": record["prompt"].split()}),
    "unknown key": _with(priority="high"),
    "undeclared domain": _with(domain="loyalty"),
    "undeclared label": _with(label="gift_card", completion="gift card"),
    "null prompt": _with(prompt=None),
    "prompt of more than 2,000 characters": lambda record: line(
        record | {"prompt": " ".join([record["prompt"]] * (2001 // len(record["prompt"]) + 1))}
    ),
    "cut off in the middle": lambda record: line(record)[:-40].rstrip(b"\n") + b"\n",
    "not UTF-8": lambda record: line(record).replace(b'"prompt":"', b'"prompt":"\xff\xfe'),
    "plain text": lambda record: b"customer wrote: " + record["prompt"].encode() + b"\n",
    "empty prompt": _with(prompt=""),
    "bad time": _with(occurred_at="2026-02-30 25:00"),
    "schema_version of the future": _with(schema_version=9),
}
DELIVERED_TWICE = "delivered twice"
SAME_ID = "same event_id and user, other content"
KINDS = (*BREAKS, DELIVERED_TWICE, SAME_ID)


def bad_places(rng: random.Random) -> dict[int, str]:
    """Which lines are bad and how: every kind among the first 200, then evenly through the stream."""
    early = rng.sample(range(20, 190), len(KINDS))
    rest = rng.sample(range(200, STREAM_RECORDS), round(BAD_SHARE * STREAM_RECORDS) - len(KINDS))
    kinds = list(KINDS)
    rng.shuffle(kinds)
    places = dict(zip(early, kinds, strict=True))
    return places | {place: KINDS[index % len(KINDS)] for index, place in enumerate(sorted(rest))}


def stream(desk: Desk) -> list[bytes]:
    """The stream's lines in order."""
    rng = desk.rng
    places = bad_places(rng)
    lines: list[bytes] = []
    good: list[dict[str, Any]] = []
    for index in range(STREAM_RECORDS):
        mix = FIRST_MIX if index < FIRST_WORLD else SECOND_MIX
        label = rng.choices(list(mix), list(mix.values()))[0]
        record = desk.record(f"ticket-{index:05d}", label, phrases.SAID[label])
        kind = places.get(index)
        if kind is None:
            good.append(record)
            lines.append(line(record))
        elif kind == DELIVERED_TWICE:
            lines.append(line(rng.choice(good[-10:])))
        elif kind == SAME_ID:
            earlier = rng.choice(good[-10:])
            lines.append(line(record | {"event_id": earlier["event_id"], "user_id": earlier["user_id"]}))
        else:
            lines.append(BREAKS[kind](record))
    return lines


def gates(desk: Desk) -> list[bytes]:
    """The gate set: every label as often, half of it in sentences that the stream never uses."""
    rng = desk.rng
    records = []
    for label in DOMAIN_OF:
        for number in range(GATE_RECORDS_PER_LABEL):
            sentences = phrases.SAID if number % 2 else phrases.HELD_OUT
            records.append((label, sentences[label]))
    rng.shuffle(records)
    return [line(desk.record(f"gate-{index:04d}", *record)) for index, record in enumerate(records)]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out = parser.parse_args().out
    desk = Desk(SEED)
    for name, lines in (("support-desk.jsonl", stream(desk)), ("support-desk-gates.jsonl", gates(desk))):
        (out / name).write_bytes(b"".join(lines))
        print(f"{out / name}: {len(lines):,} lines, {sum(map(len, lines)):,} bytes")


if __name__ == "__main__":
    main()
