"""Very easy arithmetic word problems with worked answers, made from templates and a seed.

The first half of the rows is meant for training and the second half for held-out measurement.
The two halves use different templates, names and objects, and the same mix of operations, so a
held-out problem is new in wording while being no harder than a training problem.
"""

import argparse
import json
import random

# A heading names the category of the templates under it.
TRAIN_TEXT = """
# addition
{x} has {a} {o} and buys {b} more. How many {o} does {x} have now?
There are {a} {o} on a table, and {x} puts {b} more there. How many are there?
On Monday {x} found {a} {o}. On Tuesday {x} found {b}. How many is that in total?
A box holds {a} red {o} and {b} blue {o}. How many {o} are in the box?
{x} had {a} {o}. A friend gave {x} {b} {o}. How many {o} does {x} have?
{x} won {a} {o} in one game and {b} {o} in the next. How many {o} did {x} win?
# subtraction
{x} has {a} {o} and gives away {b} of them. How many {o} are left?
There were {a} {o} in a jar. {x} took out {b}. How many are still in the jar?
{x} had {a} {o} and lost {b} of them. How many {o} does {x} have now?
# multiplication
There are {a} bags with {b} {o} in each bag. How many {o} are there?
{x} buys {a} packs of {b} {o} each. How many {o} does {x} buy?
One notebook costs {b} dollars, and {x} wants {a}. What is the price?
# sharing
{x} shares {a} {o} equally among {b} friends. How many does each friend get?
{x} packs {a} {o} equally into {b} boxes. How many {o} are in each box?
# two-step addition
{x} had {a} {o} and bought {b}, which made {m}. Then {x} found {c} more. How many is that?
# two-step subtraction
{x} put {a} and then {b} {o} on a shelf, {m} in all. Later {c} fell off. How many stayed there?
"""
HELDOUT_TEXT = """
# addition
{x} picked {a} {o} before lunch and {b} after it. How many {o} did {x} pick?
A basket with {a} {o} gets {b} extra ones from {x}. How many will it contain?
{x} owns {a} {o}, and {y} owns {b} {o}. How many {o} do they own together?
{x} counted {a} small {o} and {b} big {o}. What is the total number of {o}?
A shop sold {a} {o} yesterday and {b} {o} today. How many {o} did it sell?
{x} made {a} {o} while {y} made {b}. How many {o} did the two of them make?
# subtraction
A tray held {a} {o}, and {x} used {b} of these. How many {o} remain?
{x} took {a} {o} to school and handed {b} to {y}. How many did {x} keep?
Out of {a} {o}, {b} were broken. How many {o} were not broken?
# multiplication
{x} fills {a} rows with {b} {o} in every row. How many {o} is that?
If one child carries {b} {o}, how many {o} do {a} children carry?
A ticket costs {b} dollars. {x} orders {a} tickets. How much must {x} pay?
# sharing
A teacher divides {a} {o} evenly between {b} students. How many per student?
{x} sorts {a} {o} into {b} equal piles. What is the size of one pile?
# two-step addition
{x} saw {a} {o} here and {b} over there, {m} so far. Then {y} showed {x} {c} more. How many?
# two-step subtraction
{x} and {y} made {a} and {b} {o}, together {m}. They sold {c} of those. How many were not sold?
"""
NAMES = (
    ["Mia", "Tom", "Lena", "Omar", "Ruth", "Paul"],
    ["Ana", "Ben", "Kofi", "Nora", "Sam", "Ivy"],
)
OBJECTS = (
    ["apples", "marbles", "pencils", "stickers", "shells"],
    ["oranges", "buttons", "cards", "cups", "stamps"],
)
HINTS = ("Write", "Give", "State", "Tell {x}")
FRAMES = ("{w}, so {end}. The answer is {n}.", "Since {w}, {end}. The answer is {n}.")
ENDS = {
    "addition": "there are {n} {o} in total",
    "subtraction": "{n} {o} are left",
    "multiplication": "the total is {n} {o}",
    "sharing": "each share is {n} {o}",
    "two-step addition": "there are {n} {o} in the end",
    "two-step subtraction": "{n} {o} are left in the end",
}


def parse(text: str) -> list[tuple[str, str]]:
    """Read (category, problem) templates from their text form."""
    blocks = (block.strip().split("\n") for block in text.split("# ")[1:])
    return [(category, line) for category, *lines in blocks for line in lines]


def numbers(category: str, rng: random.Random) -> tuple[dict[str, int], str, str]:
    """Draw the small numbers of one problem: its fields, the last calculation and the working."""
    a, b, c = rng.randint(3, 5), rng.randint(2, 5), rng.randint(2, 3)
    if category.startswith("two-step"):
        n, sign = (a + b + c, "+") if category.endswith("addition") else (a + b - c, "-")
        e = f"{a + b} {sign} {c}"
        return {"a": a, "b": b, "c": c, "m": a + b, "n": n}, e, f"{a} + {b} = {a + b} and {e} = {n}"
    if category == "addition":
        a = rng.randint(2, 9)
        n, sign = a + b, "+"
    elif category == "subtraction":
        n, sign = rng.randint(2, 10 - b), "-"
        a = n + b
    elif category == "multiplication":
        a, b = rng.randint(2, 5), rng.choice((2, 3, 4, 5, 10))
        n, sign = a * b, "*"
    else:
        n, b = rng.randint(2, 5), rng.randint(2, 4)
        a, sign = n * b, "/"
    return {"a": a, "b": b, "n": n}, f"{a} {sign} {b}", f"{a} {sign} {b} = {n}"


def problem(half: int, template: tuple[str, str], rng: random.Random) -> dict[str, str]:
    """Fill one template with names, an object and numbers of its half (0 train, 1 held out)."""
    category, text = template
    ints, e, working = numbers(category, rng)
    x, y = rng.sample(NAMES[half], 2)
    fields = {"x": x, "y": y, "o": rng.choice(OBJECTS[half]), "e": e, "w": working}
    fields |= {key: str(value) for key, value in ints.items()}
    prompt = f"{text} {rng.choice(HINTS)} the result of {{e}} in one line.".format(**fields)
    if "dollars" in text:
        fields["o"] = "dollars"
    fields["end"] = ENDS[category].format(**fields)
    return {"prompt": prompt, "answer": rng.choice(FRAMES).format(**fields), "category": category}


def generate(count: int, seed: int) -> list[dict[str, str]]:
    """Make `count` distinct problems (at most a few thousand), the training half first."""
    rng, rows = random.Random(seed), dict[str, dict[str, str]]()
    for half, goal in enumerate(((count + 1) // 2, count)):
        templates, first = parse((TRAIN_TEXT, HELDOUT_TEXT)[half]), len(rows)
        while len(rows) < goal:
            row = problem(half, templates[(len(rows) - first) % len(templates)], rng)
            rows.setdefault(row["prompt"], row)
    return list(rows.values())


def main() -> None:
    """Write the rows as JSON lines, each with the half that it belongs to."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=260)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    for i, row in enumerate(generate(args.count, args.seed)):
        print(json.dumps(row | {"split": "train" if i < (args.count + 1) // 2 else "heldout"}))


if __name__ == "__main__":
    main()
