"""sanity_check.py agrees with the float64 oracle and names the usual mistakes."""

import shutil

import pytest
import torch

import llama
import oracle
import sanity_check
from conftest import random_llama, save_llama, shared_asset
from utils import run_script


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """A checkpoint with the vocabulary of stories42M, one that plays the bundled model, and what
    float64 NumPy makes of them, in the two forms of reference files."""
    monkeypatch.chdir(tmp_path)
    model = random_llama(vocab_size=32000, n_layers=3)
    save_llama(model, tmp_path / "stories42M.pt")
    logits, hidden = oracle.forward(model.state_dict(), model.config, sanity_check.TOKEN_IDS)
    reference = {
        "logits": torch.tensor(logits[:, -1:]).float(),
        "hidden_states": torch.tensor(hidden).float(),
    }
    torch.save(reference, tmp_path / "sanity_check.data")
    (tmp_path / "mini").mkdir()
    save_llama(random_llama(seed=1), tmp_path / "mini/model.pt")
    oracle.main("mini/model.pt", "mini/reference.data")
    monkeypatch.setattr(sanity_check, "MINI", ("mini/model.pt", "mini/reference.data"))
    monkeypatch.setattr(sanity_check, "__file__", str(tmp_path / "sanity_check.py"))
    return tmp_path


def test_right_models_pass_and_the_differences_are_printed(pair, capsys):
    assert sanity_check.main([]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Your Llama implementation is correct!\n")
    assert out.count("largest difference") == 2 + 4  # two quantities; of the second, in two modes
    assert [out.count(f"attention: {mode}") for mode in ("full", "causal")] == [2, 1]
    assert "tolerance 2e-05" in out


def test_without_the_download_the_bundled_model_is_checked_and_a_line_says_so(pair, capsys):
    (pair / "stories42M.pt").unlink()
    assert run() == 0
    captured = capsys.readouterr()
    assert captured.out.count("largest difference") == 4
    assert captured.err.count("\n") == 1
    assert "stories42M.pt not found" in captured.err
    assert "setup.sh" in captured.err


def test_a_wrong_bundled_model_fails_the_check_of_a_right_download(pair, capsys):
    save_llama(random_llama(seed=2), pair / "mini/model.pt")
    assert sanity_check.main([]) == 1
    assert "is correct" not in capsys.readouterr().out


def test_a_submission_without_the_bundled_model_checks_the_published_pair(pair, capsys):
    shutil.rmtree(pair / "mini")
    assert sanity_check.main([]) == 0
    assert capsys.readouterr().out.count("largest difference") == 2


def test_from_another_folder_the_projects_weights_are_checked(pair, monkeypatch, capsys):
    (pair / "another").mkdir()
    monkeypatch.chdir(pair / "another")
    assert run() == 0
    out, err = capsys.readouterr()
    assert out.count("largest difference") == 2 + 4 and err == ""


def test_a_reference_without_outputs_is_no_agreement(pair, capsys):
    torch.save({"token_ids": torch.tensor([[1, 2]])}, "none.data")
    assert run("--reference", "none.data") == 2
    assert "none.data: holds token_ids and no outputs" in capsys.readouterr().err


def test_a_reference_with_tokens_that_the_model_lacks_is_a_usage_error(pair, capsys):
    assert run("--checkpoint", "mini/model.pt") == 2  # with the published reference's 32000 tokens
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("token_ids", torch.tensor([[-1, 2]]), "token_ids are not"),
        ("token_ids", torch.tensor([[0.5]]), "token_ids are not"),
        ("token_ids", torch.tensor([1, 2]), "token_ids are not"),
        ("token_ids", [[1, 2]], "token_ids are not"),
        ("full", 3, "'full' is not an attention mode with its outputs"),
        ("half", {}, "'half' is not an attention mode"),
        ("full", {"logits": 3}, "holds nothing as logits"),
    ],
)
def test_a_reference_of_another_form_is_a_usage_error(pair, capsys, key, value, words):
    content = torch.load("mini/reference.data", weights_only=True)
    torch.save({**content, key: value}, "odd.data")
    assert run("--checkpoint", "mini/model.pt", "--reference", "odd.data") == 2
    error = capsys.readouterr().err
    assert "error: odd.data: " in error and words in error


def test_a_model_that_forgets_its_mask_is_told_so(pair, monkeypatch, capsys):
    init = llama.Attention.__init__

    def without_mask(self, config):
        init(self, config)
        self.is_causal = False

    monkeypatch.setattr(llama.Attention, "__init__", without_mask)
    assert sanity_check.main([]) == 1
    assert "It looks like no causal mask" in capsys.readouterr().out


def causal_mask(monkeypatch):
    init = llama.Attention.__init__

    def with_mask(self, config):
        init(self, config)
        self.is_causal = True

    monkeypatch.setattr(llama.Attention, "__init__", with_mask)


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
        (causal_mask, "a causal mask"),
        (halves_paired, "wrong RoPE pairing"),
        (attention_not_loaded, "random weights"),
        (wrong_eps, "none of the usual mistakes"),
    ],
)
def test_a_broken_model_fails_and_is_told_what_it_looks_like(
    pair, monkeypatch, capsys, break_it, words
):
    break_it(monkeypatch)
    assert sanity_check.main([]) == 1
    out = capsys.readouterr().out
    assert f"It looks like {words}" in out
    assert "is correct" not in out


def test_nan_is_a_difference(pair, capsys):
    saved = torch.load("sanity_check.data", weights_only=True)
    saved["hidden_states"][0, 0, 0] = torch.nan
    torch.save(saved, "sanity_check.data")
    assert sanity_check.main([]) == 1
    assert "is correct" not in capsys.readouterr().out


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: sanity_check.main(list(argv)))
    return ended.value.code


@pytest.mark.parametrize("absent", ["sanity_check.data", "mini/model.pt", "mini/reference.data"])
def test_missing_files_are_named_with_exit_code_2(pair, capsys, absent):
    (pair / absent).unlink()
    assert run() == 2
    error = capsys.readouterr().err
    assert absent in error
    assert "setup.sh" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--checkpoint", "--reference"])
def test_what_was_typed_is_never_replaced(pair, capsys, option):
    assert run(option, "absent.pt") == 2
    assert "missing absent.pt" in capsys.readouterr().err


def test_a_reference_of_another_model_is_a_usage_error(pair, capsys):
    save_llama(random_llama(vocab_size=32000, dim=64), pair / "other.pt")
    assert run("--checkpoint", "other.pt") == 2
    assert "do not belong together" in capsys.readouterr().err


def test_published_reference_has_no_causal_mask():
    """Equal beginnings with unequal states: the fact behind the default attention mode."""
    path = shared_asset("reference/sanity_check.data")
    hidden = torch.load(path, weights_only=True)["hidden_states"]
    assert sanity_check.TOKEN_IDS[0][:2] == sanity_check.TOKEN_IDS[1][:2]
    assert (hidden[0, 0] - hidden[1, 0]).abs().max() > 10
