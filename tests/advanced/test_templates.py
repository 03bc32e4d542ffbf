"""Prompt templates: what a file of them may hold, which one is taken, and how it is rendered."""

import json

import pytest

from advanced.methods.templates import (
    TEMPLATES,
    Template,
    choose_template,
    find_templates,
    read_templates,
    render,
)

PLAIN = Template("plain", "", "the movie is", (("bad",), ("good",)))
BOTH = Template("both", "a story :", "it was a", (("bad", "film"), ("good", "warm xyz"), ("or",)))


def write(path, **sets):
    path.write_text(json.dumps(sets), encoding="utf-8")
    return path


def test_bundled_templates_fit_their_data_sets():
    for dataset, names in {"sst": "abcde", "cfimdb": "ab", "demo": "abcde"}.items():
        for template in find_templates(dataset, list(names)):
            assert len(template.labels) == len(names)
            assert template.before or template.after


def test_bundled_templates_keep_their_words_in_the_order_of_the_labels():
    content = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    for dataset, names in {"sst": "abcde", "cfimdb": "ab", "demo": "abcde"}.items():
        found = find_templates(dataset, list(names))
        entries = content[dataset]
        assert [template.name for template in found] == [entry["name"] for entry in entries]
        for template, entry in zip(found, entries, strict=True):
            if "labels" not in entry:
                assert template.labels == tuple((name,) for name in names)
                continue
            assert list(map(list, template.labels)) == entry["labels"]
            place = {word: i for i, group in enumerate(template.labels) for word in group}
            low = [place[w] for w in ("terrible", "awful", "bad", "boring") if w in place]
            high = [place[w] for w in ("great", "wonderful", "excellent", "good") if w in place]
            assert low and high and max(low) < min(high)


def test_unknown_data_set_is_asked_for_its_label_names():
    names = ["sports", "world news", "science"]
    for template in find_templates("mine", names):
        assert template.labels == (("sports",), ("world news",), ("science",))


def test_file_without_any_still_has_a_template_for_every_data_set(tmp_path):
    path = write(tmp_path / "t.json", sst=[{"name": "a", "template": "{sentence} so"}])
    (template,) = find_templates("mine", ["x", "y"], path)
    assert (render(template, "One ."), template.labels) == ("One . It was", (("x",), ("y",)))


def test_template_is_chosen_by_name_or_is_the_first():
    assert choose_template([PLAIN, BOTH]) is PLAIN
    assert choose_template([PLAIN, BOTH], "both") is BOTH
    with pytest.raises(ValueError, match=r"'x'; there are plain, both"):
        choose_template([PLAIN, BOTH], "x")


GOOD = {"name": "a", "template": "{sentence} It was", "labels": [["bad"], ["good", "fine"]]}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({**GOOD, "lables": []}, "the keys name, template, labels"),
        ({"template": "{sentence} It was"}, "the keys name, template, labels"),
        ([], "the keys name, template, labels"),
        ({**GOOD, "template": "It was"}, r"'It was'.*\{sentence\} once"),
        ({**GOOD, "template": "{sentence}, so"}, "spaces around"),
        ({**GOOD, "template": "{sentence} {sentence} so"}, "once"),
        ({**GOOD, "template": 3}, "template 3"),
        ({**GOOD, "name": ""}, "name ''; give it a name"),
        ({**GOOD, "labels": [["bad"], [""]]}, "'' in labels is wrong; list each"),
        ({**GOOD, "labels": [["bad"], ["good "]]}, "'good ' in labels"),
        ({**GOOD, "labels": [["bad"], ["good", "bad"]]}, "'bad' in labels"),
        ({**GOOD, "labels": [["bad"], []]}, r"\[\['bad'\], \[\]\] in labels"),
        ({**GOOD, "labels": ["bad", "good"]}, "in labels"),
        ({**GOOD, "labels": [["bad"], [1]]}, "1 in labels"),
        ({**GOOD, "labels": []}, "strings for 0 labels, the data has 2"),
        ({**GOOD, "labels": [["bad"], ["so"], ["good"]]}, "for 3 labels, the data has 2; write"),
    ],
)
def test_bad_template_is_one_line_with_file_entry_and_remedy(tmp_path, entry, said):
    path = write(tmp_path / "t.json", toy=[{**GOOD, "name": "first"}, entry])
    with pytest.raises(ValueError, match=said) as error:
        find_templates("toy", ["bad", "good"], path)
    message = str(error.value)
    assert message.startswith(f"{path}: 'toy', ")
    assert "entry 2" in message or "'a'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is not JSON"),
        ("[1]", "is not {"),
        ('{"toy": {}}', "is not {"),
        ('{"toy": []}', "entries of different names"),
        (json.dumps({"toy": [GOOD, GOOD]}), "entries of different names"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_file_of_templates_is_one_line(tmp_path, content, said):
    path = tmp_path / "t.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said) as error:
        read_templates(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_rendering_puts_one_space_between_words_and_none_at_the_end():
    assert render(BOTH, "Fine .") == "a story : Fine . it was a"
    assert render(BOTH, "") == "a story : it was a"
    assert render(PLAIN, "Fine .") == "Fine . the movie is"
    assert render(PLAIN, "") == "the movie is"
    assert render(Template("last", "a film", "", None), "it") == "a film it"
