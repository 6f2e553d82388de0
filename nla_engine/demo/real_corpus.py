"""The texts that the real pair is trained on: prompts by rule for the model's own replies, and documentation.

The documentation is what packages carry that are installed with this one: docstrings of numpy, torch, sympy, networkx
and mpmath (all under BSD licences) and the topics of Python's own help (PSF licence).
"""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
from collections.abc import Iterator
from typing import Any

import numpy as np

PACKAGES = ("numpy", "torch", "sympy", "networkx", "mpmath")
#: Shorter docstrings say little.
_SHORTEST = 400
_DEEPEST = 3

TOPICS = """volcanoes; the French Revolution; sourdough bread; black holes; the violin; chess openings; coral reefs;
the stock market; photosynthesis; a rainy afternoon; electric cars; the Roman Empire; honey bees; public libraries;
marathon training; the human heart; jazz music; glaciers; ancient Egypt; coffee; the moon landing; tea ceremonies;
vaccines; medieval castles; the water cycle; robots; the Amazon rainforest; gardening in small spaces; dreams;
the Silk Road; penguins; climate change; the printing press; basketball; fractions; rainbows; opera; tidal energy;
dinosaurs; the periodic table; time zones; cheese making; bicycle repair; the brain; whales; Shakespeare; mosaics;
solar panels; the Great Wall of China; fermentation; earthquakes; cats; a lost umbrella; job interviews; budgeting;
the Vikings; magnets; desert plants; airports; poetry; knitting; antibiotics; the immune system; public speaking;
mountain climbing; owls; the Industrial Revolution; board games; sailing; the digestive system; maps; cheap travel;
the speed of light; lighthouses; pottery; ants; email etiquette; probability; Mars; the Renaissance; salt; a small
village; bridges; tropical fruit; a friendly dragon; prime numbers; diabetes; recycling; the Olympic Games; trains;
autumn leaves; sleep; the internet; sharks; a haunted house; photography; wolves; mathematics anxiety; the Sahara;
chocolate; elections; a clever fox; radio waves; yoga; steam engines; snow; the Mediterranean diet; spiders; DNA;
friendship; the United Nations; a broken clock; hurricanes; birthday parties; the guitar; wind turbines; gravity;
rice farming; science fiction; kangaroos; inflation; the nervous system; a long train journey; fossils; perfume;
watercolour painting; homework; the Ottoman Empire; octopuses; clean drinking water; a new neighbour; football; rivers;
artificial intelligence; the Middle Ages; mushrooms; submarines; ballet; supermarkets; courage; the solar system;
wooden furniture; elephants; traffic jams; a secret garden; the Cold War; candles; butterflies; exams; lemons;
the telephone; tigers; hospitals; a winter morning; weather forecasts; the theatre; pirates; pasta; universities;
satellites; rabbits; minimum wages; the ocean floor; wine; a retired teacher; dentistry; bamboo; cities at night;
the Inca Empire; insects; remote work; museums; the violin maker's apprentice; oxygen; trust; parrots; taxes;
a desert island; soil; kites; memory; democracy; frogs; concrete; hiking; mirrors; the Black Death; potatoes"""

TASKS = """Explain {t} to a ten-year-old.; Write a short story about {t}.; List five facts about {t}.;
What should a beginner know about {t}?; Write a poem about {t}.; Why does {t} matter?; Give me three questions for a
quiz about {t}, with answers.; Write a letter to a friend about {t}.; Compare {t} with something quite different.;
Describe {t} in one paragraph.; What are common mistakes people make about {t}?; Make a table of pros and cons of
{t}.; Summarise the history of {t}.; Write a dialogue between two people who disagree about {t}.; Give step-by-step
advice concerning {t}.; Write a Python function that has something to do with {t}.; What is the most surprising
thing about {t}?; Write a news report about {t}.; Translate a simple sentence about {t} into French and explain it.;
Tell me a joke about {t}.; How would a scientist study {t}?; Write an advertisement concerning {t}.; What could {t}
look like in a hundred years?; Give me a recipe or a plan inspired by {t}.; Write an essay's introduction about
{t}.; Which words come to mind with {t}? Explain each.; Write a product review related to {t}.; What problems come
with {t}, and how are they solved?; Write a diary entry that mentions {t}.; Make up a word problem in mathematics
about {t} and solve it.; Define {t} as a dictionary would.; Give arguments for and against {t}."""

_ASKS = (
    "What is {a} times {b}? Show your work.",
    "Add {a} and {b}, then take away {c}.",
    "I have {a} apples and give {b} away, then buy {c}. How many are left?",
    "Write a Python program that prints the numbers from {a} to {b}.",
    "Is {a} a prime number? Explain.",
    "Sort these numbers: {c}, {a}, {b}.",
    "Convert {a} kilometres into miles and {b} kilograms into pounds.",
    "Count from {a} in steps of {b}.",
)


def _split(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split(";")]


def prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Records with a prompt and an id: most combine a task with a topic, every tenth asks for numbers."""
    draw = np.random.default_rng([seed, 1])
    pairs = [task.format(t=topic) for task in _split(TASKS) for topic in _split(TOPICS)]
    chosen = [pairs[place] for place in draw.permutation(len(pairs)).tolist()]
    found = []
    for number in range(count):
        if number % 10 == 9 or number >= len(chosen):
            a, b, c = draw.integers(2, 400, 3).tolist()
            text = _ASKS[int(draw.integers(len(_ASKS)))].format(a=a, b=b, c=c)
        else:
            text = chosen[number]
        found.append({"id": f"prompt {number}", "prompt": text})
    return found


def documentation() -> list[dict[str, str]]:
    """Records with a text and an id, in a fixed order for given versions of the packages."""
    found = [
        {"id": f"python {name}", "text": text.strip()}
        for name, text in sorted(pydoc_data.topics.topics.items())
    ]
    for package in PACKAGES:
        texts = dict.fromkeys(_docstrings(importlib.import_module(package), package, set(), 0))
        found += [{"id": f"{package} {number}", "text": text} for number, text in enumerate(texts)]
    return found


def _docstrings(thing: Any, package: str, seen: set[int], depth: int) -> Iterator[str]:
    """Of a module or class and all public things in it that are the package's own."""
    if id(thing) in seen or depth > _DEEPEST:
        return
    seen.add(id(thing))
    text = inspect.getdoc(thing)
    if text is not None and len(text) >= _SHORTEST:
        yield text
    if not (inspect.ismodule(thing) or inspect.isclass(thing)):
        return
    for name, inner in sorted(vars(thing).items()):
        home = inner.__name__ if inspect.ismodule(inner) else getattr(inner, "__module__", None)
        if not name.startswith("_") and (home is None or str(home).split(".")[0] == package):
            yield from _docstrings(inner, package, seen, depth + 1)
