"""Prompt templates as data: the words around a sentence, and the strings that name each label.

A template turns a sentence into the beginning of a text ("... It was") and each label into strings
that may follow, its verbalizers. In natural language inference results depend more on these strings
than on the template's meaning (Webson and Pavlick 2022, arXiv 2109.01247).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from classifier import prompt_suffix
from utils import InputError

TEMPLATES = Path(__file__).parent / "templates.json"


class Template(NamedTuple):
    """`before` and `after` stand around the sentence, each a space apart; the label comes last."""

    name: str
    before: str
    after: str
    labels: tuple[tuple[str, ...], ...]  # the strings of label 0, 1, ...


def find_templates(dataset: str, label_names: list[str], path: Path = TEMPLATES) -> list[Template]:
    """Return the templates of a data set, or those of "any" for an unknown data set.

    The file reads {"sst": [{"name": ..., "template": ..., "labels": [[...], ...]}, ...], ...}.
    Without `labels` a label's only string is its name. The first template of a known data set, all
    of which are film reviews, is the assignment's question.
    """
    try:
        sets = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); correct the file") from error
    key = dataset if dataset in sets else "any"
    templates = [
        _parse(entry, label_names, f"{path}: {key!r}, entry {number}")
        for number, entry in enumerate(sets[key], start=1)
    ]
    return templates if key == "any" else [question(label_names), *templates]


def question(label_names: list[str]) -> Template:
    """Return the assignment's question, whose answer is a label's name."""
    labels = tuple((name,) for name in label_names)
    return Template("question", "", prompt_suffix(label_names).rstrip(), labels)


def _parse(entry: dict[str, Any], label_names: list[str], place: str) -> Template:
    words = entry.get("template", "").split(" ")
    if "name" not in entry or words.count("{sentence}") != 1:
        raise InputError(
            f"{place}: needs a name and a template with {{sentence}} once, spaces around it, as in "
            '"{sentence} It was"'
        )
    labels = entry.get("labels", [[name] for name in label_names])
    is_complete = all(isinstance(group, list) and group for group in labels)
    if len(labels) != len(label_names) or not is_complete:
        raise InputError(
            f"{place}: labels {labels}; the data has {len(label_names)} labels, so write one list "
            "of strings for each, leave `labels` out to use the labels' names, or give other data "
            "another file name"
        )
    at = words.index("{sentence}")
    before, after = " ".join(words[:at]), " ".join(words[at + 1 :])
    return Template(entry["name"], before, after, tuple(map(tuple, labels)))


def choose_template(templates: list[Template], name: str | None = None) -> Template:
    """Return the template of this name, or the first."""
    by_name = {template.name: template for template in templates}
    if name is not None and name not in by_name:
        raise InputError(f"--template {name}: is not one of {', '.join(by_name)}")
    return templates[0] if name is None else by_name[name]


def render(template: Template, sentence: str) -> str:
    """Return the text that a label follows after a space. An empty sentence gives only the
    template's words."""
    return " ".join(filter(None, (template.before, sentence, template.after)))
