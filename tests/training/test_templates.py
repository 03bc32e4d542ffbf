"""Prompt templates: the bundled ones, which one is taken, and how it is rendered."""

import json

import pytest

from classifier import prompt_suffix
from training.templates import TEMPLATES, Template, choose_template, find_templates, render
from utils import InputError

PLAIN = Template("plain", "", "the movie is", (("bad",), ("good",)))
BOTH = Template("both", "a story :", "it was a", (("bad", "film"), ("good", "warm xyz"), ("or",)))


def test_bundled_templates_keep_their_words_in_the_order_of_the_labels():
    content = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    for dataset, names in {"sst": "abcde", "cfimdb": "ab", "demo": "abcde"}.items():
        found = find_templates(dataset, list(names))
        question, *found = found
        assert question == Template(
            "question", "", prompt_suffix(list(names)).rstrip(), tuple((name,) for name in names)
        )
        assert [template.name for template in found] == [e["name"] for e in content[dataset]]
        for template, entry in zip(found, content[dataset], strict=True):
            assert len(template.labels) == len(names)
            assert template.before or template.after
            if "labels" not in entry:
                assert template.labels == tuple((name,) for name in names)
                continue
            strings = [string for group in template.labels for string in group]
            assert len(set(strings)) == len(strings)
            assert all(string and string == string.strip() for string in strings)
            place = {word: i for i, group in enumerate(template.labels) for word in group}
            low = [place[w] for w in ("terrible", "awful", "bad", "boring") if w in place]
            high = [place[w] for w in ("great", "wonderful", "excellent", "good") if w in place]
            assert low and high and max(low) < min(high)


def test_an_unknown_data_set_is_asked_for_its_label_names():
    for template in find_templates("mine", ["sports", "world news", "science"]):
        assert template.labels == (("sports",), ("world news",), ("science",))


def test_a_template_is_chosen_by_name_or_is_the_first():
    assert choose_template([PLAIN, BOTH]) is PLAIN
    assert choose_template([PLAIN, BOTH], "both") is BOTH
    with pytest.raises(InputError, match="--template x: is not one of plain, both"):
        choose_template([PLAIN, BOTH], "x")


GOOD = {"name": "a", "template": "{sentence} It was", "labels": [["bad"], ["good", "fine"]]}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"template": "{sentence} It was"}, "needs a name"),
        ({**GOOD, "template": "It was"}, r"\{sentence\} once"),
        ({**GOOD, "template": "{sentence}, so"}, "spaces around"),
        ({**GOOD, "labels": ["bad", "good"]}, "one list of strings for each"),
        ({**GOOD, "labels": [["bad"], ["so"], ["good"]]}, "the data has 2 labels"),
        (None, "is not JSON"),
    ],
)
def test_a_bad_template_is_one_line_with_file_entry_and_remedy(tmp_path, entry, said):
    path = tmp_path / "templates.json"
    content = "[" if entry is None else json.dumps({"toy": [GOOD, entry]})
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said) as error:
        find_templates("toy", ["bad", "good"], path)
    assert str(error.value).startswith(f"{path}: " + ("is" if entry is None else "'toy', entry 2"))
    assert "\n" not in str(error.value)


def test_rendering_puts_one_space_between_words_and_none_at_the_end():
    assert render(BOTH, "Fine .") == "a story : Fine . it was a"
    assert render(BOTH, "") == "a story : it was a"
    assert render(PLAIN, "") == "the movie is"
