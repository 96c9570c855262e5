"""toy/grammar.py: English of label names, and sentences that mention their labels alone."""
import re

import pytest
import torch

from data import COCO_LABELS
from toy.grammar import fill_template, plural, sentences_about, with_article
from toy.world import LABELS as TOY_LABELS

# names that are plural, uncountable, activities, the only one, or words of the grammar itself
ODD = """birds, boats, buildings, people, police, grass, snow, water, food, dancing, running,
soccer, nighttime, sky, sun, moon, ocean, leaf, fish, whales, street, table, meadow, party, photo,
dusk, crowd, farm, skis, wedding, hour, unicorn, x-ray machine, UFO, MRI scanner, cup of tea,
information, honey, passer-by, Paris, rainy, wooden, the sea, Eiffel Tower, man in suit""".replace(
    "\n", " ").split(", ")

# vocabularies of words that the grammar would like to use, each with its other forms
HOSTILE = {
    "everything": """photo picture/pictures snapshot view image scene show/shows
        one two three four five few several many small large pair/pairs scissors
        next beside near close front/fronts left/lefts right/rights far across foreground
        back/further top center background behind nearby distance side same see/seen visible
        lie/lies pose/poses stand/stands sit/sitting wait/waits/waiting park/parked person/people
        dog/dogs car/cars day/days morning/mornings afternoon dusk light/lights place/places
        everyday cluttered""",
    "names that meet": "bus/buses bus_stop/bus_stops taxi/taxis taxi_stand/taxi_stands "
        "salt pepper/peppers salt_and_pepper/salt_and_peppers dog/dogs dog_walk/dog_walks"}
HOSTILE = {name: [forms.replace("_", " ").split("/") for forms in words.split()]
           for name, words in HOSTILE.items()}


# ---- nouns

@pytest.mark.parametrize("singular, expected", [pair.split("/") for pair in """
    dog/dogs bus/buses box/boxes bench/benches knife/knives pony/ponies monkey/monkeys
    person/people snowman/snowmen human/humans mouse/mice tooth/teeth bookshelf/bookshelves
    giraffe/giraffes potato/potatoes piano/pianos sheep/sheep reindeer/reindeer cactus/cacti
    wine_glass/wine_glasses Church/Churches UFO/UFOs MRI_scanner/MRI_scanners
    cup_of_tea/cups_of_tea passer-by/passers-by mother-in-law/mothers-in-law can_opener/can_openers
    building/buildings honey/honey scissors/scissors people/people dancing/dancing the_sea/the_sea
    rainy/rainy Eiffel_Tower/Eiffel_Tower economics/economics sofas/sofas ottoman/ottomans
    talisman/talismans""".split()])
def test_plural(singular, expected):
    assert plural(singular.replace("_", " ")) == expected.replace("_", " ")


@pytest.mark.parametrize("expected", """a dog, an apple, an umbrella, a unicycle, an hourglass,
    a horse, a one-way sign, a UFO, an MRI scanner, an suv, an X-ray, a T-shirt, a US passport,
    an uninhabited island, a cup of tea, a map of Paris, a passer-by, a German shepherd,
    a wedding ring, a bus, skis, snow, dancing, orange juice, people, rainy, economics, the sea,
    an honor, an honest face, a u-turn, an 18-wheeler, an 8-ball, an 8K screen, a 180-degree turn,
    Paris, Statue of Liberty, Flora, The Beatles""".replace("\n   ", "").split(", "))
def test_with_article(expected):
    label = re.sub("^an? ", "", expected)
    assert with_article(label) == expected
    assert fill_template("a photo of a {}.", label) == f"a photo of {expected}."


@pytest.mark.parametrize("template, label, expected", [
    ("a photo of a {}.", "sky", "a photo of the sky."),
    ("A photo of a {}.", "a dog", "A photo of a dog."),
    ("a photo of the {}.", "dog", "a photo of the dog."),
    ("a photo of the {}.", "Eiffel Tower", "a photo of Eiffel Tower."),
    ("a photo of a large {}.", "the sea", "a photo of the sea."),
    ("a photo of a large {}.", "apple", "a photo of a large apple."),
    ("a photo of a large {}.", "skis", "a photo of large skis."),
    ("An {} or {{}}: {}", "dog", "a dog or {dog}: dog"),
    ("a {} here", r"back\1slash", r"a back\1slash here")])
def test_fill_template(template, label, expected):
    assert fill_template(template, label) == expected


# ---- sentences

def mentions(sentence, forms):
    return re.search(rf"\b({'|'.join(forms)})\b", sentence, re.I)


@pytest.mark.parametrize("vocabulary", HOSTILE)
def test_no_other_label_is_mentioned(vocabulary):
    labels = [forms[0] for forms in HOSTILE[vocabulary]]
    # part of another's name, as table is of dining table
    nested = [{i for i, forms in enumerate(HOSTILE[vocabulary]) if mentions(label, forms)}
              for label in labels]
    sentences, targets = sentences_about(labels, 3000, seed=1)
    for sentence, target in zip(sentences, (targets > 0).tolist()):
        allowed = set().union(*(nested[i] for i, present in enumerate(target) if present))
        for i, forms in enumerate(HOSTILE[vocabulary]):
            if target[i]:
                assert mentions(sentence, [labels[i], plural(labels[i])]), sentence
            elif i not in allowed:
                assert not mentions(sentence, forms), (forms, sentence)
    assert len(set(sentences)) > 1000
    assert not re.search(r"  | [.,]|,,|\.\.|^\W", "\n".join(sentences))


@pytest.mark.parametrize("labels", [TOY_LABELS, COCO_LABELS, ODD], ids=["toy", "coco", "odd"])
def test_sentences_are_english(labels):
    sentences, _ = sentences_about(labels, 10_000, seed=2)
    text = "\n".join(sentences)
    singular = "dog|person|knife|wine glass|teddy bear|cup|leaf|unicorn|hour"
    many = r"people|dogs|knives|mice|wine glasses|teddy bears|leaves|birds|scissors|skis|boats"
    counts = "two|three|four|five|several|a few|many"
    unique = ("sky|sun|moon|ocean|dancing|running|soccer|nighttime|information|honey|rainy|"
                 "wooden|Paris|the sea|Eiffel Tower")
    for mistake in (
            rf"\ban? ({many})\b", rf"\b({counts}|some) ({singular})\b(?! of)", rf"^({singular})\b",
            r"\ban (?!(hour|x-ray|MRI))[^aeiou]", r"\ba (?!(unicorn|one|UFO))[aeiou]",
            rf"\bthere (is|'s) ({counts})\b", r"\bthere are (a|an|one) (?!few)",
            r"\ba( pair of)? (grass|snow|broccoli|water|dancing|sky)\b",
            rf"\b(one|two|three|an?|small|large) ({unique})\b", r"\bsome (sky|Paris|rainy|the )",
            r"\b(two|three|four|five) (scissors|police)\b", r"\bthe the\b",
            r"\bthere is (the|dancing|soccer)\b",
            r"\b(next to|beside|close to) (the sky|dancing)\b",
            r"  | [.,]|,,|\.\.|{|}|_|/", r"[^.]$", r"^[^A-Z]"):
        found = re.search(mistake, text, re.M | (re.I if mistake[0] == "\\" else 0))
        assert not found, (mistake, text[max(0, found.start() - 60):found.end() + 60])
    for sentence in sentences:  # after several, or a plural, "are", after one thing "is"
        if match := re.match(r"(An?|One) ([a-z-]+ ){1,3}?(is|are) ", sentence):
            several = any(word in match[0] for word in (" and ", ",", "few"))
            assert match[3] == ("are" if several else "is"), sentence
        if match := re.match(rf"({counts}) [a-z ]+? (is|are) ", sentence, re.I):
            assert match[2] == "are", sentence


def test_seeded_and_varied():
    sentences, targets = sentences_about(COCO_LABELS, 5000, seed=3)
    again, same_targets = sentences_about(COCO_LABELS, 5000, seed=3)
    assert sentences == again and torch.equal(targets, same_targets)
    assert sentences_about(COCO_LABELS, 10, seed=4)[0] != sentences[:10]
    assert len(set(sentences)) > 4500
    assert len({sentence.split(" ")[0] for sentence in sentences}) > 20
    sentences, targets = sentences_about(["sky"], 50)
    assert (targets == 1).all() and all("he sky" in sentence for sentence in sentences)
    assert sentences_about(["sky", "dog"], 0)[1].shape == (0, 2)


def test_labels_without_a_letter_are_written_too():
    labels = ["-", "+", "\U0001f600", "owl", "\u732b"]
    sentences, targets = sentences_about(labels, 200, seed=0)
    for sentence, target in zip(sentences, targets):
        assert all(labels[i] in sentence.lower() for i in (target == 1).nonzero().flatten())
