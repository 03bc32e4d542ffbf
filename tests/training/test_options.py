"""Defaults: the assignment's, else what is bundled, and never in the place of what was typed."""

import itertools

import pytest

import cli
from training import options
from utils import atomic_write

DATA = ("train", "dev", "test", "label_names")
BUNDLED = [options.MINI_MODEL, *options.DEMO_DATA.values()]
OWN = [options.MODEL, *options.DATA.values()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(files) makes empty files in a project folder that is also the current one."""
    monkeypatch.setattr(options, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return tmp_path

    return make


@pytest.fixture
def elsewhere(place, tmp_path, monkeypatch):
    """Makes another folder the current one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def paths_of(args):
    return {key: getattr(args, key) for key in ("pretrained_model_path", *DATA)}


def test_where_the_assignments_files_are_they_are_the_defaults(place, capsys):
    place(*BUNDLED, *OWN)
    for option, kind in (("generate", "prompting"), ("prompt", "prompting")):
        args = options.get_args(["--option", option])
        assert paths_of(args) == {"pretrained_model_path": options.MODEL, **options.DATA}
        assert (args.lr, args.dev_out) == (2e-5, f"cfimdb-dev-{kind}-output.txt")
    args = options.get_args(["--option", "finetune"])
    assert (args.dev_out, args.test_out) == (
        "cfimdb-dev-finetuning-output.txt",
        "cfimdb-test-finetuning-output.txt",
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["generate", "prompt", "finetune"])
def test_where_they_are_absent_the_bundled_ones_stand_in_and_a_line_each_says_so(
    place, capsys, option
):
    place(*BUNDLED)
    args = options.get_args(["--option", option])
    lines = capsys.readouterr().err.splitlines()
    assert args.pretrained_model_path == options.MINI_MODEL
    assert args.lr == options.MINI_LR
    assert "stories42M.pt not found" in lines[0]
    assert all("setup.sh" in line for line in lines)
    if option == "generate":  # reads no data, so nothing is said of any
        assert len(lines) == 1
        return
    assert len(lines) == 2
    assert "data/cfimdb-*.txt not found" in lines[1]
    assert {key: getattr(args, key) for key in DATA} == options.DEMO_DATA
    kind = {"prompt": "prompting", "finetune": "finetuning"}[option]
    assert args.dev_out == f"demo-dev-{kind}-output.txt"
    assert args.test_out == f"demo-test-{kind}-output.txt"


def test_prompting_needs_no_training_file(place, capsys):
    place(*BUNDLED, *[path for path in OWN if "train" not in path])
    assert options.get_args(["--option", "prompt"]).dev == options.DATA["dev"]
    assert options.get_args(["--option", "finetune"]).dev == options.DEMO_DATA["dev"]


@pytest.mark.parametrize(
    ("option", "taken"),
    [
        ("finetune", "--test data/cfimdb-test.txt, --label-names data/cfimdb-label-mapping.json"),
        ("prompt", "--test data/cfimdb-test.txt, --label-names data/cfimdb-label-mapping.json"),
        ("generate", None),
    ],
)
def test_what_stands_beside_a_typed_path_is_said(place, capsys, option, taken):
    place(*OWN)
    options.get_args(["--option", option, "--train", "own.txt", "--dev", "own.txt"])
    line = f"not given and so the assignment's: {taken}\n" if taken else ""
    assert capsys.readouterr().err.partition(": ")[2] == line


def test_what_was_typed_is_never_replaced(place):
    """Each subset of the paths is typed, all of them naming files that do not exist."""
    place(*BUNDLED)
    flags = {key: f"--{key.replace('_', '-')}" for key in ("pretrained_model_path", "label_names")}
    flags |= {split: f"--{split}" for split in ("train", "dev", "test")}
    for n in range(len(flags) + 1):
        for typed in itertools.combinations(flags, n):
            argv = [word for key in typed for word in (flags[key], f"absent/{key}")]
            args = options.get_args(["--option", "finetune", *argv])
            assert all(getattr(args, key) == f"absent/{key}" for key in typed)
            data_typed = any(key in DATA for key in typed)
            for key in set(DATA) - set(typed):
                expected = options.DATA if data_typed else options.DEMO_DATA
                assert getattr(args, key) == expected[key]


def test_a_typed_default_is_typed(place, capsys):
    place(*BUNDLED)
    args = options.get_args(
        ["--pretrained-model-path", "stories42M.pt", "--dev_out", "my-dev-prompting-output.txt"]
    )
    assert args.pretrained_model_path == "stories42M.pt"
    assert (args.lr, args.dev_out) == (2e-5, "my-dev-prompting-output.txt")
    assert capsys.readouterr().err == ""


def test_a_typed_learning_rate_stays_with_the_bundled_model(place):
    place(*BUNDLED)
    assert options.get_args(["--lr", "1e-3"]).lr == 1e-3


def test_without_bundled_files_the_defaults_are_the_assignments(place, capsys):
    place()
    args = options.get_args(["--option", "finetune"])
    assert paths_of(args) == {"pretrained_model_path": options.MODEL, **options.DATA}
    assert capsys.readouterr().err == ""


def test_from_another_folder_inputs_are_found_in_the_project_and_outputs_stay_here(
    place, elsewhere
):
    root = place(*BUNDLED)
    args = options.get_args(["--option", "prompt"])
    assert args.pretrained_model_path == str(root / options.MINI_MODEL)
    assert args.dev == str(root / options.DEMO_DATA["dev"])
    assert args.dev_out == "demo-dev-prompting-output.txt"


def test_from_another_folder_a_typed_path_does_not_hide_the_projects_other_files(place, elsewhere):
    root = place(*OWN)
    args = options.get_args(["--option", "prompt", "--dev", "mine.txt"])
    assert args.dev == "mine.txt"
    assert args.test == str(root / options.DATA["test"])
    assert args.label_names == str(root / options.DATA["label_names"])


@pytest.mark.parametrize("sentences", [["-bad"], ["good", "--test"], ["--", "x"], ["a b", "-c d"]])
def test_what_stands_behind_two_hyphens_is_a_sentence(place, sentences):
    place(*OWN)
    args = options.get_args(["--option", "predict", "--checkpoint", "x", "--", *sentences])
    assert args.sentences == sentences


def test_two_outputs_of_one_name_are_refused(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    options.require_different([a, b, "/dev/null", "/dev/null"], ["/dev/null", None])
    with pytest.raises(ValueError, match="is the name of two outputs; give each its own"):
        options.require_different([a, str(tmp_path / "b" / ".." / "a")], [])


def test_an_output_in_an_inputs_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is an input, and would be replaced"):
        options.require_different([str(tmp_path / "b" / ".." / "a")], [None, str(tmp_path / "a")])


def test_what_has_no_content_needs_no_writable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(options.os, "access", lambda *_: False)
    options.require_folder("/dev/null")
    with pytest.raises(ValueError, match="its folder may not be written to"):
        options.require_folder(str(tmp_path / "out.txt"))


def test_a_link_to_itself_is_no_traceback(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    options.require_different([str(loop)], [str(loop / "a")])
    with pytest.raises(ValueError, match="its folder does not exist"):
        options.require_folder(str(loop / "out.txt"))
    options.require_folder(str(loop))
    with atomic_write(loop) as file:
        file.write("in the link's place")
    assert not loop.is_symlink()


def test_splits_in_a_folder_of_their_own_have_the_projects_label_names(place, elsewhere, tmp_path):
    root = place(*BUNDLED, options.DATA["label_names"])
    (tmp_path / "elsewhere" / "data").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "elsewhere" / options.DATA[split]).touch()
    args = options.get_args(["--option", "prompt"])
    assert (args.dev, args.test) == (options.DATA["dev"], options.DATA["test"])
    assert args.label_names == str(root / options.DATA["label_names"])


@pytest.mark.parametrize(
    "argv", [["--warmup", "1"], ["--max_grad_norm", "0"], ["--train_acc", "none"]]
)
def test_a_recipe_that_cannot_be_is_a_usage_error(place, capsys, argv):
    place()
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: options.get_args(argv))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
