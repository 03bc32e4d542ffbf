"""sanity_check.py agrees with the float64 oracle and names the usual mistakes."""

import shutil

import pytest
import torch

import llama
import oracle
import sanity_check
from conftest import ended, random_llama, save_llama, shared_asset


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*options) returns exit code, output and error of sanity_check.py in a folder with two
    checkpoints, one with the vocabulary of stories42M and one that plays the bundled model, and
    with what float64 NumPy makes of them, in the two forms of reference files."""
    monkeypatch.chdir(tmp_path)
    save_llama(random_llama(vocab_size=32000, n_layers=3), "stories42M.pt")
    oracle.main("stories42M.pt", "both-modes.data")
    torch.save(torch.load("both-modes.data", weights_only=True)["full"], "sanity_check.data")
    (tmp_path / "mini").mkdir()
    save_llama(random_llama(seed=1), "mini/model.pt")
    oracle.main("mini/model.pt", "mini/reference.data")
    monkeypatch.setattr(sanity_check, "MINI", ("mini/model.pt", "mini/reference.data"))
    monkeypatch.setattr(sanity_check, "__file__", str(tmp_path / "sanity_check.py"))
    return lambda *options: ended(lambda: sanity_check.main(list(options)), capsys)


def test_right_models_pass_from_any_folder_and_the_differences_are_printed(
    run, tmp_path, monkeypatch
):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.endswith("Your Llama implementation is correct!\n")
    assert out.count("largest difference") == 2 + 4  # two quantities; of the second, in two modes
    assert [out.count(f"attention: {mode}") for mode in ("full", "causal")] == [2, 1]
    assert "tolerance 2e-05" in out
    (tmp_path / "another").mkdir()
    monkeypatch.chdir("another")
    code, there, err = run()  # checks the project's files
    assert (code, there.replace(f"{tmp_path}/", ""), err) == (0, out, "")


def test_without_the_download_the_bundled_model_is_checked_and_a_line_says_so(run, tmp_path):
    (tmp_path / "stories42M.pt").unlink()
    code, out, err = run()
    assert (code, out.count("largest difference"), err.count("\n")) == (0, 4, 1)
    assert "stories42M.pt not found" in err and "setup.sh" in err


def test_a_submission_without_the_bundled_model_checks_the_published_pair(run):
    shutil.rmtree("mini")
    code, out, _ = run()
    assert (code, out.count("largest difference")) == (0, 2)


def test_a_wrong_bundled_model_fails_the_check_of_a_right_download(run):
    save_llama(random_llama(seed=2), "mini/model.pt")
    code, out, _ = run()
    assert code == 1 and "is correct" not in out


def test_nan_is_a_difference(run):
    saved = torch.load("sanity_check.data", weights_only=True)
    saved["hidden_states"][0, 0, 0] = torch.nan
    torch.save(saved, "sanity_check.data")
    code, out, _ = run()
    assert code == 1 and "is correct" not in out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_ids": torch.tensor([[-1, 2]])}, "token_ids are not"),
        ({"token_ids": torch.tensor([[0.5]])}, "token_ids are not"),
        ({"token_ids": torch.tensor([1, 2])}, "token_ids are not"),
        ({"token_ids": [[1, 2]]}, "token_ids are not"),
        ({"full": ..., "causal": ...}, "holds token_ids and no outputs"),
        ({"full": 3}, "'full' is not an attention mode with its outputs"),
        ({"half": {}}, "'half' is not an attention mode"),
        ({"full": {"logits": 3}}, "holds nothing as logits"),
    ],
)
def test_a_reference_of_another_form_is_a_usage_error(run, changed, words):
    content = torch.load("mini/reference.data", weights_only=True) | changed
    torch.save({key: value for key, value in content.items() if value is not ...}, "odd.data")
    code, _, err = run("--checkpoint", "mini/model.pt", "--reference", "odd.data")
    assert code == 2 and "error: odd.data: " in err and words in err


def test_a_checkpoint_and_a_reference_that_do_not_belong_together_are_a_usage_error(run):
    save_llama(random_llama(vocab_size=32000, dim=64), "wide.pt")
    for checkpoint in ("wide.pt", "mini/model.pt"):  # that has fewer tokens than the reference
        code, _, err = run("--checkpoint", checkpoint)
        assert code == 2 and "do not belong together" in err


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        *(("sanity_check.data", ()), ("mini/model.pt", ()), ("mini/reference.data", ())),
        *(("absent.pt", (option, "absent.pt")) for option in ("--checkpoint", "--reference")),
    ],
)
def test_missing_files_are_named_and_what_was_typed_is_never_replaced(
    run, tmp_path, missing, options
):
    (tmp_path / missing).unlink(missing_ok=True)
    code, _, err = run(*options)
    assert (code, err.count("\n")) == (2, 1)
    assert f"missing {missing}" in err and "setup.sh" in err


def in_one_mode(is_causal):
    def break_it(monkeypatch):
        init = llama.Attention.__init__

        def with_this_mode(self, config):
            init(self, config)
            self.is_causal = is_causal

        monkeypatch.setattr(llama.Attention, "__init__", with_this_mode)

    return break_it


def halves_paired(monkeypatch):
    def rotate(x, freqs_cis):
        a, b = x.chunk(2, dim=-1)
        cos, sin = freqs_cis.real[:, None], freqs_cis.imag[:, None]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    monkeypatch.setattr("rope.rotate", rotate)


def attention_not_loaded(monkeypatch):
    load_state_dict = llama.Llama.load_state_dict

    def with_random_attention(self, weights, **options):
        half_read = {
            name: torch.randn_like(tensor) if "attention." in name else tensor
            for name, tensor in weights.items()
        }
        return load_state_dict(self, half_read, **options)

    monkeypatch.setattr(llama.Llama, "load_state_dict", with_random_attention)


def wrong_eps(monkeypatch):
    norm = llama.RMSNorm._norm

    def with_other_eps(self, x):
        self.eps = 1e-6
        return norm(self, x)

    monkeypatch.setattr(llama.RMSNorm, "_norm", with_other_eps)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (in_one_mode(is_causal=True), "a causal mask"),
        (in_one_mode(is_causal=False), "no causal mask"),
        (halves_paired, "wrong RoPE pairing"),
        (attention_not_loaded, "random weights"),
        (wrong_eps, "none of the usual mistakes"),
    ],
)
def test_a_broken_model_fails_and_is_told_what_it_looks_like(run, monkeypatch, break_it, words):
    break_it(monkeypatch)
    code, out, _ = run()
    assert code == 1 and f"It looks like {words}" in out and "is correct" not in out


def test_published_reference_has_no_causal_mask():
    """Equal beginnings with unequal states: the fact behind the default attention mode."""
    path = shared_asset("reference/sanity_check.data")
    hidden = torch.load(path, weights_only=True)["hidden_states"]
    assert sanity_check.TOKEN_IDS[0][:2] == sanity_check.TOKEN_IDS[1][:2]
    assert (hidden[0, 0] - hidden[1, 0]).abs().max() > 10
