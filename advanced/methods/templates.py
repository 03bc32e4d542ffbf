"""Prompt templates as data: what stands around a sentence, and the strings that may follow.

A template makes of a sentence the beginning of a text ("... It was") and of each label strings that
may follow, its verbalizers; in natural language inference more depends on these than on what the
template means (Webson and Pavlick 2022, arXiv 2109.01247). They are read from `templates.json`, or
from a file of the same form, and nothing here knows of a model.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from config import shown
from training.labelled import decode

TEMPLATES = Path(__file__).resolve().parent / "templates.json"


class Template(NamedTuple):
    """`before` and `after` stand around the sentence, each a space apart; the label comes last."""

    name: str
    before: str
    after: str
    labels: tuple[tuple[str, ...], ...] | None  # strings of label 0, 1, ...; None: the label's name


def read_templates(path: str | os.PathLike = TEMPLATES) -> dict[str, list[Template]]:
    """The templates of each data set: {"sst": [{"name", "template", "labels"}, ...], ...}.

    ValueError names file, data set and entry for anything else. `labels` may be left out.
    """
    try:
        content = json.loads(decode(Path(path).read_bytes(), path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({shown(str(error))}); mend the file") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise ValueError(f'{path}: is not {{"data set": [templates]}}, but {shown(content)}')
    sets = {}
    for key, entries in content.items():
        place = f"{path}: {shown(key)}, entry"
        sets[key] = [_parse(entry, f"{place} {i}") for i, entry in enumerate(entries, start=1)]
        names = [template.name for template in sets[key]]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{path}: {shown(key)} needs entries of different names, not {names}")
    return sets


def _parse(entry: Any, place: str) -> Template:
    required, known = {"name", "template"}, {"name", "template", "labels"}
    if not isinstance(entry, dict) or not required <= set(entry) <= known:
        raise ValueError(f"{place}: {shown(entry)} does not have the keys name, template, labels")
    name, template, labels = (entry.get(key) for key in ("name", "template", "labels"))
    words = template.strip().split(" ") if isinstance(template, str) else []
    if words.count("{sentence}") != 1 or not isinstance(name, str) or not name:
        raise ValueError(
            f"{place}: template {shown(template)}, name {shown(name)}; give it a name, and "
            '{sentence} once with spaces around it, as in "{sentence} It was"'
        )
    at = words.index("{sentence}")
    is_nested = isinstance(labels, list) and all(isinstance(s, list) and s for s in labels)
    strings = [string for group in labels for string in group] if is_nested else [None]
    if labels is None:
        strings = []
    wrong = [s for i, s in enumerate(strings) if not _is_stripped(s) or s in strings[:i]]
    if wrong:
        raise ValueError(
            f"{place}: {shown(labels if wrong == [None] else wrong[0])} in labels is wrong; list "
            "each label's strings, not empty, all different, without spaces at their ends, as in "
            '[["terrible", "awful"], ["great"]]'
        )
    groups = None if labels is None else tuple(map(tuple, labels))
    return Template(name, " ".join(words[:at]), " ".join(words[at + 1 :]), groups)


def _is_stripped(string: Any) -> bool:
    return isinstance(string, str) and string != "" and string == string.strip()


def find_templates(
    dataset: str, label_names: list[str], path: str | os.PathLike = TEMPLATES
) -> list[Template]:
    """The file's templates for a data set, or for one it does not know those of its "any".

    Where an entry leaves out `labels`, each label's only string is its name.
    """
    sets = read_templates(path)
    key = dataset if dataset in sets else "any"
    found = []
    for template in sets.get(key) or [Template("it-was", "", "It was", None)]:
        labels = template.labels
        if labels is None:
            labels = tuple((name.strip(),) for name in label_names)
        if len(labels) != len(label_names):
            raise ValueError(
                f"{path}: {shown(key)}, {shown(template.name)} has strings for {len(labels)} "
                f"labels, the data has {len(label_names)}; write one list for each, or leave "
                "`labels` out to use the labels' names"
            )
        found.append(template._replace(labels=labels))
    return found


def choose_template(templates: list[Template], name: str | None = None) -> Template:
    """The one of this name, or the first."""
    by_name = {template.name: template for template in templates}
    if name is not None and name not in by_name:
        raise ValueError(f"no template is called {shown(name)}; there are {', '.join(by_name)}")
    return templates[0] if name is None else by_name[name]


def render(template: Template, sentence: str) -> str:
    """The text that a label follows after a space; without a sentence, the template's words."""
    return " ".join(filter(None, (template.before, sentence, template.after)))
