"""Defaults: the assignment's, else the bundled ones, never in the place of what was typed; and no
output in the place of an input or of a file of the project."""

import argparse
import itertools
import os

import pytest

import run_llama
from conftest import ROOT, ended
from training import options
from training.options import require_outputs
from utils import InputError

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
    return tmp_path / "elsewhere"


def paths_of(args):
    return {key: getattr(args, key) for key in ("pretrained_model_path", *DATA)}


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize("files", [[], [*BUNDLED, *OWN]])
def test_the_defaults_are_the_assignments_files(place, capsys, files):
    place(*files)
    for option, kind in (("generate", "prompting"), ("finetune", "finetuning")):
        args = run_llama.get_args(["--option", option])
        assert paths_of(args) == {"pretrained_model_path": options.MODEL, **options.DATA}
        assert (args.lr, args.dev_out) == (2e-5, f"cfimdb-dev-{kind}-output.txt")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["generate", "finetune"])
def test_the_bundled_files_stand_in_and_a_line_each_says_so(place, capsys, option):
    place(*BUNDLED)
    args = run_llama.get_args(["--option", option])
    lines = capsys.readouterr().err.splitlines()
    assert (args.pretrained_model_path, args.lr) == (options.MINI_MODEL, options.MINI_LR)
    assert "stories42M.pt not found" in lines[0] and "--lr" not in lines[0]
    assert all("setup.sh" in line for line in lines)
    assert len(lines) == (1 if option == "generate" else 2)  # generate reads no data
    if option == "finetune":
        assert "data/cfimdb-*.txt not found" in lines[1]
        assert {key: getattr(args, key) for key in DATA} == options.DEMO_DATA
        assert args.test_out == "demo-test-finetuning-output.txt"


@pytest.mark.parametrize("path", [options.MINI_MODEL, str(ROOT / options.MINI_MODEL)])
def test_the_bundled_model_has_its_rate_also_if_it_is_named(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    for given, expected in ((None, options.MINI_LR), (0.1, 0.1)):
        args = argparse.Namespace(pretrained_model_path=path, lr=given)
        options.fill_model(args)
        assert (args.pretrained_model_path, args.lr) == (path, expected)


@pytest.mark.parametrize(("lr", "is_too_small"), [("2e-5", True), ("7.5e-5", False)])
def test_a_typed_rate_stays_and_one_that_is_small_for_the_bundled_model_is_said(
    place, capsys, lr, is_too_small
):
    place(*BUNDLED)
    assert run_llama.get_args(["--option", "finetune", "--lr", lr]).lr == float(lr)
    line = capsys.readouterr().err.splitlines()[0]
    words = f"with --lr {float(lr)} the bundled model learns slowly, its default is 0.0005"
    assert (words in line) == is_too_small


def test_prompting_needs_no_training_file(place):
    place(*BUNDLED, *[path for path in OWN if "train" not in path])
    assert run_llama.get_args(["--option", "prompt"]).dev == options.DATA["dev"]
    assert run_llama.get_args(["--option", "finetune"]).dev == options.DEMO_DATA["dev"]


@pytest.mark.parametrize("option", ["generate", "finetune"])
def test_what_is_read_beside_a_typed_path_is_said(place, capsys, option):
    place(*OWN)
    run_llama.get_args(["--option", option, "--train", "own.txt", "--dev", "own.txt"])
    taken = "--test data/cfimdb-test.txt, --label-names data/cfimdb-label-mapping.json"
    line = "" if option == "generate" else f"not given, using the assignment's files: {taken}\n"
    assert capsys.readouterr().err.partition(": ")[2] == line


def test_what_was_typed_is_never_replaced(place):
    """Each subset of the paths is typed, all of them naming files that do not exist."""
    place(*BUNDLED)
    keys = ("pretrained_model_path", *DATA)
    flags = {key: f"--{key if key in DATA[:3] else key.replace('_', '-')}" for key in keys}
    for n in range(len(flags) + 1):
        for typed in itertools.combinations(flags, n):
            argv = [word for key in typed for word in (flags[key], f"absent/{key}")]
            args = run_llama.get_args(["--option", "finetune", *argv])
            assert all(getattr(args, key) == f"absent/{key}" for key in typed)
            for key in set(DATA) - set(typed):
                expected = options.DATA if set(DATA) & set(typed) else options.DEMO_DATA
                assert getattr(args, key) == expected[key]


def test_from_another_folder_inputs_are_found_in_the_project_and_outputs_stay_here(
    place, elsewhere
):
    root = place(*BUNDLED)
    args = run_llama.get_args(["--option", "prompt"])
    assert args.pretrained_model_path == str(root / options.MINI_MODEL)
    assert args.dev == str(root / options.DEMO_DATA["dev"])
    assert args.dev_out == "demo-dev-prompting-output.txt"
    place(*OWN)
    args = run_llama.get_args(["--option", "prompt", "--dev", "mine.txt"])
    assert (args.dev, args.test) == ("mine.txt", str(root / options.DATA["test"]))


def test_splits_in_a_folder_of_their_own_have_the_projects_label_names(place, elsewhere):
    root = place(*BUNDLED, options.DATA["label_names"])
    (elsewhere / "data").mkdir()
    for split in ("dev", "test"):
        (elsewhere / options.DATA[split]).touch()
    args = run_llama.get_args(["--option", "prompt"])
    assert (args.dev, args.test) == (options.DATA["dev"], options.DATA["test"])
    assert args.label_names == str(root / options.DATA["label_names"])


def test_default_names_of_outputs_and_checkpoints_follow_the_data_set(place, tmp_path, monkeypatch):
    place()
    argv = ["--option", "finetune", "--train", "data/sst-train.txt", "--dev", "data/sst-dev.txt"]
    args = run_llama.get_args([*argv, "--test", "x/sst/test.txt"])
    assert args.dev_out == "sst-dev-finetuning-output.txt"
    assert args.test_out == "sst-test-finetuning-output.txt"
    assert run_llama.checkpoint_path(args) == "finetune-sst-5-2e-05.pt"
    args.train = "cfimdb/train.txt"
    assert run_llama.checkpoint_path(args) == "finetune-cfimdb-5-2e-05.pt"
    (tmp_path / "imdb").mkdir()
    monkeypatch.chdir("imdb")
    args.train = "train.txt"
    assert run_llama.checkpoint_path(args) == "finetune-imdb-5-2e-05.pt"


# ---------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (options.positive_int, {"1": 1, "70": 70}, ["0", "-1", "1.5", "x", ""]),
        (options.non_negative_int, {"0": 0}, ["-1", "nan"]),
        (options.seed_int, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296"]),
        (options.positive_float, {"1e-3": 1e-3}, ["0", "-1", "nan", "inf"]),
        (options.non_negative_float, {"0": 0.0, "2.5": 2.5}, ["-0.1", "nan", "inf"]),
        (options.probability_below_one, {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "nan"]),
        (options.share, {"1": 1.0, "0.5": 0.5}, ["0", "1.1", "nan"]),
        (options.count, {"1.5M": 1_500_000, "2e3": 2000, "7": 7}, ["0", "1.5", "M", "1e999", "-1"]),
    ],
)
def test_numbers_out_of_their_range_are_refused_with_the_value(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^'{text}' is not a"):
            parse(text)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--warmup", "1"], "'1' is not a number in [0, 1)"),
        (["--lr", "1e40"], "'1e40' is not a number in (0, 1e30)"),
        (["--batch_size", "9" * 20], "is not an integer in [1, 2**63)"),
        (["--train_acc", "none"], "--train_acc: invalid choice: 'none'"),
        (["--pretrained_model_path", "x.pt"], "did you mean --pretrained-model-path?"),
        (["--label_names=x.json"], "did you mean --label-names?"),
        (["--resume"], "--resume and --restart belong to --option finetune"),
        (["--resume", "--restart"], "--restart: not allowed with argument --resume"),
    ],
)
def test_a_usage_error_is_one_line(place, capsys, argv, words):
    place()
    code, _, err = ended(lambda: run_llama.get_args(argv), capsys)
    assert code == 2 and err.count("\n") == 1 and words in err


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("outputs", "inputs", "words"),
    [
        (["a", "b/../a"], [], "is the name of two outputs; give each its own"),
        (["b/../a"], ["a"], "is an input and would be replaced"),
        (["link"], ["a"], "is an input and would be replaced"),
        (["."], [], "is not a name for an output file"),
        ([""], [], "is not a name for an output file"),
        (["no/a"], [], "its folder does not exist; make it first"),
        (["circle/a"], [], "its folder does not exist; make it first"),
    ],
)
def test_an_output_is_no_input_no_other_output_and_has_a_folder(place, outputs, inputs, words):
    root = place("a")
    (root / "link").symlink_to("a")
    (root / "circle").symlink_to("circle")
    with pytest.raises(InputError, match=words):
        require_outputs(outputs, inputs)
    require_outputs(["a", "circle", "/dev/null", "/dev/null"], ["/dev/null", None, "b"])


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match="its folder is not writable"):
        require_outputs([str(tmp_path / "locked" / "out.txt")], [])


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.py", "*/*.py", "advanced/*/*.py", "*.sh", "*.toml", "*.md", "docs/*"),
        *("training/*.json", "benchmarks/*.json", "data/*.json", "data/demo-*", "data/mini/*"),
        *("results/LOG.md", "results/records/*"),
    ],
)
def test_an_output_is_no_file_of_the_project(pattern):
    paths = list(ROOT.glob(pattern))
    assert paths  # no pattern has lost its files
    for path in paths:
        with pytest.raises(InputError, match="is a file of the project; name another output"):
            require_outputs([str(path)], [])


def test_an_output_in_a_folder_of_the_project_can_be_written_again(place, monkeypatch):
    root = place("data/sst-dev-prompting-output.txt", "out.txt", "runs/model.pt", "my-notes.md")
    for path in root.rglob("*.*"):
        require_outputs([str(path)], [])
    place("data/sst-train.txt", "llama.py")
    with pytest.raises(InputError, match="is a file of the project"):
        require_outputs(["data/sst-train.txt"], [])
    monkeypatch.setattr(options, "ROOT", root / "data")
    require_outputs(["llama.py"], [])  # files of other projects are their owner's
